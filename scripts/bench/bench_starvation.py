"""For how long a waiting request is overtaken at most, in a replica that is short of everything, against the bound.

    python scripts/bench/bench_starvation.py [--bound 0.5] [--seconds 8] [--load 1.1] [--share 0.7] [--rank 8]

SmolLM2 with a nearly full KV pool, few adapter slots and one adapter that most requests ask for serves Poisson arrivals
of `load` times what it can answer, once with each policy. After every step all unfinished requests are looked at. One
that did not run is *behind* while a younger one runs, and *overtaken* if it could have run had there been only its
elders: seats, adapter slots and KV blocks would have been enough. Its seconds start anew whenever it runs. Writes
docs/results/starvation.json: by policy the longest such times, what the policy itself counted, the longest step with
its switch, which may come on top of the bound, and by how much being overtaken missed the bound.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from bench.workload import write_adapters

POLICIES = ("fcfs", "merge", "credit")
NUM_ADAPTERS = 6
BLOCK = 16
Arrival = tuple[float, int, list[int], int]
"""Seconds, adapter, prompt ids, output tokens."""


def arrivals(share: float, rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Poisson arrivals; adapter 0 gets ``share`` of them, the others the rest evenly."""
    rng = random.Random(seed)
    now, found = 0.0, []
    while (now := now + rng.expovariate(rate)) < seconds:
        adapter = 0 if rng.random() < share else rng.randrange(1, NUM_ADAPTERS)
        prompt = [rng.randrange(100, 40_000) for _ in range(rng.randrange(16, 48))]
        found.append((now, adapter, prompt, rng.randrange(8, 24)))
    return found


