"""The Triton back end against the plain twin: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import assert_close, metadata
from tests.kernels.device_cases import DEVICES, assert_accurate, attend, batch, expected, padded_batch

pytest.importorskip("triton")
from peft_dist.kernels.attention_interface import AttentionNeeds
from peft_dist.kernels.attention_triton import TritonAttention, _may_have_decodes
from peft_dist.kernels.attention_triton_chunks import ChunkTile
from peft_dist.kernels.attention_triton_decode import DecodeTile
from peft_dist.kernels.attention_triton_schedule import FEWEST_TILES, extra_parts, schedule_decodes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = (ChunkTile(16, 16, 4, 1), DecodeTile(16, 4, 1))


@st.composite
def sequences(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(query tokens, context): decodes, chunks and fresh prompts in one batch."""
    drawn = []
    for _ in range(draw(st.integers(1, 4))):
        query = draw(st.sampled_from((1, 1, 1, 2, 3, 7, 33)))
        drawn.append((query, query + draw(st.sampled_from((0, 0, 1, 15, 64, 90)))))
    return drawn


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=25)
@given(
    lengths=sequences(),
    heads=st.sampled_from(
        [(1, 1, 16, 16), (4, 2, 24, 24), (9, 3, 8, 8), (6, 1, 33, 33), (5, 1, 16, 40), (20, 1, 8, 8)]
    ),
    block_size=st.sampled_from((1, 3, 8, 16, 64)),
    dtype=st.sampled_from(DTYPES),
    splits=st.sampled_from((1, 2, 8)),
    window=st.sampled_from((None, None, 1, 5, 40, 1000)),
    softcap=st.sampled_from((None, None, 2.0, 50.0)),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_reference(
    device: str,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int, int],
    block_size: int,
    dtype: torch.dtype,
    splits: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    seed: int,
) -> None:
    query, cache, meta = batch(lengths, heads, block_size, dtype, device, seed)
    sinks = (torch.randn(heads[0], generator=torch.Generator().manual_seed(seed)) * 3).to(device)
    options = {"sliding_window": window, "softcap": softcap, "sinks": sinks if with_sinks else None}
    got = attend(TritonAttention(*SMALL, splits), query, cache, meta, **options)
    assert_accurate(got, expected(query, cache, meta, **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("lengths", [[(1, 40), (1, 7), (1, 90)], [(3, 40), (1, 7), (18, 90), (1, 50)]], ids=str)
def test_padding_disturbs_nobody(device: str, splits: int, lengths: list[tuple[int, int]]) -> None:
    query, cache, meta = batch(lengths, (4, 2, 16, 16), 8, torch.float32, device)
    padded = padded_batch(meta, rows=7, tokens=7 if meta.max_query_len == 1 else 40)
    wide = torch.full((len(padded.slot_mapping_t), 4, 16), float("nan"), device=device)
    wide[: len(query)] = query
    for options in ({}, {"sinks": torch.zeros(4, device=device)}, {"sliding_window": 9}):
        got = attend(TritonAttention(*SMALL, splits), wide, cache, padded, **options)
        assert_close(got[: len(query)], expected(query, cache, meta, **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [1, 5, 17])
def test_rows_that_see_nothing_of_a_tile_that_others_need(device: str, window: int) -> None:
    query, cache, meta = batch([(33, 60), (33, 33)], (1, 1, 16, 16), 8, torch.float32, device)
    got = attend(TritonAttention(*SMALL), query, cache, meta, sliding_window=window)
    assert_close(got, expected(query, cache, meta, sliding_window=window))


@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_sequence_shows_and_stays_alone(device: str) -> None:
    query, cache, meta = batch([(1, 30), (1, 70), (3, 20)], (4, 2, 16, 16), 16, torch.float32, device)
    backend = TritonAttention(*SMALL, 2)
    whole = attend(backend, query, cache, meta)
    cache.key[int(meta.block_tables[1, 0]), 3] = float("nan")
    got = attend(backend, query, cache, meta)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3, 4]], whole[[0, 2, 3, 4]])


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_that_do_not_fit_are_refused(device: str) -> None:
    _, cache, meta = batch([(2, 5)], (4, 2, 8, 8), 4, torch.float32, device)
    for shape in ((3, 4, 8), (2, 3, 8), (2, 4, 9)):
        with pytest.raises(ValueError, match="does not fit"):
            attend(TritonAttention(), torch.zeros(shape, device=device), cache, meta)


