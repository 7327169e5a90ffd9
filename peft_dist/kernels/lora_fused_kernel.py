"""One launch for a linear layer of a decode step: its own product, and the adapters' shrink and expand inside of it.

The first programs of the grid are shrinks: (part of the inputs, layer, tile), the tiles that are used first. The last
one of a tile's parts to end adds them up, in order, and counts the tile as done. The others are the layer's product:
(part of the inputs, block of outputs). They stream the weight, then wait until all tiles are done, add the adapters'
parts as further columns of the same product, and the last one of a block's parts to end adds those up, in order.

No program waits for one of a higher number, and those that are waited for wait for nobody: since a GPU starts programs
in the order of their numbers, whatever is waited for has been started and ends by itself. Counters of parts go back to
0 by themselves; that of tiles (``ready``) has to be 0 before the launch.

Sums are float32 and each output is rounded once. The parts of a product share the tiles out, so that the order in which
a row's part is added goes by the number of its tile: an element may be rounded otherwise in another place of a batch.
What other rows and adapters hold changes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_dist.kernels.lora_triton_parts import gated, layer_of, multiply, pick

RANKS = tl.constexpr(16)
"""Ranks that are in work at once."""


@triton.jit
def _arrive(counter, parts: tl.constexpr):
    """Whether this program is the last of ``parts`` that end here: then it sees what all of them stored."""
    is_last = True
    if parts > 1:
        tl.debug_barrier()
        is_last = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
        if is_last:
            tl.store(counter, 0)
    return is_last


@triton.jit
def _shrink(
    index, x, partials, hidden, ready, counters, tile_rows, tile_lens, entries, place, layer, tile, A, factor, num_rows,
    max_rank, x_stride, K,
    TILES, PAGE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The rank intermediates of a tile's rows in one layer, as two numbers of half precision: ``hidden``
    ``[GROUP, 2, num_rows, max_rank]``."""
    split = index % SPLIT
    m, r = tl.arange(0, TILE), tl.arange(0, RANKS)
    entry = entries + (place * TILES + tile) * COLUMNS
    rank = tl.load(entry)
    scaling = tl.load(entry + 1).to(tl.float32, bitcast=True) * factor
    length = tl.load(tile_lens + tile)
    row = tl.load(tile_rows + tile * TILE + m, mask=m < length, other=0)
    is_row = (m < length)[:, None]
    part = tl.cdiv(K, SPLIT * BLOCK_K) * BLOCK_K
    begin = split * part
    end = tl.minimum(begin + part, K)
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    out = partials + ((tile * GROUP + layer) * SPLIT * TILE + m[:, None]).to(tl.int64) * max_rank
    high_at = hidden + ((layer * 2 * num_rows + row) * max_rank)[:, None]
    low_at = high_at + num_rows * max_rank
    if rank > 0:
        for first in range(0, rank, RANKS):
            page = tl.load(entry + 2 + (first + r) // PAGE, mask=first + r < rank, other=0)
            a_rows = A + ((page * PAGE + r % PAGE).to(tl.int64) * K)[None, :]
            a_mask = (first + r < rank)[None, :]
            acc = tl.zeros((TILE, RANKS), tl.float32)
            for k0 in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
                k = k0 + tl.arange(0, BLOCK_K)
                xs = tl.load(x_rows + k[None, :], mask=is_row & (k < end)[None, :], other=0.0)
                a = tl.load(a_rows + k[:, None], mask=a_mask & (k < end)[:, None], other=0.0)
                acc = multiply(xs, a, acc, False)
            if SPLIT > 1:
                tl.store(out + split * TILE * max_rank + (first + r)[None, :], acc, mask=is_row)
            else:
                _store_halves(high_at + (first + r)[None, :], low_at + (first + r)[None, :], acc * scaling, is_row)
        if _arrive(counters + layer * TILES + tile, SPLIT):
            if SPLIT > 1:
                for first in range(0, rank, RANKS):
                    h = tl.zeros((TILE, RANKS), tl.float32)
                    for s in tl.static_range(SPLIT):
                        h += tl.load(out + s * TILE * max_rank + (first + r)[None, :], mask=is_row, other=0.0,
                                     cache_modifier=".cg")  # fmt: skip
                    _store_halves(high_at + (first + r)[None, :], low_at + (first + r)[None, :], h * scaling, is_row)
            tl.debug_barrier()
            tl.atomic_add(ready, 1, sem="release")
    else:
        if split == 0:
            tl.atomic_add(ready, 1, sem="release")


@triton.jit
def _store_halves(high_at, low_at, h, mask):
    high = h.to(high_at.dtype.element_ty)
    tl.store(high_at, high, mask=mask)
    tl.store(low_at, (h - high.to(tl.float32)).to(high.dtype), mask=mask)


@triton.jit
def _product(
    x, weight, first_n, begin, end, num_rows, x_stride, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """``weight @ x.T`` of some inputs, ``[BLOCK_N, BLOCK_M]``: turned, so that few rows are a product's columns."""
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    x_rows = x + m[:, None] * x_stride + k[None, :]
    if not TMA:
        w_rows = weight + (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if TMA:
            w = weight.load([first_n, k0])
        else:
            w = tl.load(w_rows + k0, eviction_policy="evict_first")
        xs = tl.load(x_rows + k0, mask=(m < num_rows)[:, None], other=0.0, eviction_policy="evict_last")
        acc = tl.dot(w, xs.T, acc)
    return acc


@triton.jit
def _who(
    row_tiles, entries, place, num_rows,
    TILES, COLUMNS: tl.constexpr, ROOM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(tiles up to the last one with an adapter in this layer, highest rank, each row's tile and rank)."""
    m, tiles = tl.arange(0, BLOCK_M), tl.arange(0, ROOM)
    ranks = tl.load(entries + (place * TILES + tiles) * COLUMNS, mask=tiles < TILES, other=0)
    own = tl.load(row_tiles + m, mask=m < num_rows, other=-1)
    own_rank = tl.load(entries + (place * TILES + own) * COLUMNS, mask=own >= 0, other=0)
    return tl.max(tl.where(ranks > 0, tiles + 1, 0)), tl.max(ranks), own, own_rank


@triton.jit
def _load_b(
    entries, place, B, t0, used, first, n, width,
    TILES, PAGE: tl.constexpr, COLUMNS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """``[EACH * RANKS, len(n)]``: columns ``n`` of B of some tiles, from rank ``first`` on."""
    c = tl.arange(0, EACH * RANKS)
    t, r = t0 + c // RANKS, first + c % RANKS
    entry = entries + (place * TILES + t) * COLUMNS
    rank = tl.load(entry, mask=t < used, other=0)
    page = tl.load(entry + 2 + r // PAGE, mask=(t < used) & (2 + r // PAGE < COLUMNS), other=0)
    b_row = (page * PAGE + r % PAGE).to(tl.int64) * width
    return tl.load(B + b_row[:, None] + n[None, :], mask=(r < rank)[:, None], other=0.0)


@triton.jit
def _add_b(acc, b, h_rows, low_at, wanted, t0, first, EACH: tl.constexpr):
    """Add the product of the rows' intermediates, where a row is in the tile, and ``b``."""
    c = tl.arange(0, EACH * RANKS)
    mask = wanted[:, None] == (t0 + c // RANKS)[None, :]
    at = h_rows + (first + c % RANKS)[None, :]
    high = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    low = tl.load(at + low_at, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.dot(b.T, low.T, tl.dot(b.T, high.T, acc))


@triton.jit
def _expand(
    acc, ahead, used, highest, own, own_rank, hidden, entries, place, layer, n, width, B, split, num_rows, max_rank,
    TILES, PAGE: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, EACH: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the adapters' parts: columns (tile, rank) of a product whose left side is 0 where a row is not in the tile.

    Parts of a split product share the tiles out. AHEAD: ``ahead`` is the first block of B.
    """
    h_rows = hidden + ((layer * 2 * num_rows + tl.arange(0, BLOCK_M)) * max_rank)[:, None]
    low_at = num_rows * max_rank
    for first in range(0, highest, RANKS):
        # Of a rank that is in work the whole block is there, zeros behind its end, so that a mask by row will do.
        wanted = tl.where(own_rank > first, own, -1)
        begin = split * EACH
        # Nested, because only the outer condition is known when it is compiled.
        if AHEAD:  # noqa: SIM102
            if first == 0:
                acc = _add_b(acc, ahead, h_rows, low_at, wanted, begin, 0, EACH)
                begin += SPLIT * EACH
        for t0 in tl.range(begin, used, SPLIT * EACH, num_stages=STAGES):
            b = _load_b(entries, place, B, t0, used, first, n, width, TILES, PAGE, COLUMNS, EACH)
            acc = _add_b(acc, b, h_rows, low_at, wanted, t0, first, EACH)
    return acc


@triton.jit
def _two_products(
    x, weight, first_n, other_n, K, num_rows, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """``_product`` of all inputs for two blocks of outputs, which share the loads of x."""
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    x_rows = x + m[:, None] * x_stride + k[None, :]
    if not TMA:
        w_rows = weight + (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None] * K + k[None, :]
        other_rows = weight + (other_n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    other = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if TMA:
            w = weight.load([first_n, k0])
            v = weight.load([other_n, k0])
        else:
            w = tl.load(w_rows + k0, eviction_policy="evict_first")
            v = tl.load(other_rows + k0, eviction_policy="evict_first")
        xs = tl.load(x_rows + k0, mask=(m < num_rows)[:, None], other=0.0, eviction_policy="evict_last")
        acc = tl.dot(w, xs.T, acc)
        other = tl.dot(v, xs.T, other)
    return acc, other


@triton.jit(
    do_not_specialize=["num_rows", "place0", "place1", "place2", "factor", "TILES"],
    # Counters of a pass lie side by side, and each alignment would be a kernel of its own.
    do_not_specialize_on_alignment=["ready"],
)
def fused_kernel(
    x, weight, y, sums, counters, num_rows, x_stride, K, N,
    partials, hidden, ready, tile_rows, tile_lens, row_tiles, entries,
    A0, A1, A2, B0, B1, B2, place0, place1, place2, factor, max_rank, TILES,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    PAGE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    ROOM: tl.constexpr, SHRINK_SPLIT: tl.constexpr, SHRINK_K: tl.constexpr, SHRINK_STAGES: tl.constexpr,
    EACH: tl.constexpr, AHEAD: tl.constexpr, EXPAND_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """``y[:num_rows, :N] = x @ weight.T`` and the adapters' parts. GROUP 0: without adapters.

    GATED: of two layers of N0 outputs, y is ``activation(first) * second``, N = N0 columns, and SPLIT is 1.

    K is a multiple of SPLIT * BLOCK_K, the layers' widths N0, N1 and N2 are multiples of BLOCK_N. ``sums``: float32
    ``[N / BLOCK_N, SPLIT, BLOCK_M * BLOCK_N]``; ``counters``: zeros, one for each (layer, tile) and block.
    """
    shrinks = GROUP * TILES * SHRINK_SPLIT
    index = tl.program_id(0)
    if index < shrinks:
        layer = index // SHRINK_SPLIT % max(GROUP, 1)
        _shrink(
            index, x, partials, hidden, ready, counters, tile_rows, tile_lens, entries,
            pick(layer, place0, place1, place2, GROUP), layer, index // (SHRINK_SPLIT * max(GROUP, 1)),
            pick(layer, A0, A1, A2, GROUP), factor, num_rows, max_rank, x_stride, K,
            TILES, PAGE, GROUP, TILE, COLUMNS, SHRINK_SPLIT, SHRINK_K, SHRINK_STAGES,
        )  # fmt: skip
    else:
        split = (index - shrinks) % SPLIT
        block = (index - shrinks) // SPLIT
        if GROUP > 0:
            layer, own_block = 0, block
            if not GATED:
                layer, own_block = layer_of(block, N0 // BLOCK_N, N1 // BLOCK_N, GROUP)
            n = own_block * BLOCK_N + tl.arange(0, BLOCK_N)
            place, B = pick(layer, place0, place1, place2, GROUP), pick(layer, B0, B1, B2, GROUP)
            width = pick(layer, N0, N1, N2, GROUP)
            used, highest, own, own_rank = _who(row_tiles, entries, place, num_rows, TILES, COLUMNS, ROOM, BLOCK_M)
            ahead = n
            if AHEAD:
                ahead = _load_b(
                    entries, place, B, split * EACH, used, 0, n, width, TILES, PAGE, COLUMNS, EACH
                )  # fmt: skip
            if GATED:
                used1, highest1, own, own_rank1 = _who(
                    row_tiles, entries, place1, num_rows, TILES, COLUMNS, ROOM, BLOCK_M
                )  # fmt: skip
                ahead1 = n
                if AHEAD:
                    ahead1 = _load_b(entries, place1, B1, 0, used1, 0, n, width, TILES, PAGE, COLUMNS, EACH)
        if GATED:
            acc, other = _two_products(
                x, weight, block * BLOCK_N, N0 + block * BLOCK_N, K, num_rows, x_stride,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, TMA,
            )  # fmt: skip
        else:
            part = tl.multiple_of(K // SPLIT, BLOCK_K)
            acc = _product(
                x, weight, block * BLOCK_N, split * part, (split + 1) * part, num_rows, x_stride, K,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, TMA,
            )  # fmt: skip
        if GROUP > 0:
            while tl.atomic_add(ready, 0, sem="acquire") < GROUP * TILES:
                pass
            acc = _expand(
                acc, ahead, used, highest, own, own_rank, hidden, entries, place, layer, n, width, B, split, num_rows,
                max_rank, TILES, PAGE, COLUMNS, SPLIT, BLOCK_M, EACH, AHEAD, EXPAND_STAGES,
            )  # fmt: skip
            if GATED:
                other = _expand(
                    other, ahead1, used1, highest1, own, own_rank1, hidden, entries, place1, 1, n, width, B1, 0,
                    num_rows, max_rank, TILES, PAGE, COLUMNS, 1, BLOCK_M, EACH, AHEAD, EXPAND_STAGES,
                )  # fmt: skip
        if GATED:
            acc = gated(acc, other, SILU)
        _finish(acc, y, sums, counters + GROUP * TILES, block, split, num_rows, N, BLOCK_M, BLOCK_N, SPLIT)


@triton.jit
def _finish(
    acc, y, sums, counters, block, split, num_rows, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Store a block of outputs, or a part of it; the last part adds all of them up."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inner = m[None, :] * BLOCK_N + n[:, None]
    outer = m[None, :].to(tl.int64) * N + block * BLOCK_N + n[:, None]
    mask = (m < num_rows)[None, :] & (n >= 0)[:, None]
    if SPLIT > 1:
        mine = sums + block * (SPLIT * BLOCK_M * BLOCK_N) + inner
        tl.store(mine + split * (BLOCK_M * BLOCK_N), acc, mask=mask)
        if _arrive(counters + block, SPLIT):
            total = tl.zeros_like(acc)
            for s in tl.static_range(SPLIT):
                total += tl.load(mine + s * (BLOCK_M * BLOCK_N), mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(y + outer, total.to(y.dtype.element_ty), mask=mask)
    else:
        tl.store(y + outer, acc.to(y.dtype.element_ty), mask=mask)
