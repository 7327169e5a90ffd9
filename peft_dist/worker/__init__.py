"""The per-rank process that runs one replica, and what starts it."""
