"""The runs of a result of bench_balance.py again, in the simulator: the same arrivals, counted in the same way."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.loads import Data

from bench.balance_load import Arrival, Offered, Results, lone
from bench.balance_trace import offered
from peft_dist.sim.experiment import simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Arrival as Row
from peft_dist.workload.records import RequestRecord

RATIOS = ("queueing_mean_ms", "mean_s_per_token", "p90_s_per_token")
# Options of EngineConfig that may be set beside those of the benchmark.
_SET = ("max_num_batched_tokens", "num_blocks", "max_loras", "max_num_seqs")
# Seconds between requests that are to be alone.
_APART = 60.0


def simulated(figures: Mapping[str, Any], settings: argparse.Namespace, profile: str, data: Data) -> dict[str, Any]:
    """Every run of a result in which no replica died.

    Args:
        figures: Of the result.
        settings: The options that it was measured with.
        profile: Name or path of what a replica's work takes.
        data: As when it was measured.

    Returns:
        Which profile, and for each run what both say, and the ratios of simulated to live.
    """
    costs = CostProfile.load(profile)
    names = [f"adapter{index}" for index in range(settings.adapters)]
    asked, options = offered(settings, names, data), cluster(settings, names)
    idle = idle_first_token(asked, costs, options)
    rate, seconds = figures["requests_per_second_at_load_1"], settings.warm + settings.seconds
    runs = []
    for run in figures["runs"]:
        if "killed" in run:
            continue
        planned = asked.over_time(run["load"] * rate, seconds, run["seed"])
        result = simulate(_rows(planned), costs, replace(options, migration=run["migration"]))
        told = counted(result.records, settings.warm, result.seconds).summary(idle)
        if told["requests"] != run["requests"]:
            raise SystemExit(
                f"{run['requests']} requests were counted live, {told['requests']} simulated: the settings in the "
                "result are not those that it was measured with"
            )
        runs.append({
            **{key: run[key] for key in ("migration", "load", "seed")},
            "simulated": {
                **told, "moves": result.migration.moves, "placements": result.migration.placements,
                "steps": sum(replica.steps for replica in result.replicas),
                "merged_steps": sum(replica.merged_steps for replica in result.replicas),
                "switches": sum(replica.switches for replica in result.replicas),
            },
            "live": {key: run[key] for key in told if key in run},
            "simulated_over_live": {key: _ratio(told[key], run[key]) for key in RATIOS},
        })  # fmt: skip
    return {"profile": {"name": costs.name, "source": costs.source}, "lone_first_token_ms": 1e3 * idle, "runs": runs}


def cluster(settings: argparse.Namespace, names: Sequence[str]) -> SimulationOptions:
    """The replicas that were measured."""
    given = {"max_loras": settings.max_loras, "max_num_seqs": settings.max_num_seqs}
    more = {name: json.loads(value) for name, _, value in (text.partition("=") for text in settings.set)}
    given |= {name: more[name] for name in _SET if name in more}
    return SimulationOptions(replicas=settings.replicas, adapters=tuple(names), rank=settings.rank, **given)


def idle_first_token(load: Offered, profile: CostProfile, options: SimulationOptions) -> float:
    """Median seconds, as ``balance_load.idle_first_token`` measures them."""
    found = simulate(_rows(one._replace(at=_APART * n) for n, one in enumerate(lone(load))), profile, options)
    return statistics.median(counted(found.records, 0.0, found.seconds).first)


def counted(records: Iterable[RequestRecord], warm: float, seconds: float) -> Results:
    """As ``serve`` counts them. Raises SystemExit where a request fails, which none did live."""
    found = Results(seconds=seconds - warm)
    for record in records:
        if record.error is not None or record.first_token is None:
            raise SystemExit(f"request {record.index} fails in the simulator: {record.error}; is it this profile?")
        if record.scheduled < warm:
            continue
        found.asked += 1
        found.first.append(record.first_token - record.scheduled)
        found.per_token.append((record.finished - record.scheduled) / record.output_tokens)
        found.longest_gap.append(max(record.itl, default=0.0))
        found.tokens += record.output_tokens
    return found


def as_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: live, simulated, and the ratio, of each run."""
    lines = [
        "| load | migration | mean queueing (ms): live, simulated | mean ms/token | P90 ms/token |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        live, virtual, ratio = run["live"], run["simulated"], run["simulated_over_live"]
        cells = []
        for key in RATIOS:
            scale, share = 1.0 if key.endswith("_ms") else 1e3, ratio[key]
            told = "" if share is None else f" ({share:.2f})"
            cells.append(f"{scale * live[key]:.1f}, {scale * virtual[key]:.1f}{told}")
        lines.append(f"| {run['load']:g} | {run['migration']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(planned: Iterable[Arrival]) -> list[Row]:
    return [Row(one.at, one.adapter, len(one.prompt), one.tokens) for one in planned]


def _ratio(virtual: float, live: float) -> float | None:
    return round(virtual / live, 4) if live else None
