"""Every attention back end that a GPU machine has, at real sizes, and those that graphs can hold inside of one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from peft_dist.kernels import attention, attention_backends, reference
from peft_dist.kernels.attention_interface import AttentionBackend, AttentionNeeds
from peft_dist.kernels.capture import CudaCapture
from peft_dist.kernels.types import AttentionMetadata, KVCache
from tests.kernels.cases import metadata
from tests.kernels.device_cases import DEVICES, assert_accurate, attend, batch, expected, on_device, padded_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BACKENDS = ("vllm-flash-attn", "flashinfer", "triton", "torch")
DECODES = [(1, 1), (1, 3000), (1, 33), (1, 128)]
MIXED = [(133, 133), (1, 700), (7, 2000), (2, 2), (1, 129), (512, 1024)]
MANY = [(1, 100 + 3 * i) for i in range(64)]
PROMPT = [(257, 257)]
# (heads of queries and of keys, sizes of keys and values), type, tokens of a KV block.
SHAPES = [
    ((32, 8, 128, 128), torch.bfloat16, 16),
    ((32, 8, 128, 128), torch.float16, 128),
    ((32, 32, 64, 64), torch.bfloat16, 8),
    ((9, 3, 64, 64), torch.float16, 16),
    ((32, 32, 80, 80), torch.bfloat16, 48),
    ((16, 16, 96, 96), torch.bfloat16, 32),
    ((28, 4, 112, 112), torch.bfloat16, 16),
    ((8, 1, 256, 256), torch.bfloat16, 16),
    ((71, 1, 64, 64), torch.bfloat16, 64),
    ((16, 4, 192, 128), torch.bfloat16, 16),
    ((8, 2, 128, 128), torch.float32, 16),
    ((8, 4, 256, 256), torch.float32, 16),
]
OPTIONS = [{"sliding_window": 300}, {"softcap": 30.0}, {"sinks": True}, {"sliding_window": 64, "sinks": True}]
CASES = [
    *((*shape, {}) for shape in SHAPES),
    *((*SHAPES[0], options) for options in OPTIONS),
    (*SHAPES[8], OPTIONS[3]),
    (*SHAPES[10], {"sliding_window": 300, "softcap": 30.0}),
]


def available(name: str, query: torch.Tensor, cache: KVCache, options: dict[str, object]) -> AttentionBackend:
    found = attention_backends.load(name, query.device)
    if isinstance(found, str):
        pytest.skip(found)
    sinks = options.get("sinks")
    needs = AttentionNeeds(
        query.device, query.dtype, cache.key.dtype, query.shape[1], *cache.key.shape[2:], cache.value.shape[3],
        cache.key.shape[1], "sliding_window" in options, "softcap" in options,
        None if sinks is None else sinks.dtype,  # type: ignore[attr-defined]
    )  # fmt: skip
    if reason := found.supports(needs):
        pytest.skip(f"{name} does not take this: {reason}")
    return found


def options_for(options: dict[str, object], heads: tuple[int, ...]) -> dict[str, object]:
    sinks = {"sinks": torch.randn(heads[0], device="cuda").bfloat16()} if options.get("sinks") else {}
    return {"scale": heads[2] ** -0.5} | options | sinks


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lengths", [DECODES, MIXED, MANY, PROMPT], ids=["decodes", "mixed", "many", "prompt"])
@pytest.mark.parametrize(("heads", "dtype", "block_size", "options"), CASES, ids=str)
def test_real_shapes(
    name: str,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int, int],
    dtype: torch.dtype,
    block_size: int,
    options: dict[str, object],
) -> None:
    query, cache, meta = batch(lengths, heads, block_size, dtype, "cuda")
    options = options_for(options, heads)
    backend = available(name, query, cache, options)
    assert_accurate(attend(backend, query, cache, meta, **options), expected(query, cache, meta, **options))


class Captured:
    """One captured step of a layer: keys and values are written, queries attend."""

    def __init__(self, name: str, sizes: tuple[int, int], cache: KVCache, options: dict[str, object]) -> None:
        """``sizes``: (sequences, tokens)."""
        _, num_kv_heads, head_dim = cache.key.shape[1:]
        self.cache, self.sizes = cache, sizes
        self.meta = padded_batch(on_device(metadata([(1, 1)], 16)[0], "cuda"), *sizes, max_context=4096)
        self.meta = dataclasses.replace(self.meta, backend=name, block_tables_t=self.meta.block_tables_t.new_zeros(
            sizes[0], 4096 // cache.key.shape[1]))  # fmt: skip
        self.meta.context_lens_t.zero_()
        self.meta.slot_mapping_t.fill_(-1)
        heads = (4 * num_kv_heads, num_kv_heads, num_kv_heads)
        self.inputs = [torch.zeros(sizes[1], n, head_dim, dtype=cache.key.dtype, device="cuda") for n in heads]
        self.replay_graph = CudaCapture(torch.device("cuda"))(lambda: self.run(options))

    def run(self, options: dict[str, object]) -> None:
        self.meta.scratch.clear()
        query, key, value = self.inputs
        attention.write_kv(key, value, self.cache, self.meta)
        self.out = attention.paged_attention(query, self.cache, self.meta, **options)  # type: ignore[arg-type]

    def replay(self, meta: AttentionMetadata, states: list[torch.Tensor]) -> torch.Tensor:
        """Fill in this batch, padding of the worst kind behind it, and replay."""
        padded = padded_batch(meta, *self.sizes)
        self.meta.query_start_loc_t.copy_(padded.query_start_loc_t)
        self.meta.context_lens_t.copy_(padded.context_lens_t)
        self.meta.block_tables_t.zero_()[:, : padded.block_tables_t.shape[1]] = padded.block_tables_t
        self.meta.slot_mapping_t.copy_(padded.slot_mapping_t)
        for buffer, state in zip(self.inputs, states, strict=True):
            buffer.fill_(float("nan"))[: len(state)] = state
        self.out.fill_(float("nan"))
        self.replay_graph()
        return self.out[: len(states[0])]


def contexts(count: int, least: int, most: int) -> list[int]:
    return [least + (i * 37) % (most - least) for i in range(count)]


DECODE_BATCHES = [
    [(1, n) for n in contexts(64, 1, 1999)],
    [(1, n) for n in contexts(61, 1500, 2000)],
    [(1, 16)],
    [(1, n) for n in contexts(64, 1, 40)],
]
MIXED_BATCHES = [
    [(100, 100), (1, 1999), (7, 1000), (1, 3)],
    [(256, 2000)],
    [(1, n) for n in contexts(16, 100, 1999)],
    [(16, 16)] * 15 + [(1, 700)],
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}, {"sinks": True}], ids=str)
@pytest.mark.parametrize(
    ("sizes", "batches"),
    [((64, 64), DECODE_BATCHES), ((8, 8), [DECODE_BATCHES[2]]), ((1, 1), [[(1, 1999)], [(1, 2)]]),
     ((16, 256), MIXED_BATCHES)],
    ids=["64 decodes", "8 decodes", "1 decode", "mixed"],
)  # fmt: skip
def test_one_graph_serves_every_batch_that_fits(
    name: str, options: dict[str, object], sizes: tuple[int, int], batches: list[list[tuple[int, int]]]
) -> None:
    heads, block_size, dtype = (32, 8, 128, 128), 16, torch.bfloat16
    query, cache, _ = batch([(1, 2000)] * sizes[0], heads, block_size, dtype, "cuda")
    for tensor in cache:
        tensor.normal_()
    options = options_for(options, heads)
    if not available(name, query, cache, options).graph_capturable:
        pytest.skip(f"{name} plans on the host")
    captured = Captured(name, sizes, cache, options)
    generator = torch.Generator("cuda").manual_seed(0)
    for number, lengths in enumerate(batches):
        meta = on_device(metadata(lengths, block_size, seed=number)[0], "cuda")
        tokens = len(meta.slot_mapping)
        states = [torch.randn(tokens, n, 128, device="cuda", generator=generator).to(dtype) for n in (32, 8, 8)]
        wanted = KVCache(*(tensor.clone() for tensor in cache))
        reference.write_kv(states[1], states[2], wanted, meta)
        got = captured.replay(meta, states)
        for written, expected_cache in zip(cache, wanted, strict=True):
            torch.testing.assert_close(written, expected_cache, rtol=0, atol=0)
        assert_accurate(got, expected(states[0], cache, meta, **options))


def test_a_back_end_that_reads_host_memory_cannot_be_captured() -> None:
    query, cache, meta = batch([(1, 20)], (4, 2, 64, 64), 16, torch.bfloat16, "cuda")
    meta.backend = "torch"
    with pytest.raises(RuntimeError, match="'torch' reads host memory"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        attention.paged_attention(query, cache, meta, scale=0.1)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_the_chosen_one_and_layers_that_it_does_not_take(device: str) -> None:
    """Whatever is best here, a layer of any kind is attended to."""
    name = attention_backends.choose(device, torch.bfloat16, [(8, 128)], 16)
    assert name in BACKENDS[:3]
    for heads, options in (((8, 8, 128, 128), {}), ((8, 8, 100, 100), {}), ((8, 8, 320, 320), {"softcap": 20.0})):
        query, cache, meta = batch(MIXED, heads, 16, torch.bfloat16, device)
        meta.backend = name
        got = attention.paged_attention(query, cache, meta, scale=0.1, **options)  # type: ignore[arg-type]
        assert_accurate(got, expected(query, cache, meta, **{"scale": 0.1} | options))
