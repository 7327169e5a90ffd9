"""The same workload live and simulated: how far are seconds a token apart?

    python scripts/experiments/live_vs_sim.py                        # two CPU replicas of SmolLM2, through HTTP
    python scripts/experiments/live_vs_sim.py --engine --shape 8b    # one replica in this process, no HTTP: for a GPU

First a profile of this machine is measured (or `--profile FILE` taken). Its saturation is found by simulating all
requests of a run at once; then requests come at each of `--loads` of that rate, live and simulated. The simulator gets
the workload and the profile, and nothing of the live run. Writes docs/results/live_vs_sim[_NAME].json: both summaries
at each rate, and simulated over live of the mean and the P90 of seconds a token (aim: within 15 %).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.cluster_engine import add_engine_options, prepare
from bench.report import write_result

from experiments.live_engine import engine_records, measured_replica
from peft_dist.sim.experiment import SimulationResult, simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload import arrivals, files, generator, lengths
from peft_dist.workload.records import RequestRecord, read_json, summarize

ROOT = Path(__file__).parents[2]
FIGURES = ("normalized_latency", "ttft", "tpot", "e2e")
Serve = Callable[[arrivals.Workload], Sequence[RequestRecord]]


def workload(options: argparse.Namespace, names: Sequence[str], rate: float, count: int) -> arrivals.Workload:
    """Poisson arrivals of adapters with Zipf popularity, and lengths like ShareGPT's, cut short."""
    sizes = lengths.synthetic(
        "sharegpt", lengths.Filters(max_prompt=options.max_prompt, max_total=options.max_total), 0
    )
    shares = arrivals.zipf(len(names), options.zipf)
    load = generator.Load(rate, count, seed=options.seed)
    return generator.from_shares(names, shares, f"Zipf ({options.zipf:g})", load, sizes)


def saturation(
    options: argparse.Namespace, names: Sequence[str], profile: CostProfile, sim: SimulationOptions
) -> float:
    """Requests a second that the simulator answers when so many are there at once."""
    asked = workload(options, names, 1.0, options.burst)
    at_once = [replace(arrival, time=0.0) for arrival in asked.arrivals]
    result = simulate(at_once, profile, replace(sim, token_times=False))
    return len(at_once) / result.seconds


def compare(
    options: argparse.Namespace, names: Sequence[str], profile: CostProfile, sim: SimulationOptions, serve: Serve
) -> dict[str, Any]:
    """Both at every rate."""
    most = saturation(options, names, profile, sim)
    print(f"simulated saturation: {most:.2f} requests/s", flush=True)
    rates = []
    for load in options.loads:
        rate = load * most
        asked = workload(options, names, rate, max(20, round(rate * options.seconds)))
        live = serve(asked)
        simulated = simulate(asked.arrivals, profile, sim)
        rates.append({"load": load, "rate": rate, "requests": len(live), **side_by_side(live, simulated)})
        told = rates[-1]["simulated_over_live"]["normalized_latency"]
        print(
            f"load {load:g}, {rate:.2f} requests/s: mean {told['mean']:.3f}, P90 {told['p90']:.3f} of live", flush=True
        )
    worst = max(
        abs(one["simulated_over_live"]["normalized_latency"][name] - 1) for one in rates for name in ("mean", "p90")
    )
    print(f"largest distance of mean and P90 s/token: {worst:.1%}")
    return {"saturation": most, "largest_distance": worst, "rates": rates}


