"""Every attention back end that a GPU machine has, at real sizes, and those that graphs can hold inside of one."""

from __future__ import annotations

import pytest
import torch

from peft_dist.kernels import attention, attention_backends, reference
from peft_dist.kernels.attention_interface import AttentionBackend, AttentionNeeds
from peft_dist.kernels.types import AttentionMetadata, KVCache
from tests.kernels.cases import metadata
from tests.kernels.device_cases import DEVICES, assert_accurate, attend, batch, expected, on_device

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
    """One captured call for ``rows`` decodes: writes keys and values, then attends."""

    def __init__(self, name: str, rows: int, max_context: int, cache: KVCache, options: dict[str, object]) -> None:
        block_size, num_kv_heads, head_dim = cache.key.shape[1:]
        self.num_heads = 4 * num_kv_heads
        self.cache, self.rows = cache, rows
        arrays = (torch.arange(rows + 1), torch.zeros(rows), torch.zeros(rows, max_context // block_size))
        starts, contexts, tables = (a.to("cuda", torch.int32) for a in arrays)
        slots = torch.full((rows,), -1, dtype=torch.int64, device="cuda")
        host = (t.cpu().numpy() for t in (starts, contexts, tables, slots))
        self.meta = AttentionMetadata(*host, starts, contexts, tables, slots, 1, max_context, backend=name)
        shapes = ((self.num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, head_dim))
        self.inputs = [torch.zeros(rows, *shape, dtype=cache.key.dtype, device="cuda") for shape in shapes]
        self.run(options)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        self.meta.scratch.clear()
        with torch.cuda.graph(self.graph):
            self.out = self.run(options)

    def run(self, options: dict[str, object]) -> torch.Tensor:
        query, key, value = self.inputs
        attention.write_kv(key, value, self.cache, self.meta)
        return attention.paged_attention(query, self.cache, self.meta, **options)  # type: ignore[arg-type]

    def replay(self, meta: AttentionMetadata, states: list[torch.Tensor]) -> torch.Tensor:
        """Fill the first rows with this batch, the others with padding of the worst kind, and replay."""
        count = meta.num_seqs
        self.meta.context_lens_t.zero_()
        self.meta.block_tables_t.zero_()
        self.meta.slot_mapping_t.fill_(-1)
        self.meta.context_lens_t[:count] = meta.context_lens_t
        self.meta.block_tables_t[:count, : meta.block_tables_t.shape[1]] = meta.block_tables_t
        self.meta.slot_mapping_t[:count] = meta.slot_mapping_t
        for buffer, state in zip(self.inputs, states, strict=True):
            buffer.fill_(float("nan"))[:count] = state
        self.out.fill_(float("nan"))
        self.graph.replay()
        return self.out[:count]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_one_graph_serves_every_context_and_fewer_rows(name: str, options: dict[str, object], rows: int) -> None:
    heads, block_size, dtype = (32, 8, 128, 128), 16, torch.bfloat16
    query, cache, meta = batch([(1, 2000)] * rows, heads, block_size, dtype, "cuda")
    for tensor in cache:
        tensor.normal_()
    options = options_for(options, heads)
    if not available(name, query, cache, options).graph_capturable:
        pytest.skip(f"{name} plans on the host")
    captured = Captured(name, rows, 4096, cache, options)
    generator = torch.Generator("cuda").manual_seed(0)
    for count, contexts in ((rows, (1, 1999)), (max(1, rows - 3), (1500, 2000)), (1, (16, 17)), (rows, (1, 40))):
        lengths = [(1, contexts[0] + (i * 37) % (contexts[1] - contexts[0])) for i in range(count)]
        meta = on_device(metadata(lengths, block_size, seed=count)[0], "cuda")
        states = [torch.randn(count, n, 128, device="cuda", generator=generator).to(dtype) for n in (32, 8, 8)]
        before = KVCache(*(tensor.clone() for tensor in cache))
        got = captured.replay(meta, states)
        reference.write_kv(states[1], states[2], before, meta)
        for written, wanted in zip(cache, before, strict=True):
            torch.testing.assert_close(written, wanted, rtol=0, atol=0, equal_nan=True)
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
