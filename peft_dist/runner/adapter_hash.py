"""The name of an adapter's content, which the whole system keys on."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice

# Raised whenever the same adapter would hash differently.
HASH_VERSION = b"peft_dist lora 1"
# Bytes of one leaf: leaves are hashed side by side, and their size decides the hash.
LEAF_BYTES = 1 << 20
MAX_THREADS = 4
MIN_LEAVES_FOR_THREADS = 4


def content_hash(description: bytes, stream: Iterable[memoryview]) -> str:
    """SHA-256 over an adapter's content, as 64 hexadecimal digits.

    It is cryptographic because requests of different users share KV blocks on the strength of it.

    Args:
        description: Everything but the weights' bytes; it must tell how ``stream`` is divided among the tensors.
        stream: The bytes of all tensors; how they are cut into views does not count. Few leaves of it are held at a
            time.
    """
    leaves = _leaves(stream)
    first = list(islice(leaves, MIN_LEAVES_FOR_THREADS))
    if len(first) < MIN_LEAVES_FOR_THREADS:
        digests = [_digest(leaf) for leaf in first]
    else:
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            digests = list(_digests(pool, chain(first, leaves)))
    return hashlib.sha256(HASH_VERSION + _digest([description]) + b"".join(digests)).hexdigest()


def _digests(pool: ThreadPoolExecutor, leaves: Iterable[list[memoryview]]) -> Iterator[bytes]:
    """In order; a stream that is read as it goes is not read far ahead."""
    under_way: deque[Future[bytes]] = deque()
    for leaf in leaves:
        under_way.append(pool.submit(_digest, leaf))
        if len(under_way) > 2 * MAX_THREADS:
            yield under_way.popleft().result()
    yield from (future.result() for future in under_way)


def _leaves(stream: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    leaf: list[memoryview] = []
    room = LEAF_BYTES
    for view in stream:
        while len(view) >= room:
            yield [*leaf, view[:room]]
            leaf, view, room = [], view[room:], LEAF_BYTES
        leaf.append(view)
        room -= len(view)
    yield leaf


def _digest(leaf: Iterable[bytes | memoryview]) -> bytes:
    digest = hashlib.sha256()
    for part in leaf:
        digest.update(part)
    return digest.digest()
