"""Which program attends to which keys of which decode: worked out once a forward, on the device, by real lengths.

A launch that is captured has to fit every batch, short and long. So its programs are as many as the sequences and
``extra_parts`` more, and one program of the device deals the keys out: all get parts of the same length, so that a
sequence far longer than the others is read by several programs, while short ones are read whole (Flash-Decoding, Dao et
al. 2023; the lengths as in FlashAttention 3's scheduler).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from peft_dist.kernels.types import AttentionMetadata

MOST_PARTS = 64
FEWEST_TILES = 4
"""Tiles that a part has at least: shorter ones cost more to put together than they save."""
# Programs that an H100's multiprocessor has at once, by their shared memory.
_RESIDENT = 3
_FEWEST_PARTS = 4

SEQUENCE = tl.constexpr(0)
TOKEN = tl.constexpr(1)
BEGIN = tl.constexpr(2)
END = tl.constexpr(3)
SPLIT = tl.constexpr(4)
SPLITS = tl.constexpr(5)
FIELDS = tl.constexpr(8)


class DecodeSchedule(NamedTuple):
    """Parts of a batch's decodes.

    Attributes:
        items: int32 ``[max_items, 8]``: sequence, its query's row, first key, one after the last, which part of the
            sequence, and of how many: 0 in those that are not used. A sequence's parts follow each other.
        arrivals: int32 ``[max_items, num_kv_heads]``, zeros: parts that are done, counted at the sequence's first.
    """

    items: torch.Tensor
    arrivals: torch.Tensor


def extra_parts(num_seqs: int, num_kv_heads: int, processors: int) -> int:
    """Parts beyond one a sequence, a power of two.

    As many as give each multiprocessor two programs. Where the sequences alone nearly fill the GPU, no more than run at
    once with them: programs that have to queue are placed without regard to how much each multiprocessor has, even if
    they turn out to have nothing to do.
    """
    wanted = 2 * processors // num_kv_heads
    room = _RESIDENT * processors // num_kv_heads - num_seqs
    if 0 < room < wanted:
        wanted = max(room, _FEWEST_PARTS)
    return 1 << max(min(wanted, MOST_PARTS), 1).bit_length() - 1


def schedule_decodes(
    meta: AttentionMetadata, num_kv_heads: int, splits: int, keys: int, window: int | None, fewest: int = FEWEST_TILES
) -> DecodeSchedule:
    """The schedule of layers of this shape; it is made for the first of them.

    Args:
        splits: ``extra_parts``.
        keys: Of a tile.
        window: Of the layers; keys before it are not read.
    """
    name = ("triton_decodes", num_kv_heads, splits, keys, window)
    if name not in meta.scratch:
        max_items = meta.num_seqs + splits
        # Few kinds of each: whatever changes from batch to batch would be compiled anew.
        sequences = max(triton.next_power_of_2(meta.num_seqs), MOST_PARTS)
        most_items = triton.next_power_of_2(max(max_items, sequences + MOST_PARTS))
        integers = {"dtype": torch.int32, "device": meta.context_lens_t.device}
        items = torch.empty(max_items, FIELDS.value, **integers)  # type: ignore[call-overload]
        arrivals = torch.empty(max_items, num_kv_heads, **integers)  # type: ignore[call-overload]
        _schedule_kernel[(1,)](
            items,
            arrivals,
            meta.query_start_loc_t,
            meta.context_lens_t,
            window or 0,
            meta.num_seqs,
            max_items,
            arrivals.numel(),
            splits,
            KEYS=keys,
            FEWEST=fewest,
            SEQUENCES=sequences,
            ITEMS=most_items,
            ARRIVALS=most_items * triton.next_power_of_2(num_kv_heads),
            WINDOW=window is not None,
            num_warps=4,
        )
        meta.scratch[name] = DecodeSchedule(items, arrivals)
    return meta.scratch[name]  # type: ignore[return-value]


@triton.jit(do_not_specialize=["num_seqs", "max_items", "num_arrivals", "extra"])
def _schedule_kernel(
    items,
    arrivals,
    query_start_loc,
    context_lens,
    window,
    num_seqs,
    max_items,
    num_arrivals,
    extra,
    KEYS: tl.constexpr,
    FEWEST: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ITEMS: tl.constexpr,
    ARRIVALS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One program. Parts of ``each`` tiles: with T tiles in all, ceil(T / extra) make ``extra`` parts more at most."""
    sequence = tl.arange(0, SEQUENCES)
    exists = sequence < num_seqs
    token = tl.load(query_start_loc + sequence, mask=exists, other=0)
    after = tl.load(query_start_loc + sequence + 1, mask=exists, other=0)
    context = tl.load(context_lens + sequence, mask=exists & (after - token == 1), other=0)
    begin = tl.zeros([SEQUENCES], tl.int32)
    if WINDOW:
        begin = tl.maximum(context - window, 0)
    tiles = (context - begin + KEYS - 1) // KEYS
    each = tl.maximum((tl.sum(tiles, 0) + extra - 1) // extra, FEWEST)
    splits = (tiles + each - 1) // each
    part = (tiles + splits - 1) // tl.maximum(splits, 1) * KEYS
    last = tl.cumsum(splits, 0)
    first = last - splits
    longest = tl.max(splits, 0)
    split = 0
    while split < longest:
        here = split < splits
        item = items + (first + split) * FIELDS
        tl.store(item + SEQUENCE, sequence, mask=here)
        tl.store(item + TOKEN, token, mask=here)
        tl.store(item + BEGIN, begin + split * part, mask=here)
        tl.store(item + END, tl.minimum(begin + (split + 1) * part, context), mask=here)
        tl.store(item + SPLIT, tl.full([SEQUENCES], 0, tl.int32) + split, mask=here)
        tl.store(item + SPLITS, splits, mask=here)
        split += 1
    item = tl.arange(0, ITEMS)
    tl.store(items + item * FIELDS + SPLITS, 0, mask=(item >= tl.sum(splits, 0)) & (item < max_items))
    place = tl.arange(0, ARRIVALS)
    tl.store(arrivals + place, 0, mask=place < num_arrivals)
