"""What page-locked host memory costs."""

from __future__ import annotations


def pinned_bytes(num_bytes: int) -> int:
    """What one buffer of ``num_bytes`` takes: torch's allocator of pinned memory rounds up to a power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0
