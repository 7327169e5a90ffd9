PREFIX = "orchestrator-"
