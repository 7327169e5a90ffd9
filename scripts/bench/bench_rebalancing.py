"""One plan and one placement in each of many orchestrators, from the tick to the last move; no replica runs anything.

    python scripts/bench/bench_rebalancing.py [--orchestrators 20] [--limit 0.2]

Half of the replicas got all requests, half of which have drawn tokens, before the other half became ready. Then a tick
finds the imbalance; a `Rebalancer` does what it asks for, with a warm solver, and encodes every command for a socket
that is not there. A task looks every millisecond at how late the event loop comes. Prints what bench_planner.py writes
to docs/results/planner.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.bench_planner import ADAPTER_BYTES, BLOCK, CLUSTERS, KV_BLOCKS, Stalls, quantiles
from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.collector import freeze_heap
from peft_dist.core.config import ModelInfo
from peft_dist.core.messages import (
    AdapterResult,
    LoadAdapter,
    Progress,
    Ready,
    ReplicaStats,
    SequenceProgress,
    encode_command,
)
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.events import PlacementDue, PlanDue
from peft_dist.orchestrator.rebalancer import Rebalancer
from peft_dist.orchestrator.records import Outgoing
from peft_dist.placement.planner import Planner

VOCABULARY = 1000
MAX_TOKENS = 1000
# Of a replica; the crowded ones have more requests than that.
SEATS = 32


def crowded(replicas: int, requests: int, adapters: int, seed: int) -> Orchestrator:
    """An orchestrator with all requests on the first half of its replicas."""
    rng = random.Random(seed)
    core = Orchestrator(OrchestratorOptions(max_num_seqs=SEATS, max_queue=requests, seed=seed))
    info = _model(max(4, 3 * adapters // replicas))
    for replica_id in range(replicas // 2):
        _ready(core, replica_id, info)
    for k in range(adapters):
        _answer(core, core.load_adapter(f"a{k}", f"a{k}")[1])
    weights = [(8 if k % 13 == 5 else 1) / (k + 1) ** 0.9 for k in range(adapters)]
    for i, k in enumerate(rng.choices(range(adapters), weights, k=requests)):
        prompt = [rng.randrange(VOCABULARY) for _ in range(min(int(rng.lognormvariate(5.5, 0.9)) + 1, 3000))]
        params = SamplingParams(max_tokens=MAX_TOKENS, seed=i)
        core.submit(NewRequest(f"r{i}", prompt, params, f"a{k}"), 0.0)
    _draw(core, rng)
    for replica_id in range(replicas // 2, replicas):
        _answer(core, _ready(core, replica_id, info))
    core.drain_events()
    return core


def _ready(core: Orchestrator, replica_id: int, info: ModelInfo) -> list[Outgoing]:
    return core.observe(replica_id, core.add_replica(replica_id, 0.0).epoch, Ready(model=info, pid=1), 0.0)


def _answer(core: Orchestrator, commands: Iterable[Outgoing]) -> None:
    for sent in commands:
        if isinstance(load := sent.command, LoadAdapter):
            spec = AdapterSpec(load.name, f"{load.path:0>64}", load.path, {"q": 16}, ADAPTER_BYTES)
            core.observe(sent.replica_id, sent.epoch, AdapterResult(call_id=load.call_id, spec=spec), 0.0)


def _draw(core: Orchestrator, rng: random.Random) -> None:
    """Half of the requests have drawn some tokens."""
    for replica in core.replicas.ready():
        drawn = [
            SequenceProgress(f"{record.request_id}-0", [rng.randrange(VOCABULARY) for _ in range(50)], 0)
            for record in core._requests.on_replica(replica.replica_id)
            if rng.random() < 0.5
        ]
        stats = ReplicaStats(num_blocks=KV_BLOCKS, num_free_blocks=KV_BLOCKS // 4)
        core.observe(replica.replica_id, replica.epoch, Progress(sequences=drawn, stats=stats), 0.0)


def _model(max_loras: int) -> ModelInfo:
    return ModelInfo(
        model="none",
        served_model_name="none",
        max_model_len=4096,
        vocab_size=VOCABULARY,
        eos_token_ids=(0,),
        num_blocks=KV_BLOCKS,
        num_host_blocks=0,
        block_size=BLOCK,
        device="none",
        dtype="none",
        depth=1,
        attention_backend="none",
        lora_backend="none",
        max_loras=max_loras,
    )


class Acting:
    """What a service does with commands and events, but for the socket."""

    def __init__(self, core: Orchestrator, planner: Planner) -> None:
        self.core = core
        self.num_bytes = 0
        self.rebalancer = Rebalancer(core.migration, self.act, time.monotonic, planner)

    def act(self, commands: Iterable[Outgoing]) -> None:
        for out in commands:
            self.num_bytes += len(encode_command(out.command, out.epoch))
        for event in self.core.drain_events():
            if isinstance(event, PlanDue | PlacementDue):
                self.rebalancer.begin(event)


async def measure(size: tuple[int, int, int], number: int, limit: float) -> dict[str, Any]:
    """Figures of ``number`` orchestrators of one size."""
    cases = [crowded(*size, seed) for seed in range(number)]
    stalls, ticks, seconds, plans, moved = Stalls(), [], [], Counter[str](), []
    async with Planner(limit) as planner:
        for core in cases:
            await planner.warm()
            # What other cases left is no part of a server.
            freeze_heap()
            watching = asyncio.create_task(stalls.watch())
            acting = Acting(core, planner)
            start = time.perf_counter()
            acting.act(core.tick(time.monotonic()))
            ticks.append(time.perf_counter() - start)
            while not (view := core.migration.view()) or not view.plans or not view.num_placements:
                await asyncio.sleep(5e-3)
            plans.update({origin: n for (origin, _), n in view.plans.items()})
            seconds.append(view.plan_seconds)
            moved.append(float(sum(view.moves.values())))
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
    return {
        "replicas, requests, adapters": size,
        "plans": plans,
        "load_average": os.getloadavg()[0],
        "tick_seconds": quantiles(ticks),
        "seconds_to_the_last_move": quantiles(seconds),
        "moves": quantiles(moved),
        "loop_stall_seconds": quantiles(stalls.seconds),
        "loop_stall_cpu_seconds": quantiles(stalls.cpu_seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orchestrators", type=int, default=20, help="for each cluster")
    parser.add_argument("--limit", type=float, default=0.2, help="seconds from a view to its plan")
    args = parser.parse_args()
    for size in CLUSTERS:
        figures = asyncio.run(measure(size, args.orchestrators, args.limit))
        print(msgspec.json.format(msgspec.json.encode(figures), indent=2).decode(), flush=True)


if __name__ == "__main__":
    main()
