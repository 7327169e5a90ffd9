"""Both back ends of paged attention against the plain twin, and the twin against Hugging Face's eager attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels import attention, attention_cpu, reference
from peft_dist.kernels.types import AttentionMetadata
from tests.kernels.cases import BACKENDS, TOLERANCE, assert_close, cache_of, fill_context, metadata, skip_without

DTYPES = tuple(TOLERANCE)


@st.composite
def sequences(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(query tokens, context): decodes, chunks and fresh prompts in one batch."""
    drawn = []
    for _ in range(draw(st.integers(1, 5))):
        query = draw(st.sampled_from((1, 1, 2, 3, 31, 33, 70)))
        drawn.append((query, query + draw(st.sampled_from((0, 0, 1, 15, 64, 90)))))
    return drawn


def both(
    backend: str,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
    seed: int,
    **options: object,
) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
    """(result, the twin's result) after writing the same keys and values through the back end."""
    num_heads, num_kv_heads, head_dim = heads
    meta, num_blocks = metadata(lengths, block_size, seed)
    meta.backend = backend
    generator = torch.Generator().manual_seed(seed)
    cache = cache_of(num_blocks, block_size, (num_kv_heads, head_dim), dtype)
    fill_context(cache, meta, generator)
    query, key, value = (
        # As models hand them over: [heads, tokens, dim] seen through a transpose.
        torch.randn(h, len(meta.slot_mapping), head_dim, generator=generator).to(dtype).transpose(0, 1)
        for h in (num_heads, num_kv_heads, num_kv_heads)
    )
    twin = type(cache)(*(tensor.clone() for tensor in cache))
    attention.write_kv(key, value, cache, meta)
    reference.write_kv(key, value, twin, meta)
    for got, expected in zip(cache, twin, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    got = attention.paged_attention(query, cache, meta, scale=head_dim**-0.5, **options)  # type: ignore[arg-type]
    expected = reference.paged_attention(query, twin, meta, scale=head_dim**-0.5, **options)  # type: ignore[arg-type]
    return got, expected, meta


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    lengths=sequences(),
    heads=st.sampled_from([(1, 1, 16), (4, 4, 8), (9, 3, 64), (6, 1, 33), (8, 2, 80), (2, 1, 128)]),
    block_size=st.sampled_from((1, 3, 16, 64)),
    window=st.sampled_from((None, None, 1, 5, 40, 1000)),
    softcap=st.sampled_from((None, None, 2.0, 50.0)),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_reference(
    backend: str,
    data: st.DataObject,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int],
    block_size: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    seed: int,
) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    skip_without(backend, dtype)
    sinks = torch.randn(heads[0], generator=torch.Generator().manual_seed(seed)) * 3 if with_sinks else None
    got, expected, _ = both(
        backend, lengths, heads, block_size, dtype, seed, sliding_window=window, softcap=softcap, sinks=sinks
    )
    assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[(300, 300), (1, 40)], [(260, 420), (1, 1), (280, 280)]])
