"""Launch plans and switches of the LoRA kernels tried in whole captured decode steps, all in one process.

    python scripts/bench/bench_lora_steps.py [--part fused streams lookup table ranks shrink gate expand]
                                             [--ranks 64 mix] [--seconds 235] [--batches 32 128 8]
                                             [--kinds distinct same] [--output FOLDER]

What kernels take alone says little: in a step the weights of all layers stream between two launches, and a shrink runs
beside its layer's product. Each case has the steps captured anew. fused: steps of few rows without our products, which
have the adapters inside, 64 rows with them, and other plans of theirs (``--kinds none same distinct``); ``--apart``:
all other parts without them, since what they change is not run in their place. streams: the shrinks' stream as urgent
as others, or none. lookup: each launch looks its tables up. table: the plans of the card's measured table (peft-dist
tune), where there is one, in place of the usual ones. ranks: adapters beside and behind their products, each with the
plans of their ranks and with those of rank 16, then one field of the former changed for all layers; give ``--ranks``,
for each of which an engine starts in turn, and ``--kinds distinct``. shrink, gate, expand: one field of the plans of
some layers changed, with the first of ``--batches`` alone. A part ends with the default again: what differs there is
noise. No case is begun that would end after ``--seconds``. One JSON line a case, and docs/results/lora_steps.json. On a
CPU nothing is captured, so that all cases are alike (``--tiny`` tries the script).
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gpu_engine import DEVICE, add_engine_options, runner, start
from bench.gpu_options import make_parser, parse
from bench.gpu_workload import emit, ranks_of, time_decode, write_adapters
from bench.report import write_result
from peft_dist.kernels import lora_plans
from peft_dist.kernels.backend import has_triton
from peft_dist.kernels.few_rows import FewRows
from peft_dist.kernels.lora_fused_plans import MOST_ADDED_ROWS, FusedPlan, choose_plan
from peft_dist.kernels.lora_plans import RANKS, GroupPlan, GroupShape, default_plan, fit_plan
from peft_dist.kernels.product_plans import ProductPlan
from peft_dist.kernels.types import LoRAPlan
from peft_dist.runner import step_plans

Change = Callable[[GroupPlan], GroupPlan]
Vary = Callable[[FusedPlan], FusedPlan]
Load = tuple[str, int]
PROMPT_TOKENS, NEW_TOKENS = 32, 49


def times(**factors: float) -> Change:
    """Fields by factors."""
    return lambda plan: replace(plan, **{name: max(1, int(getattr(plan, name) * by)) for name, by in factors.items()})


def more(name: str, by: int) -> Change:
    """A field of outputs, of which 0 are none."""
    return lambda plan: replace(plan, **{name: max(0, getattr(plan, name) + by)})


def become(**values: int) -> Change:
    return lambda plan: replace(plan, **values)


PLANS: dict[str, tuple[tuple[str, ...], dict[str, Change]]] = {
    "shrink": (("qkv", "gate", "o", "down"), {
        "twice the parts": times(split=2), "half the parts": times(split=0.5),
        "twice the parts, half the block": times(split=2, block_k=0.5),
        "half the parts, twice the block": times(split=0.5, block_k=2),
        **{f"{warps} warps": become(shrink_warps=warps) for warps in (1, 2, 4)},
        "2 stages": become(shrink_stages=2),
    }),
    "gate": (("gate",), {
        **{f"{by:+} outputs": more("gate_loop_n", by) for by in (-512, -256, 256, 512, 768)},
        "2 warps": become(gate_warps=2), "3 stages": become(loop_stages=3), "5 stages": become(loop_stages=5),
    }),
    "expand": (("qkv", "o", "down"), {
        "-256 outputs": more("loop_n", -256), "+256 outputs": more("loop_n", 256), "+512 outputs": more("loop_n", 512),
        "no loop": become(loop_n=0), "2 warps": become(expand_warps=2),
    }),
}  # fmt: skip


# How layers with adapters are multiplied; of other parts' cases as is usual where nothing was measured.
MEASURED = "as measured"
WAYS: dict[str, ProductPlan | None] = {
    MEASURED: None,
    **{f"beside, {spared} left": ProductPlan("beside", spared) for spared in (32, 64)},
    "behind": ProductPlan("behind"),
}
RANK_PLANS: dict[str, Change] = {
    "ranks not shared out": become(rank_parts=1),
    "expands of 16 ranks at once": become(ranks=RANKS, loop_shares=1, gate_loop_shares=1),
    "no outputs of others": become(loop_shares=1, gate_loop_shares=1),
    "twice the outputs": times(loop_n=2, gate_loop_n=2),
    "twice the parts": times(split=2),
    "3 stages": become(loop_stages=3),
    "4 stages": become(loop_stages=4),
    "8 warps": become(expand_warps=8, gate_warps=8),
}
GATE = "the other place of the activation"
FUSED: dict[str, Vary] = {
    "ahead or not": lambda plan: replace(plan, ahead=not plan.ahead),
    "64 inputs": lambda plan: replace(plan, block_k=64, stages=4),
    "128 inputs": lambda plan: replace(plan, block_k=128, stages=3),
    "8 tiles": lambda plan: replace(plan, each=8),
    "twice the shrinks": lambda plan: replace(plan, shrink_split=2 * plan.shrink_split),
    GATE: lambda plan: plan,
}


class Case(NamedTuple):
    """What is other than usual; of ``change`` in the plans of ``group``, a kind of layers, or of all where it is "".

    Attributes:
        few_rows: Most rows of steps that multiply by our kernel; None: as usual.
        vary: Changes the plans of those that have adapters inside.
        stream: Of the shrinks: "first" in line, "usual" (as urgent as any), "none" (no stream of their own).
        table: Whether plans come from the card's table first.
        way: One of ``WAYS``.
        low: Plans are those of rank 16, whatever the ranks.
    """

    part: str
    name: str = "default"
    group: str = ""
    change: Change | None = None
    stream: str = "first"
    lookup: bool = True
    few_rows: int | None = None
    vary: Vary | None = None
    table: bool = False
    way: str = ""
    low: bool = False


def cases_of(part: str) -> Iterator[Case]:
    if part == "streams":
        yield from (Case(part, f"{stream} stream", stream=stream) for stream in ("usual", "none"))
    elif part == "fused":
        yield Case(part, "without", few_rows=0)
        yield Case(part, "up to 64 rows", few_rows=64)
        yield from (Case(part, name, vary=vary) for name, vary in FUSED.items())
    elif part == "lookup":
        yield Case(part, "no lookup", lookup=False)
    elif part == "table":
        yield Case(part, "measured table", table=True)
    elif part == "ranks":
        for way in WAYS:
            yield Case(part, way, way=way)
            yield Case(part, f"{way}, plans of rank {RANKS}", way=way, low=True)
        yield from (Case(part, name, change=change, way=MEASURED) for name, change in RANK_PLANS.items())
        yield Case(part, f"{MEASURED} again", way=MEASURED)
    else:
        groups, changes = PLANS[part]
        yield from (Case(part, f"{group}: {name}", group, changes[name]) for group in groups for name in changes)
    yield Case(part, "default again")


def group_of(shape: GroupShape) -> str:
    """Which of a Llama's layers have this shape."""
    alone = "down" if shape.in_features > shape.out_features[0] else "o"
    return {2: "gate", 3: "qkv"}.get(len(shape.out_features), alone)


