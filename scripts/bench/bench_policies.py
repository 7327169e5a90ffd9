"""One replica under `fcfs`, `merge` and `credit`: the same Poisson arrivals for each, at four skews, several seeds.

    python scripts/bench/bench_policies.py [--seeds 5] [--requests 60] [--load 0.9] [--rank 8] [--dtype float32]
    python scripts/bench/bench_policies.py --join A.json B.json     # put files of single seeds together

For each skew and seed the three policies serve the same requests at the same times, one after another, in an order
that turns with the seed. The arrival rate is `load` times what `fcfs` answers when all requests are there at once.
Writes docs/results/policies[_NAME].json and .svg: mean and P90 seconds per output token of every run, and for `credit`
against the better of the other two the mean paired difference with its 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.policy_report import plot, summarise, table
from bench.report import write_result
from bench.workload import write_adapters

POLICIES = ("fcfs", "merge", "credit")
NUM_ADAPTERS = 8
SKEWS = {"uniform": 1 / NUM_ADAPTERS, "40 % on one": 0.4, "70 % on one": 0.7, "90 % on one": 0.9}
Arrival = tuple[float, int, list[int], int]
"""Seconds, adapter, prompt ids, output tokens."""


def arrivals(share: float, rate: float, count: int, seed: int) -> list[Arrival]:
    """Poisson arrivals; adapter 0 gets ``share`` of them, the others the rest evenly."""
    rng = random.Random(f"{share}/{seed}")
    now, found = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        adapter = 0 if rng.random() < share else rng.randrange(1, NUM_ADAPTERS)
        prompt = [rng.randrange(100, 40_000) for _ in range(rng.randrange(16, 64))]
        found.append((now, adapter, prompt, rng.randrange(16, 48)))
    return found


def serve(replica: Any, config: Any, specs: list[Any], load: list[Arrival]) -> dict[str, Any]:
    """Run the arrivals in real time through an engine of their own; seconds per output token of each request."""
    from peft_dist.core.request import Request
    from peft_dist.core.sampling_params import SamplingParams

    engine = replica.restart(config)
    pending = [
        Request(
            str(i), prompt, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True), 0, at, specs[adapter]
        )
        for i, (at, adapter, prompt, count) in enumerate(load)
    ]
    pending.reverse()
    due = {request.request_id: request.arrival_time for request in pending}
    latencies: list[float] = []
    start = time.perf_counter()
    while pending or engine.has_work:
        now = time.perf_counter() - start
        while pending and pending[-1].arrival_time <= now:
            engine.add_request(pending.pop())
        if not engine.has_work:
            # Nothing to do before the next arrival: an open loop waits for it.
            time.sleep(max(0.0, pending[-1].arrival_time - now))
            continue
        for progress in engine.step(time.perf_counter() - start):
            if progress.finish_reason:
                tokens = progress.first_index + len(progress.token_ids)
                latencies.append((time.perf_counter() - start - due[progress.request_id]) / tokens)
    return {
        "seconds": time.perf_counter() - start,
        "mean": statistics.fmean(latencies),
        "p90": sorted(latencies)[int(0.9 * (len(latencies) - 1))],
        "switches": engine.num_switches,
        "switch_seconds": engine.switch_seconds,
        "longest_overtaken": engine.scheduler.policy.report().get("longest_overtaken_seconds"),
    }


def saturation(replica: Any, config: Any, specs: list[Any], seed: int) -> float:
    """Requests per second that `fcfs` answers when all are there at once."""
    load = [(0.0, *rest) for _, *rest in arrivals(SKEWS["uniform"], 1.0, 48, seed)]
    return len(load) / serve(replica, replace(config, policy="fcfs"), specs, load)["seconds"]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from demo_model import ensure_demo_model

    from peft_dist.core.config import EngineConfig
    from peft_dist.runner.replica import build_replica

    model = options.model or ensure_demo_model()
    config = EngineConfig(
        str(model),
        device=options.device,
        dtype=options.dtype,
        num_threads=options.threads,
        num_blocks=2048,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        merge=options.merge,
    )
    replica = build_replica(config)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(model, Path(folder), options.rank, NUM_ADAPTERS)
        specs = [replica.load_adapter(name, path) for name, path in adapters.items()]
        serve(replica, config, specs, [(0.0, a, [5] * 20, 4) for a in range(NUM_ADAPTERS)])
        rate = options.load * saturation(replica, config, specs, 0)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for skew, share in SKEWS.items():
                load = arrivals(share, rate, options.requests, seed)
                turn = seed % len(POLICIES)
                for policy in POLICIES[turn:] + POLICIES[:turn]:
                    minority = options.merged_minority and policy == "credit"
                    chosen = replace(config, policy=policy, merged_minority=minority)
                    run = serve(replica, chosen, specs, load)
                    runs.append({"skew": skew, "seed": seed, "policy": policy, **run})
                    print(f"{skew:12} seed {seed} {policy:7} mean {run['mean']:.4f} P90 {run['p90']:.4f} s/token, "
                          f"{run['switches']} switches", flush=True)  # fmt: skip
    return {"rate": rate, "cost_model": replica.engine.cost.to_dict()["step"]["coefficients"], "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="another Llama-like model folder (default: the demo's SmolLM2)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--load", type=float, default=0.9, help="arrival rate as a share of saturation")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--merge", default="auto")
    parser.add_argument("--merged-minority", action="store_true")
    parser.add_argument("--name", default="", help="of the result file: policies_NAME.json")
    parser.add_argument("--output", type=Path, help="folder for the result (default: docs/results)")
    parser.add_argument("--join", type=Path, nargs="+", help="result files of single seeds to put together instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.join:
        parts = [json.loads(path.read_text())["figures"] for path in options.join]
        figures = {**parts[0], "rate": [part["rate"] for part in parts]}
        figures["runs"] = [run for part in parts for run in part["runs"]]
    else:
        settings = {key: str(value) for key, value in vars(options).items() if key not in ("join", "output")}
        figures = {"settings": settings, **measure(options)}
    figures["summary"] = summarise(figures["runs"])
    print(table(figures["summary"]))
    written = write_result("policies" + (f"_{options.name}" if options.name else ""), figures, options.output)
    plot(figures["summary"], written.with_suffix(".svg"))
    print("written to", written)


if __name__ == "__main__":
    main()
