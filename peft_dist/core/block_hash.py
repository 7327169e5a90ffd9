"""Names of full KV blocks: what was computed, by which adapter, after which prefix."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from peft_dist.core.request import Request

_TOKEN_BYTES = 8


def chain_hashes(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Chained hashes (blake2b, 16 bytes) of the full blocks that these tokens make behind a block named ``parent``.

    Equal only for equal prefixes of equal content. The first parent of a chain is the adapter's content hash, as UTF-8:
    two names with the same weights share their KV, one name with new weights does not.
    """
    data, size = array("q", token_ids).tobytes(), block_size * _TOKEN_BYTES
    hashes = []
    for start in range(0, len(data) - size + 1, size):
        parent = hashlib.blake2b(parent + data[start : start + size], digest_size=16).digest()
        hashes.append(parent)
    return hashes


def extend_block_hashes(request: Request, block_size: int) -> None:
    """Hash every full block of known tokens that ``request.block_hashes`` lacks."""
    hashes, known = request.block_hashes, request.num_known_tokens
    start = len(hashes) * block_size
    if known - start >= block_size:
        parent = hashes[-1] if hashes else request.content_hash.encode()
        hashes += chain_hashes(parent, request.tokens(start, known - known % block_size), block_size)
