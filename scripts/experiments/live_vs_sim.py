"""The same workload live and simulated: how far are seconds a token apart?

    python scripts/experiments/live_vs_sim.py                        # two CPU replicas of SmolLM2, through HTTP
    python scripts/experiments/live_vs_sim.py --engine --shape 8b    # one replica in this process, no HTTP: for a GPU

First a profile of this machine is measured (or `--profile FILE` taken). Its saturation is found by simulating all
requests of a run at once, between the first and the last quarter of their ends; then requests come at each of `--loads`
of that rate, live and simulated, from each of `--seeds`. A load is a share, or SHARE:ZIPF for another skew of the
adapters' popularity; the last one of the default has requests queue, most of them for one adapter, so that steps run
merged. The simulator gets the workload and the profile, and nothing of the live run. Writes
docs/results/live_vs_sim[_NAME].json: both summaries of each run, and for each load the mean and the span over the seeds
of simulated over live, of the mean and the P90 of seconds a token (aim: within 15 %).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.cluster_engine import add_engine_options, prepare
from bench.cost_runs import CostRuns
from bench.report import write_result

from experiments import live
from experiments.live_engine import engine_records, measured_replica
from peft_dist.core.config import EngineConfig
from peft_dist.sim.experiment import SimulationResult, simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload import arrivals, files, generator, lengths
from peft_dist.workload.records import RequestRecord, read_json, summarize

ROOT = Path(__file__).parents[2]
FIGURES = ("normalized_latency", "ttft", "tpot", "e2e")
# Fields of EngineConfig whose options are called otherwise, or that have none.
_OPTIONS = {
    "num_threads": "threads", "enable_prefix_caching": "no_prefix_caching", "fuse": "no_fuse", "pack_weights": None,
    "compile_kernels": None, "kv_cache_bytes": None, "pinned_adapters": None,
}  # fmt: skip
Served = tuple[Sequence[RequestRecord], float]
"""Records, and the share of steps that ran merged."""
Serve = Callable[[arrivals.Workload], Served]


class Load(NamedTuple):
    """A share of saturation, and the exponent of the adapters' popularity; None: as of ``--zipf``."""

    share: float
    zipf: float | None = None

    @classmethod
    def parse(cls, text: str) -> Load:
        """SHARE or SHARE:ZIPF. Raises ValueError."""
        share, _, zipf = text.partition(":")
        return cls(float(share), float(zipf) if zipf else None)


def workload(
    options: argparse.Namespace, names: Sequence[str], zipf: float, rate: float, count: int, seed: int
) -> arrivals.Workload:
    """Poisson arrivals of adapters with Zipf popularity, and lengths like ShareGPT's, cut short."""
    sizes = lengths.synthetic(
        "sharegpt", lengths.Filters(max_prompt=options.max_prompt, max_total=options.max_total), 0
    )
    load = generator.Load(rate, count, seed=seed)
    return generator.from_shares(names, arrivals.zipf(len(names), zipf), f"Zipf ({zipf:g})", load, sizes)


def num_requests(rate: float, seconds: float) -> int:
    """Of one run."""
    return max(20, round(rate * seconds))


def saturation(
    options: argparse.Namespace, names: Sequence[str], zipf: float, profile: CostProfile, sim: SimulationOptions
) -> float:
    """Requests a second that the simulator answers when so many are there at once."""
    # With fewer than there are seats for, prompts would have been computed before the time that is counted.
    burst = options.burst or max(200, 4 * sim.replicas * profile.max_num_seqs)
    asked = workload(options, names, zipf, 1.0, burst, options.seeds[0])
    at_once = [replace(arrival, time=0.0) for arrival in asked.arrivals]
    return pace(simulate(at_once, profile, replace(sim, token_times=False)).records)


def pace(records: Sequence[RequestRecord]) -> float:
    """Requests that end a second, between the first and the last quarter: while the last ones end, seats are empty."""
    ends = sorted(record.finished for record in records)
    quarter = len(ends) // 4
    return (len(ends) - 1 - 2 * quarter) / (ends[-1 - quarter] - ends[quarter])