def side_by_side(live: Sequence[RequestRecord], simulated: SimulationResult) -> dict[str, Any]:
    """Two summaries, and their ratios."""
    found = {"live": summarize(live), "simulated": summarize(simulated.records)}
    ratios: dict[str, dict[str, float]] = {}
    for figure in FIGURES:
        real, virtual = (getattr(summary, figure) for summary in found.values())
        ratios[figure] = {name: getattr(virtual, name) / getattr(real, name) for name in ("mean", "p50", "p90", "p99")}
    return {
        **{name: asdict(summary) for name, summary in found.items()},
        "simulated_over_live": ratios,
        "simulated_merged_share": sum(r.merged_steps for r in simulated.replicas)
        / max(1, sum(r.steps for r in simulated.replicas)),
        "simulated_switches": sum(r.switches for r in simulated.replicas),
        "simulated_migration": asdict(simulated.migration),
    }


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
    serving = [
        *(*command, "serve", config.model, "--port", str(port), "--port-file", str(ready), "--device", "cpu"),
        *("--dtype", "float32", "--replicas", str(options.replicas), "--threads", str(options.threads)),
        *("--max-num-seqs", str(profile.max_num_seqs), "--num-blocks", str(profile.num_blocks)),
        *(part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")),
    ]
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(serving, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def serve(asked: arrivals.Workload) -> Sequence[RequestRecord]:
        load, output = folder / "load.jsonl", folder / "run.json"
        files.write(asked, load)
        url = f"http://127.0.0.1:{port}"
        bench = [*command, "bench", url, str(load), "--output", str(output), "--end-id", "2000"]
        bench += ["--max-lateness", str(options.max_lateness)]
        subprocess.run(bench, env=environment, check=True, stdout=subprocess.DEVNULL)
        return read_json(output).records

    try:
        while not ready.exists():
            if process.poll() is not None:
                raise SystemExit(f"the server ended:\n{(folder / 'serve.log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield list(adapters), serve
    finally:
        process.terminate()
        process.wait(60)


def through_http(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Replicas on the CPU behind the server."""
    path = options.profile or folder / "live.json"
    if options.profile is None:
        measure = [sys.executable, str(ROOT / "scripts" / "profile_costs.py"), "--output", str(path)]
        beside = options.replicas - 1 if options.beside is None else options.beside
        measure += ["--beside", str(beside), "--threads", str(options.threads)]
        measure += ["--adapters", str(options.adapters), "--rank", str(options.rank), "--set", "num_blocks=2048"]
        subprocess.run(measure, check=True)
    profile = CostProfile.load(path)
    sim = SimulationOptions(replicas=options.replicas, rank=options.rank, seed=options.seed)
    with server(options, folder, profile) as (names, serve):
        found = compare(options, names, profile, sim, serve)
    return {"profile": asdict(profile), "options": sim.told(), **found}


def in_process(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One replica in this process, driven as a worker drives it."""
    runs, profile = measured_replica(options, folder)
    # No socket and no orchestrator: a report is read as soon as it is made.
    profile = replace(profile, message_seconds=0.0)
    sim = SimulationOptions(rank=options.rank, seed=options.seed, policy=options.policy)
    names = [spec.name for spec in runs.specs]
    runs.use(policy=options.policy, max_loras=profile.max_loras)
    # As `peft-dist bench` warms a server up.
    runs.batch([*range(len(names))], 16, 4)
    found = compare(options, names, profile, sim, lambda asked: engine_records(runs, asked))
    runs.replica.close()
    return {"profile": asdict(profile), "options": sim.told(), **found}


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
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.55, 0.8], help="shares of saturation")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals at each rate")
    parser.add_argument("--burst", type=int, default=200, help="requests at once, of which saturation is told")
    parser.add_argument("--max-prompt", type=int, default=200, help="tokens; longer ones are left out")
    parser.add_argument("--max-total", type=int, default=260)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="", help="of the result file: live_vs_sim_NAME.json")
    parser.add_argument("--output", type=Path, help="folder for the result (default: docs/results)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = (in_process if options.engine else through_http)(options, Path(folder))
    settings = {key: str(value) for key, value in vars(options).items() if key != "output"}
    name = "live_vs_sim" + (f"_{options.name}" if options.name else "")
    print(write_result(name, {"settings": settings, **json.loads(json.dumps(found))}, options.output))


if __name__ == "__main__":
    main()
