"""How much faster than real time the simulator runs, at the size of the paper's cluster and beyond.

    python scripts/bench/bench_simulator.py --replicas 32 --adapters 128 --requests 100000 --load 0.8 [--single]

Replicas have 16 seats and the paper's times (15 ms for a merged step, 27 ms for an unmerged one, 20 ms for a switch);
arrivals are Poisson with uniform popularity, lengths the synthetic ShareGPT ones. Saturation is counted, not searched
for: all seats full of first-come batches, replicas * 16 / (27 ms * mean output tokens) requests a second. With
``--single`` every step is taken by itself. Writes docs/results/simulator.json (one entry by configuration, others are
kept): virtual over real seconds from the first arrival to the last token, microseconds a step, peak memory of the
process, and a SHA-256 of what became of every request, which is the same on every machine and in both modes.
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import json
import pstats
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import RESULTS, write_result
from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig
from peft_dist.core.cost_model import CostModel
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.sim.replica import SimHardware
from peft_dist.sim.simulator import Outcome, SimCluster, Simulator
from peft_dist.workload.arrivals import Workload, uniform
from peft_dist.workload.generator import Load, from_shares
from peft_dist.workload.lengths import Filters, synthetic

SEATS = 16
UNMERGED = 27e-3
# Llama-2-7B in 16 bits on 80 GB: 16 tokens a block, half a megabyte a token.
BLOCKS, BLOCK_BYTES = 6000, 16 << 19
ADAPTER_BYTES = 40 << 20


def cluster(options: argparse.Namespace) -> SimCluster:
    config = EngineConfig(
        "simulated",
        max_num_seqs=SEATS,
        max_loras=options.slots,
        max_num_batched_tokens=2048,
        max_model_len=4096,
        enable_prefix_caching=False,
        depth=0,
        policy=options.policy,
    )
    prior = CostModel if options.learning else CostModel.paper
    hardware = SimHardware(config, CostModel.paper(), prior, BLOCKS, BLOCK_BYTES)
    names = adapter_names(options.adapters)
    specs = {name: AdapterSpec(name, f"{i:064d}", name, {"q": 16}, ADAPTER_BYTES) for i, name in enumerate(names)}
    settings = OrchestratorOptions(SEATS, 1 << 20, seed=1, migration=options.migration)
    return SimCluster([hardware] * options.replicas, specs, settings)


def adapter_names(count: int) -> list[str]:
    return [f"a{i}" for i in range(count)]


def workload(options: argparse.Namespace) -> tuple[Workload, float]:
    """Arrivals, and the rate that counts as saturation."""
    lengths = synthetic("sharegpt", Filters(), options.seed)
    mean = float(lengths.sample(20_000, options.seed)[:, 1].mean())
    saturation = options.replicas * SEATS / (UNMERGED * mean)
    load = Load(options.load * saturation, options.requests, seed=options.seed)
    names = adapter_names(options.adapters)
    return from_shares(names, uniform(options.adapters), "uniform", load, lengths), saturation


def digest(outcomes: Iterable[Outcome]) -> str:
    """Of times to the last bit."""
    found = hashlib.sha256()
    for one in outcomes:
        found.update(repr((one.first, one.last, one.tokens, one.queue, one.error)).encode())
    return found.hexdigest()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    offered, saturation = workload(options)
    simulator = Simulator(cluster(options), advance=not options.single)
    began, used = time.perf_counter(), time.process_time()
    outcomes = simulator.run(offered.arrivals)
    real, used = time.perf_counter() - began, time.process_time() - used
    virtual = max(one.last or 0.0 for one in outcomes)
    steps = sum(replica.engine.num_steps for replica in simulator.replicas)
    tokens = sum(one.tokens for one in outcomes)
    spent = sorted((o.last - o.arrival.time) / o.tokens for o in outcomes if o.last is not None and o.tokens)
    return {
        "replicas": options.replicas,
        "adapters": options.adapters,
        "requests": options.requests,
        "policy": options.policy,
        "migration": options.migration,
        "load": options.load,
        "advance": not options.single,
        "saturation_requests_per_second": saturation,
        "virtual_seconds": virtual,
        "real_seconds": real,
        "cpu_seconds": used,
        "virtual_over_real": virtual / real,
        "virtual_over_cpu": virtual / used,
        "steps": steps,
        "microseconds_per_step": 1e6 * real / steps,
        "merged_steps": sum(replica.engine.num_merged_steps for replica in simulator.replicas),
        "output_tokens": tokens,
        "mean_seconds_per_token": sum(spent) / len(spent),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "sha256": digest(outcomes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=128)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--load", type=float, default=0.8, help="share of saturation")
    parser.add_argument("--slots", type=int, default=16, help="adapters that fit a device")
    parser.add_argument("--policy", default="credit")
    parser.add_argument("--migration", default="dlora")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--single", action="store_true", help="take every step by itself")
    parser.add_argument("--learning", action="store_true", help="engines learn what steps take, from a default prior")
    parser.add_argument("--profile", choices=("tottime", "cumtime"), help="print where time goes, and write nothing")
    parser.add_argument("--output", type=Path, help="folder for the result (default: docs/results)")
    options = parser.parse_args()
    if options.profile:
        with cProfile.Profile(time.process_time) as profile:
            measure(options)
        pstats.Stats(profile).sort_stats(options.profile).print_stats(60)
        return
    figures = measure(options)
    print(json.dumps(figures, indent=2))
    path = (options.output or RESULTS) / "simulator.json"
    known = json.loads(path.read_text())["figures"] if path.exists() else {}
    name = f"{options.replicas} x {options.adapters} x {options.requests}, {options.policy}, {options.migration}"
    name += ", singly" if options.single else ""
    print(write_result("simulator", {**known, name: figures}, options.output))


if __name__ == "__main__":
    main()
