"""Decisions over core types: no torch, no I/O, no clock, no randomness."""
