"""Where adapters should be, and which requests move between replicas. Decisions only: no torch, no sockets."""