def compare(
    options: argparse.Namespace, names: Sequence[str], profile: CostProfile, sim: SimulationOptions, serve: Serve
) -> dict[str, Any]:
    """Both at every rate, from every seed."""
    rates = []
    for load in options.loads:
        zipf = options.zipf if load.zipf is None else load.zipf
        most = saturation(options, names, zipf, profile, sim)
        rate = load.share * most
        runs = []
        for seed in options.seeds:
            asked = workload(options, names, zipf, rate, num_requests(rate, options.seconds), seed)
            records, merged = serve(asked)
            simulated = simulate(asked.arrivals, profile, sim)
            runs.append({"seed": seed, "live_merged_share": merged, **side_by_side(records, simulated)})
        found = over_seeds(runs)
        rates.append({"load": load.share, "zipf": zipf, "saturation": most, "rate": rate, **found, "runs": runs})
        told = f"load {load.share:g}, Zipf ({zipf:g}), {rate:.2f} requests/s"
        print(f"{told}, simulated over live: {words(found)}", flush=True)
    worst = max(
        abs(one["simulated_over_live"]["normalized_latency"][name]["mean"] - 1)
        for one in rates
        for name in ("mean", "p90")
    )
    print(f"largest distance of mean and P90 s/token, over seeds: {worst:.1%}")
    return {"largest_distance": worst, "rates": rates}


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, least and most of each ratio."""

    def span(figure: str, name: str) -> dict[str, float]:
        values = [run["simulated_over_live"][figure][name] for run in runs]
        return {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}

    figures = runs[0]["simulated_over_live"].items()
    return {"simulated_over_live": {figure: {name: span(figure, name) for name in own} for figure, own in figures}}


def words(found: Mapping[str, Any]) -> str:
    spans = found["simulated_over_live"]["normalized_latency"]
    return ", ".join(
        f"{told} {own['mean']:.3f} ({own['least']:.3f} to {own['most']:.3f})"
        for told, own in (("mean", spans["mean"]), ("P90", spans["p90"]))
    )


def side_by_side(records: Sequence[RequestRecord], simulated: SimulationResult) -> dict[str, Any]:
    """Two summaries, and their ratios."""
    found = {"live": asdict(summarize(records)), "simulated": asdict(summarize(simulated.records))}
    return {
        **found,
        "requests": len(records),
        "simulated_over_live": ratios(found["simulated"], found["live"]),
        "simulated_merged_share": simulated_merged_share(simulated),
        "simulated_switches": sum(r.switches for r in simulated.replicas),
        "simulated_migration": asdict(simulated.migration),
    }


def simulated_merged_share(result: SimulationResult) -> float:
    """Of all replicas' steps."""
    merged = sum(replica.merged_steps for replica in result.replicas)
    return merged / max(1, sum(replica.steps for replica in result.replicas))


