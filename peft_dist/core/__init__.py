"""The vocabulary of the system. No torch, no I/O."""