def choose(case: Case, shape: GroupShape) -> GroupPlan:
    """A shape's plan; prefills keep theirs."""
    plan = default_plan(shape._replace(ranks=RANKS) if case.low else shape)
    if case.change is None or shape.tile_rows != 16 or case.group not in ("", group_of(shape)):
        return plan
    return fit_plan(case.change(plan), shape)


class OneWay:
    """``Products`` of which those with adapters take one way; others that which was measured."""

    def __init__(self, products: Any, plan: ProductPlan) -> None:
        self._products, self._plan = products, plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._products, name)

    def adapted(self, *_: Any, **__: Any) -> ProductPlan:
        return self._plan


class Steps:
    """An engine that takes cases, until it is left."""

    def __init__(self, llm: Any, options: Namespace) -> None:
        self._find_plan, self._make_plan = lora_plans._find_plan, step_plans.make_plan
        self._run, self._options = runner(llm), options
        self._graphs = llm._open.runner.graphs
        self._few_rows = self._graphs and self._graphs._few_rows
        self._products = self._graphs and self._graphs._products
        self._workspace = llm._open.runner.store.pool.workspace
        self._streams: dict[str, Any] = {"none": None, "first": self._workspace.stream}
        self._streams["usual"] = torch.cuda.Stream() if DEVICE == "cuda" else None

    def take(self, case: Case) -> None:
        """From now on steps are captured like this."""
        find = self._find_plan
        lora_plans._find_plan = find if case.table else lambda shape, *_: choose(case, shape)
        lora_plans.plan_for.cache_clear()
        self._workspace.stream = self._streams[case.stream]
        if self._graphs is not None:
            make = self._make_plan
            step_plans.make_plan = lambda *args: looked_up(make(*args), case.lookup)
            rows = 0 if self._options.apart else case.few_rows
            chosen = partial(choose_fused, rows, case.vary or (lambda plan: plan), case.name == GATE)
            self._graphs._few_rows = self._few_rows and FewRows(DEVICE, chosen)
            # The others keep the memory that all of them share.
            plan = WAYS.get(case.way)
            measured = self._products if case.way else None
            self._graphs._products = OneWay(measured, plan) if measured is not None and plan is not None else measured
            self._graphs._steps = {v: step for v, step in self._graphs._steps.items() if not v.shape.decodes}

    def leave(self) -> None:
        """Plans are as usual again, for the next engine."""
        lora_plans._find_plan, step_plans.make_plan = self._find_plan, self._make_plan
        lora_plans.plan_for.cache_clear()

    def milliseconds(self, loads: Sequence[Load]) -> dict[str, float]:
        """Of a step, by load."""
        count, new_tokens = self._options.adapters, self._options.new_tokens or NEW_TOKENS
        return {
            f"{kind} {batch}": time_decode(
                self._run, self._options.shape, kind, batch, count, new_tokens, PROMPT_TOKENS
            )["step_ms"]
            for kind, batch in loads
        }  # fmt: skip


def choose_fused(
    most_rows: int | None, vary: Vary, other_gate: bool, rows: int, inputs: int, outs: Sequence[int], *, gated: bool,
    has_adapters: bool,
) -> FusedPlan | None:  # fmt: skip
    """A layer's plan in a case; without adapters the usual one."""
    usual = partial(choose_plan, most_rows=most_rows, gated=gated, has_adapters=has_adapters)
    found = usual(rows, inputs, outs)
    if other_gate and gated and has_adapters:
        found = None if found else usual(16, inputs, outs)
    return vary(found) if found and has_adapters else found


def concerns(case: Case, load: Load, loads: Sequence[Load]) -> bool:
    """Whether a load is measured: where only some plans change, what goes by them."""
    kind, batch = load
    if case.few_rows:
        return MOST_ADDED_ROWS < batch <= case.few_rows
    if case.name in FUSED:
        return kind in ("same", "distinct") and batch in (8, 32)
    return case.part not in PLANS or batch == loads[0][1]


def looked_up(plan: LoRAPlan, lookup: bool) -> LoRAPlan:
    return plan if lookup else replace(plan, layers=())


def not_launched() -> tuple[type[Exception], ...]:
    """What Triton says of a plan that this card cannot run."""
    if not has_triton():
        return ()
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompilationError


def measure(steps: Steps, cases: Sequence[Case], loads: Sequence[Load], seconds: float) -> Iterator[dict[str, Any]]:
    """A record a case, and one that names those there was no time for; the first case is what others differ from."""
    usual: dict[str, float] = {}
    end, longest = time.monotonic() + seconds, 0.0
    for index, case in enumerate(cases):
        began = time.monotonic()
        if began + longest > end:
            yield {"part": "left out", "cases": [left.name for left in cases[index:]]}
            return
        steps.take(case)
        record: dict[str, Any] = {"part": case.part, "case": case.name}
        try:
            found = steps.milliseconds([load for load in loads if concerns(case, load, loads)])
        except not_launched() as error:
            yield record | {"error": str(error)}
            continue
        usual = usual or found
        longest = max(longest, time.monotonic() - began)
        yield record | {"step_ms": found, "more_ms": {key: round(found[key] - usual[key], 3) for key in found}}


def run(options: Namespace, rank: str) -> Iterator[dict[str, Any]]:
    """All cases with adapters of this rank: a record each."""
    ranks = ranks_of(rank, options.adapters)
    paths = write_adapters(options.shape, options.folder, ranks, DEVICE)
    with start(options, paths, ranks, max_num_seqs=max(options.batches)) as llm:
        steps = Steps(llm, options)
        cases = [Case("default"), *(case for part in options.part for case in cases_of(part))]
        loads = [(kind, batch) for batch in options.batches for kind in options.kinds]
        try:
            if "none" not in options.kinds:
                # Without adapters there is little to change.
                yield {"part": "base", "step_ms": steps.milliseconds([("none", batch) for batch in options.batches])}
            yield from measure(steps, cases, loads, options.seconds)
        finally:
            steps.leave()
            # With the captured steps that it knows, which the next engine needs the memory of.
            del steps


def main() -> None:
    parts = ("fused", "streams", "lookup", "table", "ranks", *PLANS)
    parser = make_parser(__doc__, parts)
    add_engine_options(parser)
    parser.add_argument("--seconds", type=float, default=235, help="for all cases of an engine, without its start")
    parser.add_argument("--apart", action="store_true", help="all steps without our products")
    parser.add_argument("--output", type=Path, help="folder for lora_steps.json (default: docs/results)")
    parser.add_argument("--ranks", nargs="+", help="an engine for each in turn: numbers, or mix (default: --rank)")
    usual = [part for part in parts if part != "ranks"]
    parser.set_defaults(part=usual, batches=[32, 128, 8], kinds=["distinct", "same"])
    options = parse(parser)
    records: list[dict[str, Any]] = []
    try:
        for rank in options.ranks or [options.rank]:
            for record in run(options, rank):
                records.append({"rank": rank, **record})
                emit(**records[-1])
    finally:
        print("written to", write_result("lora_steps", records, options.output))


if __name__ == "__main__":
    torch.set_num_threads(1) if DEVICE == "cpu" else None
    main()
