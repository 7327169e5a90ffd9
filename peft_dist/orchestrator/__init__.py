"""Admission, dispatch and the adapter registry, and the asyncio service around them. No torch."""
