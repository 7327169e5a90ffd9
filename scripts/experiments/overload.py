"""What Figure 11a's queues in overload come from: the same load by dLoRA with some of its rules left out.

    python scripts/experiments/overload.py --scale paper --maf2 FILE --lengths-csv FILE --output docs/results

dLoRA as it serves, without the bound on being overtaken, without that and without debts being repaid, in its
artifact's form, and its batches without the bound in the artifact's cluster (placement, dispatch, moves). Writes
overload.json, and prints the table of docs/experiments_paper.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from experiments import fig11a_migration
from experiments.experiment import versions
from experiments.loads import make, read_ahead
from experiments.measured import Asked, Work, measure
from experiments.points import Point
from experiments.settings import Settings, parser, settings
from experiments.simulated import PROFILES, options_of, profile_of
from experiments.tables import check_folder, write_json
from peft_dist.core.errors import ConfigError, PeftDistError
from peft_dist.engine import assembly
from peft_dist.policy.settings import PolicySettings
from peft_dist.sim import exec_types
from peft_dist.sim.experiment import SimulationResult, simulate
from peft_dist.sim.hardware import ExecType, dlora
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile


@dataclass(frozen=True, slots=True)
class Variant:
    """Rules of dLoRA.

    Attributes:
        words: In the table.
        system: Whose options they begin with.
        bound: Whether nobody is overtaken for longer than is usual.
        repays: Whether adapters that displaced others repay it.
        cluster: Whether batches are ours, and placement, dispatch and moves are the artifact's.
    """

    words: str
    system: str = "dlora"
    bound: bool = True
    repays: bool = True
    cluster: bool = False

    @property
    def options(self) -> SimulationOptions:
        found = options_of(self.system)
        return found if self.bound else replace(found, max_adapter_wait=math.inf)


VARIANTS = (
    Variant("bound of 5 s"),
    Variant("no bound (`--max-adapter-wait inf`)", bound=False),
    Variant("no bound, debts are not repaid", bound=False, repays=False),
    Variant("artifact's form", system="dlora-artifact"),
    Variant("artifact's placement, dispatch and moves with our batches, no bound", bound=False, cluster=True),
)
# A credit that no adapter reaches.
_NEVER = 1e12


def point_of(chosen: Settings, rate: float) -> Point:
    """Of Figure 11a. Raises ConfigError for a rate that this scale has not."""
    [ladder] = fig11a_migration.ladders(chosen)
    rates = {point.load.rate: point for point in ladder}
    if rate not in rates:
        known = ", ".join(f"{one:g}" for one in rates)
        raise ConfigError(f"--rate {rate:g}: Figure 11a at --scale {chosen.scale} has {known}; use one of these")
    return rates[rate]


@contextmanager
def rules(variant: Variant) -> Iterator[None]:
    """What no option of a simulation says: nobody is to serve like this."""
    before, kinds = assembly.PolicySettings, exec_types.EXEC_TYPES
    try:
        if not variant.repays:
            assembly.PolicySettings = partial(PolicySettings, credit_gap=_NEVER)  # type: ignore[misc, assignment]
        if variant.cluster:
            exec_types.EXEC_TYPES = {**kinds, "dlora": ExecType(dlora, is_artifact=True)}
        yield
    finally:
        assembly.PolicySettings, exec_types.EXEC_TYPES = before, kinds  # type: ignore[misc]


def run(variant: Variant, point: Point, chosen: Settings) -> dict[str, Any]:
    """What comes of a load by these rules."""
    workload = make(point.load, chosen.data)
    profile = CostProfile.load(PROFILES[point.model])
    names = tuple(f"adapter{index}" for index in range(point.load.adapters))
    options = replace(variant.options, replicas=point.replicas, adapters=names, seed=point.load.seed)
    with rules(variant):
        result = simulate(workload.arrivals, profile, options)
    return {**asdict(variant), "options": options.told(), **figures(result)}


def figures(result: SimulationResult) -> dict[str, Any]:
    """Of the table."""
    waits = np.array([record.queueing for record in result.records if record.queueing is not None])
    steps, merged = (sum(getattr(one, name) for one in result.replicas) for name in ("steps", "merged_steps"))
    measured = measure(result.records, Work(0.0, 0.0))
    return {
        "queueing_delay": measured.queueing_delay,
        "wait_mean": float(waits.mean()),
        "wait_p99": float(np.percentile(waits, 99)),
        "wait_longest": float(waits.max()),
        "throughput": measured.throughput,
        "merged_share": merged / steps,
        "failed": measured.failed,
    }


def table(found: list[Mapping[str, Any]]) -> str:
    head = ("", "queueing s/token", "seconds waited: mean, P99, longest", "requests/s of the whole run", "steps merged")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in found:
        waits = f"{one['wait_mean']:.1f}, {one['wait_p99']:.0f}, {one['wait_longest']:.0f}"
        queueing, rate = f"{one['queueing_delay']:.3f}", f"{one['throughput']:.1f}"
        share = f"{100 * one['merged_share']:.0f} %"
        lines.append(f"| {' | '.join([one['words'], queueing, waits, rate, share])} |")
    return "\n".join(lines)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rate", type=float, default=32, help="of Figure 11a's")
    asked = made.parse_args()
    try:
        chosen = replace(settings(asked), systems=("dlora",))
        check_folder(chosen.output)
        point = point_of(chosen, asked.rate)
        read_ahead([point.load], chosen.data)
        found = [run(variant, point, chosen) for variant in VARIANTS]
    except PeftDistError as error:
        raise SystemExit(f"overload.py: {error}") from error
    load = asdict(point.load) | asdict(Asked.of(make(point.load, chosen.data)))
    about = {"figure": "11a", "mode": "simulated", "scale": chosen.scale, "data": chosen.data.source, "load": load}
    about |= {"versions": versions(), "profile": profile_of(point.model), "rows": found}
    write_json(chosen.output / "overload.json", about)
    print(table(found))


if __name__ == "__main__":
    main()
