"""Random numbers that are a function of their place alone.

Draw ``k`` of sequence ``i`` of a request is the Philox4x32-10 block at counter ``(k, i)`` under the request's
seed as key (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011). No state is
carried from draw to draw, so any replica can go on with a sequence, and batch mates cannot disturb it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32(counters: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Return the Philox4x32-10 blocks of ``counters``.

    Args:
        counters: uint32 ``[N, 4]``, the least significant word first.
        key: Two 32-bit words, the least significant first.

    Returns:
        uint32 ``[N, 4]``.
    """
    c0, c1, c2, c3 = counters.astype(np.uint64).T
    k0, k1 = (np.uint64(word) for word in key)
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (right >> _WORD) ^ c1 ^ k0, right & _LOW, (left >> _WORD) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(seed: int, sequence_index: int, first_draw: int, count: int) -> NDArray[np.float64]:
    """Return draws ``first_draw`` onwards as multiples of 2**-53 in [0, 1), float64 ``[count]``.

    ``seed`` counts modulo 2**64, so that the whole range of ``SamplingParams.seed`` can be used.
    """
    draws = np.arange(first_draw, first_draw + count, dtype=np.uint64)
    counters = np.zeros((count, 4), dtype=np.uint32)
    counters[:, 0] = draws & _LOW
    counters[:, 1] = draws >> _WORD
    counters[:, 2] = sequence_index
    words = philox4x32(counters, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).astype(np.uint64)
    bits = ((words[:, 0] << _WORD) | words[:, 1]) >> np.uint64(11)
    numbers: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers
