"""Names of full KV blocks: what was computed, by which adapter, after which prefix."""

from __future__ import annotations

import hashlib
from array import array

from peft_dist.core.request import Request


def block_hash(parent: bytes, token_ids: list[int]) -> bytes:
    """Chained hash of one full block (blake2b, 16 bytes): equal only for equal prefixes of equal content."""
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(array("q", token_ids).tobytes())
    return digest.digest()


def extend_block_hashes(request: Request, block_size: int) -> None:
    """Hash every full block of known tokens that ``request.block_hashes`` lacks.

    The chain starts from the adapter's content hash: two names with the same weights share their KV, one
    name with new weights does not.
    """
    hashes = request.block_hashes
    parent = hashes[-1] if hashes else request.content_hash.encode()
    for start in range(len(hashes) * block_size, request.num_known_tokens - block_size + 1, block_size):
        parent = block_hash(parent, request.tokens(start, start + block_size))
        hashes.append(parent)
