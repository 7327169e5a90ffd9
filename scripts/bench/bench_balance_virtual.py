"""Kinds of placement and migration in virtual time: the same arrivals for each, over several seeds.

    python scripts/bench/bench_balance_virtual.py [--seeds 6] [--seconds 40] [--cases skewed,shift] [--jobs 2]

Replicas as live (``peft_dist.sim``), with everybody's times known. The n-th adapter is asked for in proportion to 1/n,
by arrivals of its own with Gamma gaps. A load's rates are parts of what its cluster answers unmerged, all seats taken.
What counts are differences to ``proactive`` on the same arrivals: their mean over the seeds, and the half width of its
interval of 95 % (Student's t). Writes docs/results/balance_virtual.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments.loads import Data, LoadSpec, make

from bench.balance_load import Arrival, Load, arrivals
from bench.report import write_result
from peft_dist.placement.placer import KINDS
from peft_dist.sim.experiment import SimulationResult, simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Arrival as Row

FIGURES = ("queueing", "s_per_token", "p90_s_per_token")
# Half widths of intervals of 95 % in standard errors, by the number of values.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 12: 2.20, 16: 2.13}


@dataclass(frozen=True)
class Case:
    """A cluster and what is asked of it.

    Attributes:
        cv: Coefficient of variation of the gaps between an adapter's arrivals.
        longer: Factor of all answers.
        shifts: After half of the time the rarest adapters are the most wanted.
        max_loras: Adapters on a device; None: as the profile says.
        is_trace: The load of Figure 11a, from a synthetic trace; ``loads`` are its requests a second.
    """

    name: str
    loads: tuple[float, ...] = (0.7, 0.9, 1.1)
    profile: str = "paper-7b"
    replicas: int = 8
    adapters: int = 32
    cv: float = 3.0
    longer: float = 1.0
    shifts: bool = False
    max_loras: int | None = None
    is_trace: bool = False


CASES = (
    Case("trace", loads=(20.0, 24.0, 28.0, 32.0), is_trace=True),
    Case("skewed"),
    Case("two replicas, 8B", profile="h200-8b", replicas=2, max_loras=16, loads=(0.6, 0.8, 1.0)),
    Case("bursts", cv=8.0),
    Case("few slots", max_loras=4),
    Case("shift", shifts=True),
    Case("long", longer=4.0),
)


@dataclass(frozen=True)
class Run:
    case: Case
    load: float
    seed: int
    kind: str
    seconds: float


def rows(run: Run, profile: CostProfile) -> list[Row]:
    """The arrivals, which do not depend on the kind."""
    case = run.case
    if case.is_trace:
        count = round(run.load * run.seconds)
        spec = LoadSpec("maf2", "0.0.0-0.6.0", run.load, count, case.adapters, need_sort=True, seed=run.seed)
        return list(make(spec, Data()).arrivals)
    names = [f"adapter{index}" for index in range(case.adapters)]
    rate = run.load * saturation(case, profile) / case.longer
    parts: list[list[Arrival]] = []
    halves = 2 if case.shifts else 1
    for half in range(halves):
        wanted = names if half == 0 else names[::-1]
        wanted_load = Load(wanted, 1.0, case.cv, 512)
        found = arrivals(wanted_load, rate, run.seconds * case.longer / halves, run.seed + 1000 * half)
        start = half * run.seconds * case.longer / halves
        parts.append([one._replace(at=one.at + start) for one in found])
    return [
        Row(one.at, one.adapter, len(one.prompt), min(int(one.tokens * case.longer), profile.max_model_len - 512))
        for part in parts
        for one in part
    ]


def saturation(case: Case, profile: CostProfile) -> float:
    """Requests a second of all replicas with all seats taken, nothing merged, by the profile's times."""
    costs, seats = profile.costs, profile.max_num_seqs
    step = costs.step + costs.lora_step + seats * (costs.decode_sequence + costs.lora_token + costs.adapter)
    sample = [one for seed in range(20) for one in arrivals(Load(["a"], 1.0, 1.0, 512), 20.0, 20.0, seed)]
    tokens, prompt = (
        statistics.fmean(values) for values in ([o.tokens for o in sample], [len(o.prompt) for o in sample])
    )
    return case.replicas / (tokens * step / seats + prompt * costs.prefill_token)


def measure(run: Run) -> dict[str, Any]:
    profile = CostProfile.load(run.case.profile)
    names = tuple(f"adapter{index}" for index in range(run.case.adapters))
    options = SimulationOptions(
        replicas=run.case.replicas, adapters=names, migration=run.kind, max_loras=run.case.max_loras, token_times=False
    )
    return summary(simulate(rows(run, profile), profile, options))


def summary(result: SimulationResult) -> dict[str, Any]:
    """Of all requests. ``queueing``: Seconds from arrival to the first step."""
    records = [record for record in result.records if record.output_tokens]
    latency = [(record.finished - record.sent) / record.output_tokens for record in records]
    moves = result.migration.moves
    return {
        "requests": len(records),
        "queueing": statistics.fmean(record.queueing or 0.0 for record in records),
        "s_per_token": statistics.fmean(latency),
        "p90_s_per_token": statistics.quantiles(latency, n=10)[-1],
        "merged_share": sum(r.merged_steps for r in result.replicas) / max(sum(r.steps for r in result.replicas), 1),
        "moves": sum(moves.values()),
    }


def compared(found: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and what they are more than the reference's, of the same arrivals."""
    means = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
    more = {}
    for figure in FIGURES:
        differences = [own[figure] - other[figure] for own, other in zip(found, reference, strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
        more[figure] = [statistics.fmean(differences), STUDENT.get(len(differences), 2.0) * error]
    return {"mean": means, "more_than_proactive": more, "seeds": list(found)}


def report(case: Case, load: float, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    kinds = {kind: compared(found, results["proactive"]) for kind, found in results.items()}
    for kind, one in kinds.items():
        mean, (more, error) = one["mean"], one["more_than_proactive"]["queueing"]
        print(
            f"{case.name} {load}: {kind:9s} queueing {mean['queueing']:.3f} s ({more:+.3f} +- {error:.3f}), "
            f"{mean['s_per_token']:.4f} s/token, merged {mean['merged_share']:.2f}, moves {mean['moves']:.0f}",
            flush=True,
        )
    return {"case": case.name, "load": load, "kinds": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals; longer ones where answers are")
    parser.add_argument("--cases", help="names of those to run, with commas between")
    parser.add_argument("--kinds", default=",".join(KINDS), help="proactive is always run")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder for the result (default: docs/results)")
    args = parser.parse_args()
    wanted = [case for case in CASES if args.cases is None or case.name in args.cases.split(",")]
    kinds = list(dict.fromkeys(["proactive", *args.kinds.split(",")]))
    found: list[dict[str, Any]] = []
    path: Path | None = None
    with ProcessPoolExecutor(args.jobs) as pool:
        for case in wanted:
            for load in case.loads:
                runs = {k: [Run(case, load, seed, k, args.seconds) for seed in range(args.seeds)] for k in kinds}
                pending = {k: [pool.submit(measure, run) for run in own] for k, own in runs.items()}
                found.append(report(case, load, {k: [one.result() for one in own] for k, own in pending.items()}))
                # After each: what there is may be all that somebody waits for.
                settings = {"seeds": args.seeds, "seconds": args.seconds}
                figures = {"settings": settings, "cases": [asdict(one) for one in wanted], "results": found}
                path = write_result("balance_virtual", figures, args.output)
    print("written to", path)


if __name__ == "__main__":
    main()