def test_extra_parts_give_each_multiprocessor_two_programs_that_need_not_queue() -> None:
    assert [extra_parts(seqs, 8, 132) for seqs in (1, 16, 32, 40, 47)] == [32, 32, 16, 8, 4]
    assert extra_parts(64, 8, 132) == 32, "they queue anyway"
    assert extra_parts(1, 1, 132) == 64
    assert extra_parts(1, 512, 132) == 1


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.tuples(st.sampled_from((1, 1, 1, 0, 3)), st.integers(0, 3000)), min_size=1, max_size=9),
    splits=st.sampled_from((1, 2, 8, 32)),
    keys=st.sampled_from((16, 64)),
    window=st.sampled_from((None, None, 1, 100)),
)
def test_a_schedule_covers_each_decodes_keys_once(
    device: str, lengths: list[tuple[int, int]], splits: int, keys: int, window: int | None
) -> None:
    queries = np.array([query for query, _ in lengths], np.int32)
    contexts = np.array([context if query else 0 for query, context in lengths], np.int32)
    starts = np.concatenate(([0], np.cumsum(queries))).astype(np.int32)
    meta, _ = metadata([(1, 1)] * len(lengths), 16)
    meta = replace(
        meta,
        query_start_loc_t=torch.from_numpy(starts).to(device),
        context_lens_t=torch.from_numpy(contexts).to(device),
        scratch={},
    )
    items, arrivals = schedule_decodes(meta, 2, splits, keys, window)
    assert len(items) == len(lengths) + splits and not arrivals.any()
    used = items[items[:, 5] > 0].tolist()
    assert items[: len(used), 5].all(), "those that are not used come last"
    longest = 0
    for sequence, (query, context) in enumerate(lengths):
        mine = [item for item in used if item[0] == sequence]
        if query != 1 or not context:
            assert not mine
            continue
        place = max(0, context - window) if window else 0
        for split, (_, token, begin, end, part, parts, *_) in enumerate(mine):
            assert (token, begin, part, parts) == (starts[sequence], place, split, len(mine))
            assert end > begin
            longest = max(longest, end - begin)
            place = end
        assert place == context
        tiles = [-(-(item[3] - item[2]) // keys) for item in mine]
        assert len(mine) == 1 or sum(tiles) > (len(mine) - 1) * FEWEST_TILES
    total = sum(-(-(item[3] - item[2]) // keys) for item in used)
    assert longest <= max(FEWEST_TILES, -(-total // splits)) * keys, "no part is longer than the mean of the extra ones"


def test_only_batches_that_may_hold_decodes_are_searched_for_them() -> None:
    for lengths, may in (
        ([5], False),
        ([5, 5], False),
        ([5, 4], False),
        ([5, 1], True),
        ([1, 5, 5], True),
        ([5, 3, 2], True),
    ):
        meta, _ = metadata([(n, n) for n in lengths], 16)
        assert _may_have_decodes(meta, sum(lengths)) is may, lengths


NEEDS = AttentionNeeds(torch.device("cuda", 0), torch.bfloat16, torch.bfloat16, 32, 8, 128, 128, 16)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"head_dim": 256, "value_dim": 64, "sinks": torch.float32, "window": True, "softcap": True}, None),
        ({"head_dim": 512, "value_dim": 512}, "up to 256"),
        ({"dtype": torch.float64, "cache_dtype": torch.float64}, "float64"),
        ({"cache_dtype": torch.float16}, "float16 cache"),
        ({"device": torch.device("meta")}, "not on meta"),
    ],
)
def test_it_says_what_it_does_not_take(change: dict[str, object], why: str | None) -> None:
    reason = TritonAttention().supports(NEEDS._replace(**change))
    assert (reason is None) if why is None else why in str(reason)