def test_long_chunks(backend: str, dtype: torch.dtype, lengths: list[tuple[int, int]]) -> None:
    """Half-precision chunks of this length go to torch from the C back end too."""
    skip_without(backend, dtype)
    got, expected, meta = both(backend, lengths, (6, 2, 32), 16, dtype, seed=5)
    assert_close(got, expected)
    if backend == "c":
        took = meta.scratch["c", dtype != torch.float32].long_chunks  # type: ignore[attr-defined]
        assert took == ([] if dtype == torch.float32 else [s for s, (n, _) in enumerate(lengths) if n >= 256])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_alone_equals_it_in_a_batch(backend: str) -> None:
    """Which other sequences share the call must not matter to the bit (C) or at all (torch pads its decodes)."""
    skip_without(backend, torch.float32)
    generator = torch.Generator().manual_seed(0)
    meta, num_blocks = metadata([(1, 30), (40, 90), (1, 200), (5, 5)], 16)
    meta.backend = backend
    cache = cache_of(num_blocks, 16, (2, 32), torch.float32)
    fill_context(cache, meta, generator)
    query = torch.randn(47, 4, 32, generator=generator)
    together = attention.paged_attention(query, cache, meta, scale=0.2)
    for s in range(4):
        rows = slice(int(meta.query_start_loc[s]), int(meta.query_start_loc[s + 1]))
        arrays = (
            meta.query_start_loc[s : s + 2] - meta.query_start_loc[s],
            meta.context_lens[s : s + 1],
            meta.block_tables[s : s + 1],
            meta.slot_mapping[rows],
        )
        alone = AttentionMetadata(*arrays, *map(torch.from_numpy, arrays), 0, 0, backend=backend)
        result = attention.paged_attention(query[rows], cache, alone, scale=0.2)
        if backend == "c":
            assert torch.equal(result, together[rows])
        else:
            assert_close(result, together[rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_sequence_shows_and_stays_alone(backend: str) -> None:
    skip_without(backend, torch.float32)
    generator = torch.Generator().manual_seed(0)
    meta, num_blocks = metadata([(1, 30), (1, 70), (3, 20)], 16)
    meta.backend = backend
    cache = cache_of(num_blocks, 16, (2, 32), torch.float32)
    fill_context(cache, meta, generator)
    query = torch.randn(5, 4, 32, generator=generator)
    whole = attention.paged_attention(query, cache, meta, scale=0.2)
    cache.key[meta.block_tables[1, 0], 3] = float("nan")
    got = attention.paged_attention(query, cache, meta, scale=0.2)
    assert got[1].isnan().all()
    assert_close(got[[0, 2, 3, 4]], whole[[0, 2, 3, 4]])


def test_window_and_softcap_are_those_of_hugging_face() -> None:
    """The twin's options against the mask and the eager attention that Gemma 2 uses."""
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    from transformers.masking_utils import sliding_window_causal_mask_function

    length, window = 12, 4
    meta, num_blocks = metadata([(length, length)], 4)
    cache = cache_of(num_blocks, 4, (2, 8), torch.float32)
    query, key, value = (torch.randn(length, h, 8) for h in (4, 2, 2))
    reference.write_kv(key, value, cache, meta)
    got = reference.paged_attention(query, cache, meta, scale=0.3, sliding_window=window, softcap=1.5)
    seen = sliding_window_causal_mask_function(window)
    positions = torch.arange(length)
    mask = torch.tensor([[bool(seen(0, 0, q, k)) for k in positions] for q in positions])
    bias = torch.zeros(1, 1, length, length).masked_fill(~mask, float("-inf"))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    expected, _ = gemma.eager_attention_forward(module.eval(), q, k, v, bias, scaling=0.3, softcap=1.5)
    assert_close(got, expected[0])


def test_sizes_that_do_not_fit_are_refused() -> None:
    skip_without("c", torch.float32)
    meta, num_blocks = metadata([(2, 5)], 4)
    cache = cache_of(num_blocks, 4, (2, 8), torch.float32)
    for shape in ((3, 4, 8), (2, 3, 8), (2, 4, 9)):
        with pytest.raises(ValueError, match="does not fit"):
            attention.paged_attention(torch.zeros(shape), cache, meta, scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        attention.write_kv(torch.zeros(3, 2, 8), torch.zeros(3, 2, 8), cache, meta)


def test_items_cover_every_query_token_once() -> None:
    meta, _ = metadata([(1, 4), (100, 130), (32, 32)], 16)
    items = attention_cpu._items(meta, meta.query_start_loc[1:] - meta.query_start_loc[:-1])
    covered = sorted((s, first + i) for s, first, n in items.tolist() for i in range(n))
    assert covered == [(s, i) for s, n in enumerate((1, 100, 32)) for i in range(n)]
