"""The live system on virtual time: orchestrator, engines and policies are the ones that serve."""
