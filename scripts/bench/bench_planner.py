"""Migration plans of whole clusters within the limit: who made them, what they gain over greedy, how long they take.

    python scripts/bench/bench_planner.py [--plans 100] [--limit 0.2] [--orchestrators 20]

Each plan is for a cluster in the middle of a burst: adapters placed for their usual rates (Zipf), a few of which are
suddenly asked for eight times as often, and requests of lognormal lengths where dispatch left them, some running. A
`Planner` makes the plans, its solver in a warm process of its own, while a task looks every millisecond at how late the
event loop comes. Then the same in an orchestrator (bench_rebalancing.py). Writes docs/results/planner.json: by cluster
the shares of plans from the solver, from greedy and with nothing to do, gains, times, kills, and the longest stall of
the loop; and how busy the machine was.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from peft_dist.core.collector import freeze_heap
from peft_dist.orchestrator.survey import SLICE
from peft_dist.placement.aggregation import Grouping, RequestLoad, pick
from peft_dist.placement.costs import ReplicaCosts
from peft_dist.placement.placing import place
from peft_dist.placement.planner import Planner
from peft_dist.placement.problem import MEAN_WEIGHT
from peft_dist.placement.types import AdapterLoad, ClusterView, MigrationPlan, ReplicaLoad, RequestClass

CLUSTERS = [(8, 400, 40), (8, 3200, 40), (32, 2000, 128)]
ADAPTER_BYTES = 80 << 20
BLOCK = 16
BLOCK_BYTES = BLOCK * (128 << 10)
KV_BLOCKS = 20_000
# An 8B model on a datacentre GPU: 64 sequences a step of 10 ms.
COSTS = ReplicaCosts(5e-5, 1.6e-4, (1e-3, 4e-11), (5e-3, 1e-9), (1e-3, 4e-11), 2 * BLOCK_BYTES * 4e-11, 5e-3)


def cluster(replicas: int, requests: int, adapters: int, seed: int) -> tuple[ClusterView, list[RequestLoad]]:
    """A view without classes, and its requests."""
    rng = random.Random(seed)
    rates = [1 / (k + 1) ** 0.9 for k in range(adapters)]
    loads = [AdapterLoad(f"a{k}", ADAPTER_BYTES, rate) for k, rate in enumerate(rates)]
    slots = max(4, 3 * adapters // replicas)
    empty = [ReplicaLoad(i, COSTS, KV_BLOCKS, KV_BLOCKS, slots * ADAPTER_BYTES) for i in range(replicas)]
    hosts = place(ClusterView(empty, loads, [])).hosts
    for k in rng.sample(range(adapters), 3):
        rates[k] *= 8
    chosen = rng.choices(range(adapters), rates, k=requests)
    found = [_request(rng, f"r{i}", rng.choice(sorted(hosts[f"a{k}"])), f"a{k}") for i, k in enumerate(chosen)]
    used: Counter[int] = Counter()
    for one in found:
        used[one.replica] += one.kv_blocks if one.context_tokens else 0
    names = sorted(hosts)
    known = [
        msgspec.structs.replace(
            own,
            free_kv_blocks=max(0, KV_BLOCKS - used[own.replica_id]),
            device=[name for name in names if own.replica_id in hosts[name]],
            # Three of four adapters were used here before and are in the host's memory.
            host=[name for name in names if own.replica_id in hosts[name] or rng.random() < 0.75],
        )
        for own in empty
    ]
    return ClusterView(known, loads, []), found


def _request(rng: random.Random, name: str, replica: int, adapter: str) -> RequestLoad:
    prompt, output = int(rng.lognormvariate(5.5, 0.9)) + 1, rng.lognormvariate(5.0, 0.8)
    running = rng.random() < 0.5
    done = int(rng.random() * output) if running else 0
    context = prompt + done if running else 0
    blocks = (prompt + done) // BLOCK + 1
    kv = blocks * BLOCK_BYTES if running else 0
    return RequestLoad(name, replica, adapter, 1 if running else prompt, output - done, context, blocks, kv)


async def grouped_in_slices(requests: list[RequestLoad]) -> tuple[list[RequestClass], list[list[str]]]:
    """As an orchestrator does it."""
    grouping, left = Grouping(), iter(requests)
    while some := list(itertools.islice(left, SLICE)):
        for one in some:
            grouping.add(one)
        await asyncio.sleep(0)
    return grouping.result()


class Stalls:
    """How late a task of the loop comes that wants to run every millisecond, and how much the loop computed meanwhile.

    The first is what a stream notices. The second is what others on the machine have no part in.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    async def watch(self) -> None:
        while True:
            start, cpu = time.perf_counter(), time.thread_time()
            await asyncio.sleep(1e-3)
            self.seconds.append(time.perf_counter() - start - 1e-3)
            self.cpu_seconds.append(time.thread_time() - cpu)


