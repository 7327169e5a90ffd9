"""Workloads: who asks for what and when, an open-loop client that asks, and summaries of what came back."""
