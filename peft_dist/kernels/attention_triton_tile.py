"""What the two attention kernels share: one tile of keys under a running softmax.

The running softmax is FlashAttention's (Dao et al. 2022), in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_tile(
    acc,
    top,
    total,
    query,
    keys,
    end,
    positions,
    table,
    key_cache,
    value_cache,
    key_block,
    key_slot,
    value_block,
    value_slot,
    scale,
    cap,
    window,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
):
    """Take the keys at positions ``keys`` (int32 ``[N]``) into the sums of ``query`` (``[M, KEY_COLUMNS]``).

    ``acc`` ``[M, VALUE_COLUMNS]``, ``top`` and ``total`` ``[M]`` are the sums so far, float32. Keys from ``end`` on
    are not read (TAIL); those after a row's entry in ``positions`` (CAUSAL) or ``window`` and more before it (WINDOW)
    are not seen. ``scale`` leads to exponents of 2, or with a soft cap to the argument of tanh, times ``cap`` then.
    """
    inside = keys < end
    if TAIL:
        blocks = tl.load(table + keys // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    else:
        blocks = tl.load(table + keys // BLOCK_SIZE).to(tl.int64)
    offsets = keys % BLOCK_SIZE
    key_columns = tl.arange(0, KEY_COLUMNS)
    value_columns = tl.arange(0, VALUE_COLUMNS)
    key_tile = key_cache + (blocks * key_block + offsets * key_slot)[:, None] + key_columns[None, :]
    value_tile = value_cache + (blocks * value_block + offsets * value_slot)[:, None] + value_columns[None, :]
    # Columns beyond the head are zeros; rows beyond the sequence too, since freed blocks may hold anything.
    if KEY_DIM == KEY_COLUMNS and not TAIL:
        k = tl.load(key_tile)
    else:
        k = tl.load(key_tile, mask=inside[:, None] & (key_columns < KEY_DIM)[None, :], other=0.0)
    scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
    if CAP:
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores * 2.8853900817779268) + 1.0))
    if TAIL:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    if WINDOW:
        scores = tl.where(keys[None, :] > positions[:, None] - window, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet: -inf minus -inf would be NaN.
    pivot = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - pivot[:, None])
    decay = tl.exp2(top - pivot)
    total = total * decay + tl.sum(weights, 1)
    if VALUE_DIM == VALUE_COLUMNS and not TAIL:
        v = tl.load(value_tile)
    else:
        v = tl.load(value_tile, mask=inside[:, None] & (value_columns < VALUE_DIM)[None, :], other=0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, higher, total
