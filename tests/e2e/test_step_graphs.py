"""Captured steps: fixed memory in, PEFT's answers out, whatever the sizes, modes and steps in flight.

Without a GPU a stand-in runs the captured function again on the same memory, through Triton's interpreter.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path

import pytest
import torch

from peft_dist import LLM, SamplingParams
from peft_dist.kernels import lora_gate_triton, product_bench
from peft_dist.kernels.capture import Capture, NotCapturableError
from peft_dist.kernels.few_rows import FewRows
from peft_dist.kernels.lora_parts_beside import PartsBeside
from peft_dist.kernels.product_plans import ProductPlans
from peft_dist.kernels.products import Products
from peft_dist.patches import fuse
from peft_dist.runner import replica
from peft_dist.runner.step_graphs import StepGraphs
from tests import triton_interpreter
from tests.e2e.test_exactness import NAMES, PROMPTS, make_adapters
from tests.e2e.test_policies import AnyMode
from tests.oracle import PeftOracle, Recorder, assert_close_logits, assert_identical, common_prefix
from tests.tiny_models import make_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py captures for real")
NUM_TOKENS = 3


def run_again(run: Callable[[], None]) -> Callable[[], None]:
    """The stand-in for a capture."""
    run()
    return run


def count_gates(monkeypatch: pytest.MonkeyPatch) -> Counter[float]:
    """How often an activation added adapters' parts, by the plan's factor."""
    seen: Counter[float] = Counter()
    expand = lora_gate_triton.lora_expand_gate

    def counted(gate, up, weights, plan, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen[plan.factor] += 1
        return expand(gate, up, weights, plan, *args, **kwargs)

    monkeypatch.setattr(lora_gate_triton, "lora_expand_gate", counted)
    return seen


def use_graphs(
    llm: LLM,
    capture: Capture = run_again,
    few_rows: FewRows | None = None,
    parts_beside: PartsBeside | None = None,
    products: Products | None = None,
) -> Counter[str]:
    """Let an LLM on a CPU run captured steps; counts them by kind."""
    runner = llm._open.runner
    runner.lora_backend = "triton"
    runner.graphs = graphs = StepGraphs(
        runner.model,
        runner.kv,
        runner.store.pool,
        runner.drawn,
        runner.merge,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        max_blocks=-(-llm.model_info.max_model_len // runner.kv.block_size),
        attention_backend="triton",
        lora_backend="triton",
        capture=capture,
        few_rows=few_rows,
        parts_beside=parts_beside,
        products=products,
        merges_prompts=llm._open.config.policy == "merge",
    )
    seen: Counter[str] = Counter()
    run = graphs.run

    def counted(batch, shape, find_draw, first):  # type: ignore[no-untyped-def]
        seen["decodes" if shape.decodes else "mixed"] += 1
        seen["corrected"] += batch.merged_slot >= 0 and len({s.adapter_slot for s in batch.sequences}) > 1
        seen["pending"] += any(s.token_ids == [-1] for s in batch.sequences)
        return run(batch, shape, find_draw, first)

    graphs.run = counted  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(
    ("depth", "modes", "count", "fused"),
    [
        pytest.param(1, True, 4, False, marks=pytest.mark.slow),
        (1, True, 2, True),
        *(
            pytest.param(depth, modes, 8, fused, marks=pytest.mark.slow)
            for depth, modes, fused in ((0, False, False), (1, False, True), (1, True, False), (1, True, True))
        ),
    ],
)
def test_tokens_are_pefts(
    depth: int, modes: bool, count: int, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``fused``: as on a GPU, where an MLP's activation adds the adapters' parts; with the other kernels' twins."""
    triton_interpreter.mend()
    gates = count_gates(monkeypatch)
    if fused:
        monkeypatch.setattr(replica, "prepare_layers", lambda model, config: fuse(model, "reference"))
    model = make_model("llama", tmp_path / "base")
    adapters = make_adapters("llama", model, tmp_path)
    oracle = PeftOracle(model, adapters)
    with LLM(
        tmp_path / "base",
        adapters,
        device="cpu",
        dtype="float32",
        depth=depth,
        num_blocks=64,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        attention_backend="triton",
        pack_weights=False,
        max_model_len=64,
    ) as llm:
        # Adapters are there from the first step on, whatever their loads take: else chance says what modes there are.
        llm.generate(PROMPTS[:count], SamplingParams(max_tokens=1), NAMES[:count], use_tqdm=False)
        gates.clear()
        seen = use_graphs(llm)
        recorder = Recorder(llm)
        if modes:
            llm._open.engine.scheduler.policy = AnyMode(5)
        greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate(PROMPTS[:count], greedy, NAMES[:count], use_tqdm=False)
        drawn = [SamplingParams(temperature=0.8, seed=i, max_tokens=2, ignore_eos=True) for i in range(count // 2)]
        asked = PROMPTS[: count // 2], drawn, NAMES[: count // 2]
        captured = [output.outputs[0].token_ids for output in llm.generate(*asked, use_tqdm=False)]
        in_graphs = gates.total()
        llm._open.runner.graphs = None
        plain = [output.outputs[0].token_ids for output in llm.generate(*asked, use_tqdm=False)]
    for output, prompt, name in zip(outputs, PROMPTS, NAMES, strict=False):
        adapter = None if name == "__base__" else name
        answer = oracle.answer(prompt, adapter, NUM_TOKENS)
        tokens = output.outputs[0].token_ids
        assert_identical(tokens, answer, oracle, prompt, adapter)
        same = common_prefix(tokens, answer.tokens)
        assert_close_logits(recorder.logits[output.request_id], answer, min(same + 1, NUM_TOKENS))
    assert captured == plain
    # Added alone, and behind what is taken away; without captured steps too.
    assert (0 < in_graphs < gates.total()) == fused
    assert set(gates) == ({1.0, -1.0} if fused and modes else {1.0} if fused else set())
    assert (
        seen["decodes"] and seen["mixed"] and bool(seen["pending"]) == bool(depth) and bool(seen["corrected"]) == modes
    )


class Beside(PartsBeside):
    """Knows how many layers' parts it left to others."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.groups: Counter[int] = Counter()

    def compute(self, x, weights, plan, multiply, spared=None):  # type: ignore[no-untyped-def]
        self.groups[len(weights)] += 1
        return super().compute(x, weights, plan, multiply, spared)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "beside_all"),
    [("llama", True), ("gemma2", False)],
)
def test_parts_that_norms_gates_and_rotations_add_are_pefts(
    family: str, beside_all: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a norm stands between a projection and the sum, its adapters' part is added at once."""
    triton_interpreter.mend()
    monkeypatch.setattr(replica, "prepare_layers", lambda model, config: fuse(model, "reference"))
    monkeypatch.setattr(product_bench, "LAYERS", 1)
    monkeypatch.setattr(product_bench, "_COLD_BYTES", 1)
    monkeypatch.setattr(product_bench, "_READ", math.inf)
    model = make_model(family, tmp_path / "base")
    adapters = make_adapters(family, model, tmp_path)
    oracle = PeftOracle(model, adapters)
    options = {"num_blocks": 64, "max_num_seqs": 6, "max_num_batched_tokens": 24, "attention_backend": "triton"}
    options |= {"pack_weights": False, "max_model_len": 64, "merge": "off"}
    chosen = [NAMES.index("__base__"), *(i for i, name in enumerate(NAMES) if name != "__base__")][:3]
    prompts, names = [PROMPTS[i] for i in chosen], [NAMES[i] for i in chosen]
    with LLM(tmp_path / "base", adapters, device="cpu", dtype="float32", **options) as llm:
        beside = Beside()
        # Each way runs when it is timed; the later, the faster: parts go beside.
        times = (0.9**i for i in count())
        products = Products(ProductPlans(), None, beside, lambda run: (run(), next(times))[1], spared=(0, 8))
        seen = use_graphs(llm, parts_beside=beside, products=products)
        greedy = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        # A pool that grows has room when adapters have come.
        llm.generate(prompts, greedy, names, use_tqdm=False)
        graphs = llm._open.runner.graphs
        assert graphs is not None
        graphs.close()
        graphs.capture(lora=True)
        measured, beside.groups = beside.groups, Counter()
        seen.clear()
        recorder = Recorder(llm)
        outputs = llm.generate(prompts, greedy, names, use_tqdm=False)
    for output, prompt, name in zip(outputs, prompts, names, strict=True):
        adapter = None if name == "__base__" else name
        answer = oracle.answer(prompt, adapter, 3)
        tokens = output.outputs[0].token_ids
        assert_identical(tokens, answer, oracle, prompt, adapter)
        same = common_prefix(tokens, answer.tokens)
        assert_close_logits(recorder.logits[output.request_id], answer, min(same + 1, 3))
    assert seen["decodes"] and seen["mixed"] and all(measured[n] > beside.groups[n] for n in (1, 2, 3))
    # q/k/v, gate and up; o and down.
    assert beside.groups[3] and beside.groups[2] == beside.groups[3]
    assert beside.groups[1] == (2 * beside.groups[3] if beside_all else 0)


class Asked(FewRows):
    """Computes nothing, and knows what it was asked."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.products: Counter[int] = Counter()
        self.added: Counter[tuple[int, int]] = Counter()

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, activation: str | None = None) -> None:
        self.products[x.numel() // x.shape[-1]] += 1

    def add_lora(self, x, weight, weights, plan, activation=None):  # type: ignore[no-untyped-def]
        assert plan.num_rows == x.numel() // x.shape[-1] and sum(w.B.shape[1] for w in weights) == len(weight)
        self.added[plan.num_rows, len(weights)] += 1


@pytest.mark.slow
def test_decode_steps_ask_for_products_of_few_rows(tmp_path: Path) -> None:
    """With adapters inside where all of a step's are finite; with prompts in it a step is as before."""
    triton_interpreter.mend()
    made = make_adapters("llama", make_model("llama", tmp_path / "base"), tmp_path)
    adapters = dict([next(iter(made.items()))])
    options = {"num_blocks": 8, "max_num_seqs": 2, "max_num_batched_tokens": 8, "attention_backend": "triton"}
    options |= {"merge": "off", "pack_weights": False, "max_model_len": 32, "depth": 0}
    greedy = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    with LLM(tmp_path / "base", adapters, device="cpu", dtype="float32", **options) as llm:
        asked = Asked()
        use_graphs(llm, few_rows=asked)
        llm.generate([[5]], greedy, use_tqdm=False)
        assert asked.products.keys() == {1} and not asked.added
        name = next(iter(adapters))
        llm.generate([[5]], greedy, [name], use_tqdm=False)
        assert {rows for rows, _ in asked.added} == {1}
        before = asked.added.total()
        pool = llm._open.runner.store.pool
        for slot in list(pool._resident):
            pool._resident[slot].finite = False
        llm.generate([[5]], greedy, [name], use_tqdm=False)
        assert asked.added.total() == before


def test_logits_of_all_captured_steps_are_in_one_memory(tmp_path: Path) -> None:
    """Each step's own stayed as long as its graph: 6 GB for the steps of an 8B Llama with adapters."""
    triton_interpreter.mend()
    make_model("llama", tmp_path / "base")
    options = {"num_blocks": 16, "max_num_seqs": 6, "max_num_batched_tokens": 24, "attention_backend": "triton"}
    sampled = SamplingParams(temperature=1.0, seed=3, max_tokens=2, logprobs=1, ignore_eos=True)
    with LLM(tmp_path / "base", device="cpu", dtype="float32", max_model_len=64, **options) as llm:
        plain = [llm.generate(prompts, sampled, use_tqdm=False) for prompts in ([[5, 6]], [[5, 6], [7]])]
        use_graphs(llm)
        captured = [llm.generate(prompts, sampled, use_tqdm=False) for prompts in ([[5, 6]], [[5, 6], [7]])]
        assert llm._open.runner.graphs is not None
        logits = [step.logits for step in llm._open.runner.graphs._steps.values()]
    assert {len(rows) for rows in logits} == {1, 2, 6}
    assert len({rows.untyped_storage().data_ptr() for rows in logits}) == 1
    for one, other in zip(chain(*plain), chain(*captured), strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_no_captured_step_outlives_its_model(tmp_path: Path) -> None:
    """NCCL waited for ever at the end of two ranks whose captured steps were still there."""
    triton_interpreter.mend()
    make_model("llama", tmp_path / "base")
    captured: list[weakref.ref[Callable[[], None]]] = []

    def noted(run: Callable[[], None]) -> Callable[[], None]:
        captured.append(weakref.ref(run))
        return run_again(run)

    options = {"num_blocks": 16, "max_num_seqs": 6, "max_num_batched_tokens": 24, "attention_backend": "triton"}
    with LLM(tmp_path / "base", device="cpu", dtype="float32", max_model_len=64, **options) as llm:
        use_graphs(llm, noted)
        executor = llm._open.executor
        llm.generate([[5, 6]], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True), use_tqdm=False)
        assert all(step() is not None for step in captured)
    # Without the collector's help: while the model is still held, as by a rank that is about to leave.
    assert executor.runner.graphs is not None and len(captured) == 2
    assert all(step() is None for step in captured)


def test_a_model_that_waits_for_the_device_runs_without_captures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: Callable[[], None]) -> Callable[[], None]:
        raise NotCapturableError("the model waits for the device (moe.py:7)")

    model = make_model("llama", tmp_path / "base")
    with LLM(tmp_path / "base", device="cpu", num_blocks=64, pack_weights=False, max_model_len=64) as llm:
        use_graphs(llm, refuse)
        llm._open.warm_up()
        assert llm._open.runner.graphs is None
        assert "operator by operator: the model waits for the device (moe.py:7)" in caplog.text
        greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        [output] = llm.generate(PROMPTS[:1], greedy, use_tqdm=False)
    oracle = PeftOracle(model, {})
    assert_identical(output.outputs[0].token_ids, oracle.answer(PROMPTS[0], None, NUM_TOKENS), oracle, PROMPTS[0], None)