class Watch:
    """Seconds for which requests were behind, or overtaken, since they ran last."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._seconds: dict[str, Counter[str]] = defaultdict(Counter)
        self.longest: Counter[str] = Counter(behind=0.0, overtaken=0.0)
        self.longest_step = 0.0

    def step(self, clock: Callable[[], float]) -> list[Any]:
        """``engine.step`` with everybody in the queue looked at."""
        engine = self._engine
        queue, steps, now = list(engine.requests.values()), engine.num_steps, clock()
        could_run = self._could_run(queue)
        progress: list[Any] = engine.step(now)
        took = clock() - now
        if engine.num_steps == steps:
            return progress
        self.longest_step = max(self.longest_step, took)
        ran = [request.last_scheduled == now for request in queue]
        last = max((index for index, own in enumerate(ran) if own), default=-1)
        for index, request in enumerate(queue):
            if ran[index] or request.is_finished:
                self._seconds.pop(request.request_id, None)
            elif index < last:
                own = self._seconds[request.request_id]
                own["behind"] += took
                own["overtaken"] += took * could_run[index]
                self.longest |= own
        return progress

    def _could_run(self, queue: list[Any]) -> list[bool]:
        """Whether each request, oldest first, would have had room beside its elders."""
        scheduler = self._engine.scheduler
        limits, blocks, slots = scheduler.limits, scheduler.blocks, scheduler.adapters.space.num_slots
        needed, adapters, found = 0, {""}, []
        for index, request in enumerate(queue):
            needed += -(-request.num_tokens // blocks.block_size)
            if len(adapters) <= slots:
                adapters.add(request.content_hash)
            fits = needed <= blocks.num_blocks and index < limits.max_num_seqs
            found.append(fits and request.content_hash in adapters)
        return found


def serve(replica: Any, config: Any, specs: list[Any], load: list[Arrival]) -> dict[str, Any]:
    """Run the arrivals in real time through an engine of their own."""
    import select

    from peft_dist.core.request import Request
    from peft_dist.core.sampling_params import SamplingParams

    engine = replica.restart(config)
    pending = [
        Request(
            str(i), prompt, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True), 0, at, specs[adapter]
        )
        for i, (at, adapter, prompt, count) in enumerate(load)
    ][::-1]
    watch, start, tokens = Watch(engine), time.perf_counter(), 0

    def clock() -> float:
        return time.perf_counter() - start

    while pending or engine.has_work:
        while pending and pending[-1].arrival_time <= clock():
            engine.add_request(pending.pop())
        if not engine.has_work or engine.waits_for_load:
            # An open loop waits for the next arrival, or the end of a load.
            until = max(0.0, pending[-1].arrival_time - clock()) if pending else None
            select.select([replica.fileno()], [], [], until)
        if engine.has_work:
            tokens += sum(len(progress.token_ids) for progress in watch.step(clock))
    detail = engine.detail()
    limit = config.max_adapter_wait + watch.longest_step
    return {
        "requests": len(load),
        "seconds": round(clock(), 2),
        "tokens_per_second": round(tokens / clock(), 1),
        "longest_overtaken": round(watch.longest["overtaken"], 3),
        "longest_behind": round(watch.longest["behind"], 3),
        "longest_by_the_policys_count": round(engine.scheduler.policy.report()["longest_overtaken_seconds"], 3),
        "longest_step_with_switch": round(watch.longest_step, 3),
        "bound": config.max_adapter_wait,
        "missed_by": round(max(0.0, watch.longest["overtaken"] - limit), 3),
        "preemptions": engine.scheduler.num_preemptions,
        "adapter_loads": detail.num_adapter_loads,
        "switches": engine.num_switches,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from demo_model import ensure_demo_model

    from peft_dist.core.config import EngineConfig
    from peft_dist.runner.replica import build_replica

    model = options.model or ensure_demo_model()
    config = EngineConfig(
        str(model),
        device=options.device,
        dtype="float32",
        num_threads=options.threads,
        # Room for four sequences of five blocks, where up to 16 may run.
        num_blocks=options.blocks,
        block_size=BLOCK,
        max_model_len=options.blocks * BLOCK,
        max_num_seqs=16,
        max_num_batched_tokens=128,
        max_loras=options.slots,
        enable_prefix_caching=False,
    )
    replica = build_replica(config)
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(model, Path(folder), options.rank, NUM_ADAPTERS)
        specs = [replica.load_adapter(name, path) for name, path in adapters.items()]
        unbound = replace(config, max_adapter_wait=60.0)
        warm = serve(replica, replace(unbound, policy="fcfs"), specs, arrivals(options.share, 40.0, 0.4, 1))
        rate = options.load * warm["requests"] / warm["seconds"]
        load = arrivals(options.share, rate, options.seconds, 0)
        found: dict[str, Any] = {"requests_per_second": round(rate, 2), "policies": {}}
        for policy in options.policies:
            chosen = replace(config, policy=policy, max_adapter_wait=options.bound)
            found["policies"][policy] = serve(replica, chosen, specs, load)
            print(policy, found["policies"][policy], flush=True)
    replica.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="another Llama-like model folder (default: the demo's SmolLM2)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bound", type=float, default=0.5, help="seconds: max_adapter_wait")
    parser.add_argument("--seconds", type=float, default=8.0, help="of arrivals, for each policy")
    parser.add_argument("--load", type=float, default=1.1, help="arrival rate as a share of what can be answered")
    parser.add_argument("--share", type=float, default=0.7, help="of requests that ask for one adapter")
    parser.add_argument("--blocks", type=int, default=20, help="KV blocks of 16 tokens")
    parser.add_argument("--slots", type=int, default=2, help="adapters on the device at once")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters: the higher, the more merging saves")
    parser.add_argument("--name", default="", help="of the result file: starvation_NAME.json")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--output", type=Path, help="folder for the result (default: docs/results)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {key: str(value) for key, value in vars(options).items() if key != "output"}
    name = "starvation" + (f"_{options.name}" if options.name else "")
    print("written to", write_result(name, {"settings": settings, **measure(options)}, options.output))


if __name__ == "__main__":
    main()