def ratios(simulated: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of two summaries."""
    names = ("mean", "p50", "p90", "p99")
    return {figure: {name: simulated[figure][name] / live[figure][name] for name in names} for figure in FIGURES}


@contextlib.contextmanager
def server(options: argparse.Namespace, folder: Path, profile: CostProfile) -> Iterator[tuple[list[str], Serve]]:
    """`peft-dist serve` with the replicas; what puts a workload to it with `peft-dist bench`."""
    config, adapters = prepare(options, folder, options.adapters, num_threads=options.threads)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "peft_dist.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ready = folder / "port"
    config = replace(config, max_num_seqs=profile.max_num_seqs, num_blocks=profile.num_blocks)
    serving = [
        *(*command, "serve", config.model, "--port", str(port), "--port-file", str(ready)),
        *("--replicas", str(options.replicas), *serve_options(config)),
        *(part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")),
    ]
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(serving, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def serve(asked: arrivals.Workload) -> Served:
        load, output = folder / "load.jsonl", folder / "run.json"
        files.write(asked, load)
        url = f"http://127.0.0.1:{port}"
        before = steps_by_mode(url)
        bench = [*command, "bench", url, str(load), "--output", str(output), "--end-id", "2000"]
        bench += ["--max-lateness", str(options.max_lateness)]
        subprocess.run(bench, env=environment, check=True, stdout=subprocess.DEVNULL)
        return read_json(output).records, merged_share(before, steps_by_mode(url))

    try:
        while not ready.exists():
            if process.poll() is not None:
                raise SystemExit(f"the server ended:\n{(folder / 'serve.log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield list(adapters), serve
    finally:
        process.terminate()
        process.wait(60)


def serve_options(config: EngineConfig) -> list[str]:
    """What `peft-dist serve` is to be told of a configuration. Raises SystemExit for what it cannot be."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name == "model":
            continue
        name = _OPTIONS.get(field.name, field.name)
        if name is None:
            raise SystemExit(f"--set {field.name}: peft-dist serve has no option for it, use --engine")
        found.append(f"--{name.replace('_', '-')}")
        found += [] if isinstance(value, bool) else [str(value)]
    return found


def through_http(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Replicas on the CPU behind the server."""
    path = options.profile or folder / "live.json"
    if options.profile is None:
        measure = [sys.executable, str(ROOT / "scripts" / "profile_costs.py"), "--output", str(path)]
        beside = options.replicas - 1 if options.beside is None else options.beside
        measure += ["--beside", str(beside), "--threads", str(options.threads)]
        measure += ["--adapters", str(options.adapters), "--rank", str(options.rank)]
        # Whatever is measured is what is served.
        measure += ["--set", "num_blocks=2048", *options.set] + (["--shape", options.shape] if options.shape else [])
        subprocess.run(measure, check=True)
    profile = CostProfile.load(path)
    sim = SimulationOptions(replicas=options.replicas, rank=options.rank, seed=options.seeds[0])
    with server(options, folder, profile) as (names, serve):
        found = compare(options, names, profile, sim, serve)
    return {"profile": asdict(profile), "options": sim.told(), **found}


def in_process(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One replica in this process, driven as a worker drives it."""
    runs, profile = measured_replica(options, folder)
    # No socket and no orchestrator: a report is read as soon as it is made.
    profile = replace(profile, message_seconds=0.0)
    sim = SimulationOptions(rank=options.rank, seed=options.seeds[0], policy=options.policy)
    names = [spec.name for spec in runs.specs]
    runs.use(policy=options.policy, max_loras=profile.max_loras)
    # As `peft-dist bench` warms a server up.
    runs.batch([*range(len(names))], 16, 4)
    found = compare(options, names, profile, sim, lambda asked: in_engine(runs, asked))
    runs.replica.close()
    return {"profile": asdict(profile), "options": sim.told(), **found}


def settings(options: argparse.Namespace) -> dict[str, str]:
    """For results: of files, which lie elsewhere on other machines, the names."""
    given = {key: value.name if isinstance(value, Path) else value for key, value in vars(options).items()}
    given["loads"] = [f"{one.share:g}" + (f":{one.zipf:g}" if one.zipf is not None else "") for one in options.loads]
    return {key: str(value) for key, value in given.items() if key != "output"}


def in_engine(runs: CostRuns, asked: arrivals.Workload) -> Served:
    engine = runs.replica.engine
    before = {"merged": engine.num_merged_steps, "all": engine.num_steps}
    records = engine_records(runs, asked)
    return records, merged_share(before, {"merged": engine.num_merged_steps, "all": engine.num_steps})


def steps_by_mode(url: str) -> dict[str, float]:
    """Of all replicas of a server so far."""
    found: dict[str, float] = {"merged": 0.0, "all": 0.0}
    for (name, labels), value in live.read(live.fetch(f"{url}/metrics")).items():
        if name == "peft_dist:steps_total":
            found["all"] += value
            found["merged"] += value if ("mode", "merged") in labels else 0.0
    return found


def merged_share(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    return (after["merged"] - before["merged"]) / max(after["all"] - before["all"], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--engine", action="store_true", help="one replica in this process")
    parser.add_argument("--profile", type=Path, help="measured before on this machine")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each replica on the CPU")
    parser.add_argument("--beside", type=int, help="replicas that compute while it is measured (default: all others)")
    parser.add_argument("--max-lateness", type=float, default=0.05, help="seconds, of the client (P99)")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--policy", default="credit", help="with --engine")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument(
        "--loads", type=Load.parse, nargs="+", default=[Load(0.3), Load(0.55), Load(0.8), Load(0.95, 2.0)],
        metavar="SHARE[:ZIPF]", help="shares of saturation",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals in each run")
    parser.add_argument("--burst", type=int, help="requests at once, of which saturation is told (4 for each seat)")
    parser.add_argument("--max-prompt", type=int, default=200, help="tokens; longer ones are left out")
    parser.add_argument("--max-total", type=int, default=260)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of each at each load")
    parser.add_argument("--name", default="", help="of the result file: live_vs_sim_NAME.json")
    parser.add_argument("--output", type=Path, help="folder for the result (default: docs/results)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = (in_process if options.engine else through_http)(options, Path(folder))
    name = "live_vs_sim" + (f"_{options.name}" if options.name else "")
    print(write_result(name, {"settings": settings(options), **json.loads(json.dumps(found))}, options.output))


if __name__ == "__main__":
    main()
