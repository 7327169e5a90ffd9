"""Cases of the benchmark of captured LoRA steps: what each changes, and what is measured within the time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench import bench_lora_steps as bench
from bench.bench_lora_steps import PLANS, Case, Steps, cases_of, choose, choose_fused, group_of, measure
from bench.gpu_workload import read_lines

from peft_dist.kernels import lora_plans
from peft_dist.kernels.few_rows import FewRows
from peft_dist.kernels.lora_fused_plans import FusedPlan
from peft_dist.kernels.lora_plans import GroupShape, default_plan, plan_for
from peft_dist.runner import step_plans
from peft_dist.runner.step_buffer import PlanBuffers, StepShape, TileBuffers
from peft_dist.runner.step_variants import Variant

SHAPES = {
    "qkv": GroupShape(16, 64, 4096, (4096, 1024, 1024)),
    "gate": GroupShape(16, 64, 4096, (14336, 14336)),
    "o": GroupShape(16, 64, 4096, (4096,)),
    "down": GroupShape(16, 64, 14336, (4096,)),
}
SCRIPT = Path(bench.__file__)
DECODES, MIXED = (Variant(StepShape(tokens, 8, 4, 4), True, False, None) for tokens in (8, 64))


def test_a_plans_case_changes_the_decodes_of_its_layers_alone() -> None:
    assert {group_of(shape) for shape in SHAPES.values()} == set(SHAPES)
    for part in PLANS:
        *cases, last = cases_of(part)
        assert last.change is None and len({case.name for case in cases}) == len(cases)
        changed = set()
        for case in cases:
            for group, shape in SHAPES.items():
                plan = choose(case, shape)
                changed |= {case.name} if plan != default_plan(shape) else set()
                assert group == case.group or plan == default_plan(shape)
                assert plan.block_k >= 16 and plan.split * plan.block_k < shape.in_features + plan.block_k
                assert plan.loop_n % (2 * plan.loop_part) == plan.gate_loop_n % (2 * plan.loop_part) == 0
            assert choose(case, SHAPES[case.group]._replace(tile_rows=64)).shrink_r == 64
        # The default has two warps already, and a part for each block of these.
        usual = {*(f"{group}: 2 warps" for group in SHAPES), "gate: twice the parts", "o: twice the parts"}
        assert {case.name for case in cases} - changed <= usual


def test_ranks_are_tried_with_both_plans_in_every_way_of_a_product() -> None:
    cases = list(cases_of("ranks"))
    assert {(case.way, case.low) for case in cases if case.change is None} >= {
        (way, low) for way in bench.WAYS for low in (False, True)
    }
    for group, shape in SHAPES.items():
        for ranks in (64, 128):
            high = shape._replace(ranks=ranks)
            for case in cases:
                plan = choose(case, high)
                if case.low:
                    assert plan == default_plan(shape), "as before plans went by ranks"
                elif case.change is None:
                    assert plan == default_plan(high)
                assert plan.loop_n % (2 * plan.loop_part) == plan.gate_loop_n % (2 * plan.loop_part) == 0
                assert plan.split * plan.block_k < shape.in_features + plan.block_k, (group, case.name)
    high_shapes = [shape._replace(ranks=ranks) for shape in SHAPES.values() for ranks in (64, 128)]
    changed = {case.name for case in cases for s in high_shapes if case.change and choose(case, s) != default_plan(s)}
    assert changed == {*bench.RANK_PLANS}


def test_one_way_leaves_products_without_adapters_alone() -> None:
    found = bench.OneWay(SimpleNamespace(alone=lambda x: x + 1, adapted=None), bench.ProductPlan("behind"))
    assert found.alone(1) == 2 and found.adapted("x", few=True) == ("behind", 0)


def test_switches_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graphs:
        _few_rows: FewRows | None = FewRows("cpu")
        _products: object = "of the engine"
        _steps: dict[Any, object]

    monkeypatch.setattr(lora_plans, "_find_plan", lora_plans._find_plan)
    monkeypatch.setattr(step_plans, "make_plan", step_plans.make_plan)
    tiles = TileBuffers(*(torch.zeros(16, dtype=torch.int32) for _ in range(3)))
    buffers = PlanBuffers(tiles, tiles)
    workspace = SimpleNamespace(stream="of the pool")
    graphs: Any = Graphs()
    store = SimpleNamespace(pool=SimpleNamespace(workspace=workspace))
    runner = SimpleNamespace(graphs=graphs, store=store)
    steps = Steps(SimpleNamespace(_open=SimpleNamespace(runner=runner), adapters=()), Namespace(apart=False))
    for case in (*cases_of("streams"), *cases_of("lookup"), *cases_of("gate")):
        graphs._steps = dict.fromkeys((DECODES, MIXED))
        steps.take(case)
        assert list(graphs._steps) == [MIXED]
        # What a step that is captured now goes by.
        added, _ = step_plans.plans_of(DECODES, [None], "triton", buffers, 3)  # type: ignore[list-item]
        assert added is not None and bool(added.layers) == case.lookup and added.num_rows == 3
        assert (workspace.stream == "of the pool") == (case.stream == "first")
        assert plan_for(SHAPES["gate"], "a card") == choose(case, SHAPES["gate"])
    *cases, _ = cases_of("ranks")
    for case in cases:
        steps.take(case)
        plan = bench.WAYS[case.way]
        assert graphs._products == "of the engine" if plan is None else graphs._products.adapted() == plan
    steps.take(Case("default"))
    assert graphs._products is None, "the others keep the memory that all of them share"
    measured = replace(default_plan(SHAPES["gate"]), split=2)
    monkeypatch.setattr(lora_plans, "tables_of", lambda name: [(SHAPES["gate"], measured)])
    with_table, without = cases_of("table")
    steps.take(with_table)
    assert plan_for(SHAPES["gate"], "a card") == measured
    steps.take(without)
    assert plan_for(SHAPES["gate"], "a card") == default_plan(SHAPES["gate"])
    steps.leave()
    assert plan_for(SHAPES["gate"], "a card") == measured
    plan_for.cache_clear()


def test_products_of_few_rows_are_switched() -> None:
    usual, without, wide, *others, last = [Case("default"), *cases_of("fused")]

    def plan(
        case: Case, rows: int, *, outs: int = 2, gated: bool = False, has_adapters: bool = True
    ) -> FusedPlan | None:
        chosen = partial(choose_fused, case.few_rows, case.vary or (lambda plan: plan), case.name == bench.GATE)
        return chosen(rows, 4096, (14336, 14336) if outs == 2 else (4096,), gated=gated, has_adapters=has_adapters)

    assert plan(usual, 32) == plan(last, 32) is not None and plan(without, 1) is None
    assert plan(usual, 64) is None and plan(wide, 64) is not None
    for case in others:
        # The base's products are no part of it.
        base = [plan(c, 8, gated=True, has_adapters=False) for c in (case, usual)]
        assert base[0] == base[1] is not None
        calls = [{"rows": rows, "gated": True} for rows in (8, 32)] + [{"rows": rows, "outs": 1} for rows in (8, 32)]
        assert any(plan(case, **call) != plan(usual, **call) for call in calls)  # type: ignore[arg-type]
    assert plan(others[-1], 32, gated=True) is not None and plan(others[-1], 8, gated=True) is None


class Clock:
    """In the place of the engine: five seconds for each load, and half a millisecond more in odd cases."""

    def __init__(self) -> None:
        self.now, self.taken = 0.0, 0

    def take(self, case: Case) -> None:
        self.taken += 1

    def milliseconds(self, loads: Sequence[bench.Load]) -> dict[str, float]:
        self.now += 5 * len(loads)
        return {f"{kind} {batch}": batch + self.taken % 2 / 2 for kind, batch in loads}


def test_cases_are_measured_as_long_as_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Any = Clock()
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: clock.now))
    cases = [Case("default"), *cases_of("lookup"), *cases_of("gate")]
    loads = [("distinct", 32), ("same", 32), ("same", 8)]
    first, second, *others, last = measure(clock, cases, loads, 70)
    assert first["step_ms"] == {"distinct 32": 32.5, "same 32": 32.5, "same 8": 8.5}
    assert set(first["more_ms"].values()) == {0.0} and set(second["more_ms"].values()) == {-0.5}
    assert others[1]["case"] == "gate: -512 outputs"
    assert others[1]["step_ms"] == {"distinct 32": 32.0, "same 32": 32.0}
    # 45 s for the three before, and two of 10 s: the next might take 15.
    assert len(others) == 3 and clock.now == 65
    assert last == {"part": "left out", "cases": [case.name for case in cases[5:]]}


def test_a_plan_that_the_card_cannot_run_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Clock):
        def take(self, case: Case) -> None:
            super().take(case)
            self.fails = case.name == "gate: 2 warps"

        def milliseconds(self, loads: Sequence[bench.Load]) -> dict[str, float]:
            if self.fails:
                raise MemoryError("shared memory")
            return super().milliseconds(loads)

    monkeypatch.setattr(bench, "not_launched", lambda: (MemoryError,))
    found = list(measure(Broken(), [Case("default"), *cases_of("gate")], [("same", 8)], 1e9))  # type: ignore[arg-type]
    [failed] = [record for record in found if "error" in record]
    assert failed == {"part": "gate", "case": "gate: 2 warps", "error": "shared memory"}
    assert found[-1]["case"] == "default again"


@pytest.mark.slow
def test_it_runs_small(tmp_path: Path) -> None:
    folders = ("--folder", str(tmp_path), "--output", str(tmp_path))
    command = [sys.executable, str(SCRIPT), "--tiny", "--part", "lookup", "expand", "--ranks", "8", "mix", *folders]
    told = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert told.returncode == 0, told.stderr[-2000:]
    lines = list(read_lines(told.stdout))
    assert lines == json.loads((tmp_path / "lora_steps.json").read_text())["figures"]
    parts = ["base", "default", "lookup", "lookup", *["expand"] * 16]
    assert [(line["rank"], line["part"]) for line in lines] == [(rank, part) for rank in ("8", "mix") for part in parts]
    assert all(set(line["step_ms"]) == {"distinct 8", "same 8"} for line in lines if line["part"] != "base")
