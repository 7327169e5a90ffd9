"""A device that has no memory for more captured steps: whoever needs one is answered all the same, and told once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from peft_dist import LLM, SamplingParams
from peft_dist.runner.step_graphs import StepGraphs
from tests import triton_interpreter
from tests.e2e.test_step_graphs import use_graphs
from tests.oracle import PeftOracle, assert_identical
from tests.tiny_models import make_model, random_adapter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py captures for real")
PROMPTS = [[5, 6], [7, 8, 9], [10], [11, 12]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


class Device:
    """Captures by running again, as long as it has memory."""

    def __init__(self) -> None:
        self.is_full = False
        self.attempts = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.attempts += 1
        run()
        if self.is_full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[LLM, Device, PeftOracle]]:
    triton_interpreter.mend()
    model = make_model("llama", tmp_path / "base")
    adapters = {"a": random_adapter(model, tmp_path / "a", 4, 8.0, ["q_proj", "down_proj"], seed=1)}
    sizes = {"num_blocks": 64, "max_num_seqs": 6, "max_num_batched_tokens": 24, "max_model_len": 64}
    with LLM(
        tmp_path / "base", adapters, device="cpu", dtype="float32", attention_backend="triton", pack_weights=False,
        depth=1, **sizes,
    ) as llm:  # fmt: skip
        device = Device()
        use_graphs(llm, device)
        yield llm, device, PeftOracle(model, adapters)


def graphs_of(llm: LLM) -> StepGraphs:
    graphs = llm._open.runner.graphs
    assert graphs is not None
    return graphs


def answer(llm: LLM, oracle: PeftOracle, names: list[str | None], params: SamplingParams = GREEDY) -> list[list[int]]:
    outputs = llm.generate(PROMPTS[: len(names)], params, names, use_tqdm=False)
    found = [output.outputs[0].token_ids for output in outputs]
    if params is GREEDY:
        for prompt, tokens, name in zip(PROMPTS, found, names, strict=False):
            assert_identical(tokens, oracle.answer(prompt, name, 5), oracle, prompt, name)
    return found


def test_batches_that_find_no_memory_run_operator_by_operator(
    opened: tuple[LLM, Device, PeftOracle], caplog: pytest.LogCaptureFixture
) -> None:
    llm, device, oracle = opened
    device.is_full = True
    drawn = SamplingParams(temperature=0.8, seed=3, max_tokens=5, ignore_eos=True)
    with caplog.at_level(logging.WARNING):
        answer(llm, oracle, ["a", None, "a"])
        attempts = device.attempts
        assert attempts > 0, "nobody tried"
        answer(llm, oracle, ["a", None, "a"])
        sampled = answer(llm, oracle, ["a", None, "a"], drawn)
        assert device.attempts == attempts, "a size that found no memory was tried again"
    told = [message for message in caplog.messages if "no memory to capture" in message]
    assert len(told) == 1 and "--gpu-memory-utilization, --max-num-seqs or --num-blocks" in told[0]
    # Steps with memory find themselves again once what is captured has changed.
    device.is_full = False
    graphs_of(llm).clear()
    answer(llm, oracle, ["a", None, "a"])
    assert device.attempts > attempts and graphs_of(llm)._steps
    assert answer(llm, oracle, ["a", None, "a"], drawn) == sampled


def test_a_size_without_memory_runs_in_a_larger_one_that_is_there(opened: tuple[LLM, Device, PeftOracle]) -> None:
    llm, device, oracle = opened
    answer(llm, oracle, [None] * 4)
    decodes = {variant.shape.rows for variant in graphs_of(llm)._steps if variant.shape.decodes}
    assert decodes == {4}
    device.is_full = True
    for _ in range(8):
        # Four decode steps each, which is soon as often as a size runs in a larger one.
        answer(llm, oracle, [None] * 2)
    # Of one row: nothing of up to twice its tokens is there.
    answer(llm, oracle, [None])
    assert {variant.shape.rows for variant in graphs_of(llm)._steps if variant.shape.decodes} == {4}
    assert device.attempts == len(graphs_of(llm)._steps) + 2, "of two rows and of one, once each"


def test_a_start_without_memory_for_all_steps_keeps_those_it_has(
    opened: tuple[LLM, Device, PeftOracle], caplog: pytest.LogCaptureFixture
) -> None:
    llm, device, oracle = opened
    graphs, capture = graphs_of(llm), graphs_of(llm)._capture

    def three(run: Callable[[], None]) -> Callable[[], None]:
        device.is_full = device.attempts >= 3
        return capture(run)

    graphs._capture = three
    with caplog.at_level(logging.WARNING):
        llm._open.executor.capture()
    assert len(graphs._steps) == 3 and device.attempts == 4 and graphs.gives_up
    assert len(caplog.messages) == 1 and not llm._open.executor.capture_some()
    answer(llm, oracle, ["a", None, "a"])


def test_a_step_that_found_no_memory_teaches_nothing_of_costs(opened: tuple[LLM, Device, PeftOracle]) -> None:
    """It took as long as the capture that failed."""
    llm, device, oracle = opened
    engine, graphs = llm._open.engine, graphs_of(llm)
    device.is_full = True
    steps, known = engine.num_steps, engine.cost.num_steps
    answer(llm, oracle, [None])
    assert graphs.num_awaited > 0
    assert engine.cost.num_steps - known == engine.num_steps - steps - graphs.num_awaited