async def measure(size: tuple[int, int, int], plans: int, limit: float) -> dict[str, Any]:
    """Figures of ``plans`` plans for clusters of one size."""
    stalls, found, seconds, grouping, classes = Stalls(), [], [], [], []
    cases = [cluster(*size, seed) for seed in range(plans)]
    freeze_heap()
    async with Planner(limit) as planner:
        await planner.warm()
        watching = asyncio.create_task(stalls.watch())
        for view, requests in cases:
            # A plan that was killed leaves a process that is starting: the next plan is 10 s away, not now.
            await planner.warm()
            start = time.perf_counter()
            grouped, members = await grouped_in_slices(requests)
            view = msgspec.structs.replace(view, classes=grouped)
            grouping.append(time.perf_counter() - start)
            # What a service has others do before it goes on with a plan.
            await asyncio.sleep(0)
            start = time.perf_counter()
            plan = await planner.plan(view)
            seconds.append(time.perf_counter() - start)
            assert len(pick(plan, members)) == sum(move.count for move in plan.moves)
            found.append(plan)
            classes.append(len(grouped))
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        killed = planner.num_restarts
    return {
        "replicas, requests, adapters": size,
        "classes": statistics.mean(classes),
        **shares(found),
        "killed": killed,
        "load_average": os.getloadavg()[0],
        "plan_seconds": quantiles(seconds),
        "aggregate_seconds": quantiles(grouping),
        "loop_stall_seconds": quantiles(stalls.seconds),
        "loop_stall_cpu_seconds": quantiles(stalls.cpu_seconds),
    }


def shares(found: list[MigrationPlan]) -> dict[str, Any]:
    """Who made the plans, and what the solver's gain."""
    origins = Counter(plan.origin for plan in found)
    gains = [1 - plan.after / plan.greedy for plan in found if plan.origin == "solver"]
    return {
        "share": {origin: origins[origin] / len(found) for origin in ("solver", "greedy", "stay")},
        "solver_strictly_better": sum(gain > 0 for gain in gains),
        "solver_never_worse": all(p.after <= p.greedy and p.objective <= p.greedy_objective for p in found),
        "gain_over_greedy": quantiles(gains),
        "gain_over_staying": quantiles([1 - plan.after / plan.before for plan in found]),
        # What perfect balance, with the same work, would still gain.
        "last_after_mean": quantiles([plan.after / mean_of(plan) - 1 for plan in found]),
        "moves": statistics.mean(sum(move.count for move in plan.moves) for plan in found),
    }


def mean_of(plan: MigrationPlan) -> float:
    """The replicas' mean finishing time under a plan, which its objective holds."""
    return (plan.objective - plan.after) / MEAN_WEIGHT


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [float("nan")]
    last = len(ordered) - 1
    return {"p50": ordered[last // 2], "p99": ordered[round(0.99 * last)], "max": ordered[last]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=100, help="for each cluster")
    parser.add_argument("--orchestrators", type=int, default=20, help="for each cluster")
    parser.add_argument("--limit", type=float, default=0.2, help="seconds from a view to its plan")
    args = parser.parse_args()
    figures = []
    for size in CLUSTERS:
        figures.append(asyncio.run(measure(size, args.plans, args.limit)))
        print(msgspec.json.format(msgspec.json.encode(figures[-1]), indent=2).decode(), flush=True)
    from bench.bench_rebalancing import measure as measure_orchestrators

    whole = []
    for size in CLUSTERS:
        whole.append(asyncio.run(measure_orchestrators(size, args.orchestrators, args.limit)))
        print(msgspec.json.format(msgspec.json.encode(whole[-1]), indent=2).decode(), flush=True)
    setting = {"limit": args.limit, "plans": args.plans, "orchestrators": args.orchestrators}
    print(write_result("planner", {**setting, "clusters": figures, "orchestrator": whole}))


if __name__ == "__main__":
    main()
