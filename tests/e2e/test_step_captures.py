"""When steps are captured: ahead, when there is no work, and when they come often."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dist import LLM, SamplingParams
from peft_dist.kernels.product_plans import ProductPlans
from peft_dist.kernels.products import Products
from peft_dist.patches.merged_layers import MergedLayers
from peft_dist.runner import step_graphs
from peft_dist.runner.step_graphs import StepGraphs
from peft_dist.runner.step_variants import CapturedStep, Variant, decode_sizes, mixed_sizes
from peft_dist.runner.warm_up import KernelWarmUp
from tests import triton_interpreter
from tests.e2e.test_step_graphs import use_graphs
from tests.oracle import PeftOracle, assert_identical
from tests.tiny_models import FAMILIES, make_model, random_adapter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py captures for real")


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[tuple[LLM, Path]]:
    """A small model, and an adapter of one of its layers that is not loaded yet."""
    model = make_model("llama", folder / "base")
    adapter = random_adapter(model, folder / "a", 4, 8.0, ["q_proj"], seed=1)
    sizes = {"num_blocks": 8, "max_num_seqs": 6, "max_num_batched_tokens": 24, "max_model_len": 64}
    usual = {"device": "cpu", "dtype": "float32", "attention_backend": "triton", **sizes}
    with LLM(folder / "base", **{**usual, **options}) as llm:
        yield llm, adapter


@pytest.mark.parametrize("merge", ["off", "shadow"])
def test_steps_that_adapters_need_are_captured_when_there_is_no_work(
    merge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time, and none is left for a request to wait for; again when adapters target further layers."""
    monkeypatch.setattr(KernelWarmUp, "begin", lambda self: None)

    def full(run: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("no memory")

    captured: list[Callable[[], None]] = []

    def noted(run: Callable[[], None]) -> Callable[[], None]:
        captured.append(run)
        return run

    with opened(tmp_path, merge=merge) as (llm, adapter):
        use_graphs(llm, noted)
        replica = llm._open
        graphs = replica.runner.graphs
        assert graphs is not None and not replica.warm_up_some(), "nobody needs them"
        llm.load_adapter(adapter, "a")
        decodes, mixed = len(decode_sizes(6)), len(mixed_sizes(6, 24))
        shapes, sizes = {*graphs._decodes, *graphs._mixed}, decodes + mixed
        for count in range(1, sizes + 1):
            assert replica.warm_up_some() and len(captured) == count
        variants = set(graphs._steps)
        assert {variant.shape for variant in variants} == shapes
        assert all(variant.lora and variant.merged is None for variant in variants)
        if merge == "shadow":
            # Of the merged adapter alone, and decodes in which others join it.
            while replica.warm_up_some():
                sizes += 1
            found = [variant for variant in graphs._steps if variant.merged is not None]
            assert {variant.shape for variant in found if not variant.corrected} == shapes
            assert {variant.shape for variant in found if variant.corrected} == {*graphs._decodes}
            assert len(found) == sizes - decodes - mixed == 2 * decodes + mixed
        assert not replica.warm_up_some() and len(captured) == sizes
        llm.load_adapter(random_adapter(FAMILIES["llama"](), tmp_path / "b", 4, 8.0, ["o_proj"], seed=2), "b")
        assert replica.warm_up_some() and len(captured) == sizes + 1
        # What came before it was measured is captured again.
        while replica.warm_up_some():
            pass
        graphs._products = Products(ProductPlans(), None, None, lambda run: 1.0)
        variant = next(iter(graphs._steps))
        del graphs._steps[variant]
        graphs._step(variant, None)
        before, count = graphs._steps[variant], len(captured)
        assert replica.warm_up_some() and len(captured) == count + 1 and graphs._steps[variant] is not before
        assert not replica.warm_up_some()
        # Without memory it stops, and the replica goes on.
        del graphs._steps[variant]
        graphs._capture = full
        assert not replica.warm_up_some() and not graphs.lacks_steps


def test_steps_are_captured_again_for_ranks_that_they_were_not_made_for(tmp_path: Path) -> None:
    """They would be right, but slow: launches go by the highest rank so far, in a few steps; decodes of adapters that
    all have few go on by themselves."""
    captured: list[Callable[[], None]] = []

    def noted(run: Callable[[], None]) -> Callable[[], None]:
        captured.append(run)
        return run

    with opened(tmp_path, merge="off") as (llm, _):
        use_graphs(llm, noted)
        replica = llm._open
        graphs, model = replica.runner.graphs, FAMILIES["llama"]()
        assert graphs is not None
        counts = []
        for rank in (4, 16, 20, 32, 8):
            folder = random_adapter(model, tmp_path / f"rank-{rank}", rank, 8.0, ["q_proj"], seed=rank)
            llm.load_adapter(folder, f"rank-{rank}")
            assert graphs.lacks_steps == (rank in (4, 20)), rank
            while replica.warm_up_some():
                pass
            counts.append(len(captured))
        assert counts == [counts[0]] * 2 + [2 * counts[0] + len(decode_sizes(6))] * 3


def test_few_ranks_beside_a_resident_adapter_of_many_have_launches_of_their_own(tmp_path: Path) -> None:
    """What rank 4 costs does not grow because an adapter of rank 40 is resident; PEFT's answers in all of them."""
    triton_interpreter.mend()
    model = make_model("llama", tmp_path / "base")
    folders = {
        f"rank-{rank}": random_adapter(model, tmp_path / f"rank-{rank}", rank, 8.0, ["q_proj", "down_proj"], seed=rank)
        for rank in (4, 40)
    }
    prompts, names = [[5, 6], [7, 8, 9], [10]], ["rank-4", None, "rank-4"]
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    options = {"num_blocks": 64, "max_num_seqs": 6, "max_num_batched_tokens": 24, "attention_backend": "triton"}
    found = {}
    with LLM(
        tmp_path / "base", folders, device="cpu", dtype="float32", max_model_len=64, merge="off", **options
    ) as llm:
        llm.generate(prompts, SamplingParams(max_tokens=1), ["rank-40", *names[1:]], use_tqdm=False)
        use_graphs(llm)
        graphs = llm._open.runner.graphs
        assert graphs is not None
        made: dict[bool, set[int]] = {True: set(), False: set()}
        build, launched = graphs._build, watch_ranks(graphs)

        def noted(variant: Variant, merged: MergedLayers | None) -> CapturedStep:
            built = build(variant, merged)
            made[variant.few_ranks].add(launched[-1])
            return built

        graphs._build = noted  # type: ignore[method-assign]
        # Nothing is captured for few ranks while somebody waits.
        found["waiting"] = llm.generate(prompts, greedy, names, use_tqdm=False)
        assert not any(variant.few_ranks for variant in graphs._steps)
        while llm._open.warm_up_some():
            pass
        assert made == {True: {16}, False: {64}}
        ran: list[bool] = []
        stand_in = graphs._stand_in

        def watched(variant: Variant) -> Variant:
            ran.append((chosen := stand_in(variant)).few_ranks)
            return chosen

        graphs._stand_in = watched  # type: ignore[method-assign]
        found["alone"] = llm.generate(prompts, greedy, names, use_tqdm=False)
        assert ran[-3:] == [True] * 3
        found["beside"] = llm.generate(prompts, greedy, ["rank-4", "rank-40", "rank-4"], use_tqdm=False)
        assert ran[-3:] == [False] * 3
    oracle = PeftOracle(model, folders)
    for kind, outputs in found.items():
        for prompt, name, output in zip(
            prompts, ["rank-4", "rank-40" if kind == "beside" else None, "rank-4"], outputs, strict=True
        ):
            assert_identical(output.outputs[0].token_ids, oracle.answer(prompt, name, 4), oracle, prompt, name)


def watch_ranks(graphs: StepGraphs) -> list[int]:
    """What launches are made for while each step is captured."""
    seen: list[int] = []
    capture = graphs._capture

    def watched(run: Callable[[], None]) -> Callable[[], None]:
        seen.append(graphs._pool.workspace.ranks)
        return capture(run)

    graphs._capture = watched
    return seen


def test_a_size_that_is_not_there_runs_in_a_larger_one_until_it_comes_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured at once, it makes everybody wait; up to twice its rows cost little more."""
    triton_interpreter.mend()
    monkeypatch.setattr(step_graphs, "_STAND_INS", 5)
    model = make_model("llama", tmp_path / "base")
    # All of them fit into one step.
    prompts = [[5, 6], [7, 8, 9], [10], [11, 12]]
    greedy = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    options = {"num_blocks": 64, "max_num_seqs": 6, "max_num_batched_tokens": 24, "attention_backend": "triton"}
    with LLM(tmp_path / "base", device="cpu", dtype="float32", max_model_len=64, **options) as llm:
        use_graphs(llm)
        graphs = llm._open.runner.graphs
        assert graphs is not None

        def sizes() -> set[int]:
            return {variant.shape.rows for variant in graphs._steps if variant.shape.decodes}

        def answers(count: int) -> list[list[int]]:
            outputs = llm.generate(prompts[:count], greedy, use_tqdm=False)
            return [output.outputs[0].token_ids for output in outputs]

        answers(4)
        assert sizes() == {4}
        # A decode step for each token but the first.
        found = answers(2)
        assert sizes() == {4}, "one of two rows was captured though there is one of four"
        answers(1)
        assert sizes() == {1, 4}, "one of four rows is too much for one"
        answers(2)
        assert sizes() == {1, 2, 4}
    oracle = PeftOracle(model, {})
    for prompt, tokens in zip(prompts[:2], found, strict=True):
        assert_identical(tokens, oracle.answer(prompt, None, 5), oracle, prompt, None)


@pytest.mark.parametrize(("policy", "with_prompts"), [("merge", True), ("credit", False)])
def test_steps_that_a_policy_merges_are_captured_ahead(policy: str, with_prompts: bool, tmp_path: Path) -> None:
    """Each that is not makes somebody wait who needs it first: 0.4 s of a model of 80 layers."""
    with opened(tmp_path, merge="shadow", policy=policy) as (llm, adapter):
        use_graphs(llm, lambda run: run)
        graphs = llm._open.runner.graphs
        assert graphs is not None
        llm.load_adapter(adapter, "a")
        graphs.capture(lora=True)
        merged = {variant.shape for variant in graphs._steps if variant.merged is not None}
        assert merged == {*graphs._decodes, *(graphs._mixed if with_prompts else ())}


@pytest.mark.parametrize("policy", ["merge", "credit"])
def test_a_server_that_only_merges_captures_merged_steps_when_there_is_no_work(policy: str, tmp_path: Path) -> None:
    """It starts before its adapters are there, so nothing else makes them ahead; it runs no others."""
    with opened(tmp_path, merge="shadow", policy=policy) as (llm, adapter):
        use_graphs(llm, lambda run: run)
        replica = llm._open
        graphs = replica.runner.graphs
        assert graphs is not None
        llm.load_adapter(adapter, "a")
        replica.kernels._todo.clear()
        while replica.warm_up_some():
            pass
        merged = {variant.shape for variant in graphs._steps if variant.merged is not None}
        assert merged == {*graphs._decodes, *graphs._mixed}
        assert any(variant.lora and variant.merged is None for variant in graphs._steps) == (policy == "credit")


def test_steps_of_merged_weights_that_have_grown_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch asks for them again, and their memory is what those of all layers need."""
    monkeypatch.setattr(KernelWarmUp, "begin", lambda self: None)
    with opened(tmp_path, merge="shadow") as (llm, adapter):
        use_graphs(llm, lambda run: run)
        replica, layers = llm._open, MergedLayers()
        graphs = replica.runner.graphs
        assert graphs is not None
        monkeypatch.setattr(replica.runner.merge, "layers_for_capture", lambda: layers)
        llm.load_adapter(adapter, "a")
        while replica.warm_up_some():
            pass
        before = {variant for variant in graphs._steps if variant.merged == layers.key}
        layers.twins[torch.nn.Linear(1, 1)] = torch.nn.Linear(1, 1)
        while replica.warm_up_some():
            pass
        found = {variant for variant in graphs._steps if variant.merged is not None}
        assert found == {variant._replace(merged=layers.key) for variant in before}


def test_what_could_not_be_measured_ahead_is_not_captured_again(tmp_path: Path) -> None:
    """One rank may lack the memory alone: it has to go on with the steps that the others go on with."""
    plans = ProductPlans()

    def without_memory(run: Callable[[], None]) -> Callable[[], None]:
        plans.stop_measuring()
        return run

    with opened(tmp_path, merge="off") as (llm, adapter):
        use_graphs(llm, without_memory, products=Products(plans, None, None, lambda run: 1.0))
        graphs = llm._open.runner.graphs
        assert graphs is not None
        llm.load_adapter(adapter, "a")
        graphs.capture(lora=True)
        assert not graphs.lacks_steps


def test_sizes_cover_every_batch_with_little_padding() -> None:
    sizes = decode_sizes(256)
    assert sizes[0] == 1 and sizes[-1] == 256
    for smaller, larger in itertools.pairwise(sizes):
        assert larger - smaller <= max(4, larger // 8)
    assert decode_sizes(5) == [1, 2, 3, 4, 5]
    mixed = mixed_sizes(256, 8192)
    assert max(mixed) == (2048, 256) and all(tokens != rows for tokens, rows in mixed)
    assert mixed_sizes(4, 24) == [(24, 4)]


def test_a_step_that_waited_for_its_capture_teaches_nothing_of_costs(tmp_path: Path) -> None:
    triton_interpreter.mend()
    with opened(tmp_path, pack_weights=False, depth=1) as (llm, _):
        use_graphs(llm)
        replica = llm._open
        graphs, engine = replica.runner.graphs, replica.engine
        assert graphs is not None
        learnt = []
        for _ in range(2):
            steps, known, awaited = engine.num_steps, engine.cost.num_steps, graphs.num_awaited
            llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), use_tqdm=False)
            learnt.append((engine.num_steps - steps, engine.cost.num_steps - known, graphs.num_awaited - awaited))
        [(ran, told, captured), (again, told_again, none)] = learnt
        assert captured > 0 and told == ran - captured and (told_again, none) == (again, 0)
