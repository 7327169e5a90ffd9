"""What a running request pays for a move to another replica: with its KV, and computed again.

    python scripts/bench/bench_migration.py [--moves 500] [--lengths 100 1000 4000] [--repeats 20]
    python scripts/bench/bench_migration.py --shape 8b --name gpu       # two GPUs, random weights
    python scripts/bench/bench_migration.py --moves 0 --lengths --at-once 1 4 16 --name together

Two replicas in processes of their own, with an adapter: SmolLM2-135M-Instruct on the CPU, or what `--shape` says.
First `--moves` forced moves with KV, of concurrent sampled and greedy streams at random tokens: every stream is
compared with the same request alone, and both replicas must have all their blocks back. Then the added gap of one move
at each context length and in both ways: the longest time between two tokens of a stream from the move on, less the
median before it; no prompt shares a prefix with another, and a move that came too late for its stream is counted and
made again. One more stream runs on each replica meanwhile, and its longest gap is told too. With `--at-once N ...` the
added gaps of so many streams that are asked to move with their KV at the same moment. Writes
docs/results/migration[_NAME].json.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.cluster_engine import add_engine_options, prepare
from bench.report import write_result
from peft_dist.core.config import EngineConfig
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker.launcher import PlainLauncher

TOKENS = 48
BEFORE = 12
BESIDE_TOKENS = 4096
WAYS = {"kv": True, "recompute": False}


@dataclass
class Reading:
    """A stream's tokens, and when each of them came."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def gaps(self, first: int, last: int | None = None) -> list[float]:
        """Seconds before each of the tokens ``first`` to ``last``, which count from 1; from 2 on there are any."""
        times = self.times[first - 2 : last]
        return [after - before for before, after in pairwise(times)]


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(100, 30_000) for _ in range(length)]


def owner(service: EngineService, name: str) -> int | None:
    running = service._core._requests.running(name)
    return running[0][0].replica_id if running else None


async def read(
    service: EngineService,
    name: str,
    prompt: list[int],
    params: SamplingParams,
    model: str | None,
    move_at: Collection[int] = (),
    with_kv: bool = True,
    into: Reading | None = None,
) -> Reading:
    """Read a stream to its end, and have the request move when it has so many tokens."""
    found = into or Reading()
    async for _, progress in service.generate(name, prompt, params, model):
        now = time.perf_counter()
        if progress.error is not None or progress.first_index != len(found.tokens):
            raise RuntimeError(f"{name}: token {progress.first_index} after {len(found.tokens)}: {progress.error}")
        found.tokens += progress.token_ids
        found.times += [now] * len(progress.token_ids)
        at = owner(service, name)
        if len(found.tokens) in move_at and at is not None:
            service.move_request(name, 1 - at, with_kv=with_kv)
    return found


async def force_moves(service: EngineService, number: int, rng: random.Random) -> dict[str, Any]:
    """Streams that move at random tokens, until there were so many moves; compared with themselves alone."""
    handover, wrong, streams = service._core.handover, 0, 0
    cases = [
        (random_prompt(rng, rng.randrange(8, 500)), sampled, model)
        for sampled in (0, 1, 1)
        for model in (None, "adapter0")
    ]
    alone = [await read(service, f"alone{i}", *as_call(case, i)) for i, case in enumerate(cases)]
    while handover.num_with_kv < number:
        names = [f"moving{streams + i}" for i in range(len(cases))]
        spots = [rng.sample(range(1, TOKENS), 12) for _ in cases]
        moving = [
            read(service, name, *as_call(case, i), move_at=spot)
            for i, (name, case, spot) in enumerate(zip(names, cases, spots, strict=True))
        ]
        found = await asyncio.gather(*moving)
        wrong += sum(a.tokens != b.tokens for a, b in zip(found, alone, strict=True))
        streams += len(cases)
        print(f"  {handover.num_with_kv} moves, {streams} streams, {wrong} differ", flush=True)
    return {
        "moves_with_kv": handover.num_with_kv,
        "moves_failed": handover.num_failed,
        "streams": streams,
        "streams_that_differ": wrong,
        "blocks_conserved": await are_free(service),
    }


def as_call(case: tuple[list[int], int, str | None], number: int) -> tuple[list[int], SamplingParams, str | None]:
    prompt, sampled, model = case
    how: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "seed": number} if sampled else {"temperature": 0.0}
    return prompt, SamplingParams(max_tokens=TOKENS, ignore_eos=True, **how), model


async def are_free(service: EngineService) -> bool:
    """Whether both replicas report, within 5 s, that no block is in use."""
    for _ in range(500):
        if all(view.stats.num_free_blocks == view.stats.num_blocks for view in service.replicas()):
            return True
        await asyncio.sleep(0.01)
    return False


async def measure_gaps(
    service: EngineService, length: int, after: int, repeats: int, rng: random.Random
) -> dict[str, Any]:
    """Added gap of one move in both ways, in turn, so that a slow moment of the machine falls on both.

    ``after``: Tokens that follow the one at which it moves: more than are drawn until it has moved.
    """
    params = SamplingParams(temperature=0.0, max_tokens=BEFORE + after, ignore_eos=True)
    gaps: dict[str, list[float]] = {way: [] for way in WAYS}
    others: dict[str, list[float]] = {way: [] for way in WAYS}
    beside = [Reading(), Reading()]
    endless = SamplingParams(temperature=0.0, max_tokens=BESIDE_TOKENS, ignore_eos=True)
    tasks = [
        asyncio.create_task(read(service, f"beside{length}.{i}", random_prompt(rng, 16), endless, None, into=reading))
        for i, reading in enumerate(beside)
    ]
    too_late = 0
    while min(map(len, gaps.values())) < repeats:
        for way, with_kv in WAYS.items():
            known = [len(reading.times) for reading in beside]
            moved = service._core.handover.num_with_kv
            name = f"gap{length}.{too_late}.{len(gaps[way])}.{way}"
            prompt = random_prompt(rng, length - BEFORE)
            found = await read(service, name, prompt, params, "adapter0", [BEFORE], with_kv)
            if with_kv and service._core.handover.num_with_kv == moved:
                # It ended where it was: that is no gap of a move.
                too_late += 1
                if too_late > 3 * repeats:
                    raise RuntimeError(f"at {length} tokens streams end before they have moved: give more --after")
                continue
            usual = statistics.median(found.gaps(2, BEFORE))
            gaps[way].append(max(found.gaps(BEFORE + 1)) - usual)
            since = found.times[BEFORE - 1]
            others[way].append(max(longest_since(r, n, since) for r, n in zip(beside, known, strict=True)))
    for i in range(len(beside)):
        service.abort(f"beside{length}.{i}")
    await asyncio.gather(*tasks)
    return {way: summary(gaps[way]) | {"beside": summary(others[way])} for way in WAYS} | {"moved_too_late": too_late}


async def measure_together(
    service: EngineService, number: int, length: int, repeats: int, rng: random.Random
) -> dict[str, Any]:
    """Added gaps of so many streams that are asked to move from one replica to the other at the same moment."""
    gaps: list[float] = []
    seconds: list[float] = []
    for round_ in range(repeats):
        # All begin on the first one.
        await service.drain_replica(1)
        names = [f"together{number}.{round_}.{i}" for i in range(number)]
        readings = [Reading() for _ in names]
        params = SamplingParams(temperature=0.0, max_tokens=BESIDE_TOKENS, ignore_eos=True)
        tasks = [
            asyncio.create_task(read(service, name, random_prompt(rng, length), params, None, into=reading))
            for name, reading in zip(names, readings, strict=True)
        ]
        await have_drawn(readings, [BEFORE] * number)
        service.resume_replica(1)
        usual = [statistics.median(reading.gaps(max(len(reading.times) - BEFORE, 2))) for reading in readings]
        known, handover = [len(reading.times) for reading in readings], service._core.handover
        since, moved, failed = time.perf_counter(), handover.num_with_kv, handover.num_failed
        for name in names:
            service.move_request(name, 1, with_kv=True)
        while handover.num_with_kv < moved + number:
            if handover.num_failed > failed:
                raise RuntimeError(f"{handover.num_failed - failed} of {number} moves at once failed")
            await asyncio.sleep(0.001)
        seconds.append(time.perf_counter() - since)
        await have_drawn(readings, [len(reading.times) + 2 for reading in readings])
        gaps += [longest_since(r, n, since) - u for r, n, u in zip(readings, known, usual, strict=True)]
        for name in names:
            service.abort(name)
        await asyncio.gather(*tasks)
    return summary(gaps) | {"all_moved_after_s": round(statistics.median(seconds), 3)}


async def have_drawn(readings: list[Reading], numbers: list[int]) -> None:
    """Wait until each stream has so many tokens."""
    while any(len(reading.times) < number for reading, number in zip(readings, numbers, strict=True)):
        await asyncio.sleep(0.001)


def longest_since(reading: Reading, known: int, since: float) -> float:
    """The longest time between two tokens from a moment on; ``known`` tokens are older than that."""
    times = reading.times[max(known - 1, 0) :]
    return max((after - before for before, after in pairwise(times) if after >= since), default=0.0)


def summary(seconds: list[float]) -> dict[str, Any]:
    ordered = sorted(seconds)
    rank = min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))
    return {
        "p50_ms": round(statistics.median(ordered) * 1e3, 1),
        "p99_ms": round(ordered[rank] * 1e3, 1),
        "max_ms": round(ordered[-1] * 1e3, 1),
        "number": len(ordered),
    }


async def measure(options: argparse.Namespace, config: EngineConfig, adapter: Path) -> dict[str, Any]:
    launcher = PlainLauncher(config, log_level="error", num_replicas=2)
    # Nobody else has requests move.
    service = EngineService(launcher, OrchestratorOptions(64, 64, 1, migration="proactive"), num_replicas=2)
    rng = random.Random(0)
    try:
        await service.start()
        await service.load_adapter("adapter0", str(adapter))
        figures: dict[str, Any] = {"added_gap": {}}
        if options.moves:
            figures["forced"] = await force_moves(service, options.moves, rng)
        view = service.migration()
        figures["kv_bytes_by_memory"] = None if view is None else view.live.num_bytes
        for length in options.lengths:
            figures["added_gap"][str(length)] = found = await measure_gaps(
                service, length, options.after, options.repeats, rng
            )
            print(f"  {length} tokens: {found}", flush=True)
        for number in options.at_once:
            found = await measure_together(service, number, options.together_tokens, options.repeats, rng)
            figures.setdefault("added_gap_at_once", {})[str(number)] = found
            print(f"  {number} at once: {found}", flush=True)
    finally:
        await service.stop()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--moves", type=int, default=500)
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 1000, 4000], help="tokens when it moves")
    parser.add_argument("--at-once", type=int, nargs="*", default=[], metavar="N", help="streams that move together")
    parser.add_argument("--together-tokens", type=int, default=1000, help="of the prompts of these")
    parser.add_argument("--after", type=int, default=12, help="tokens behind the one at which it moves")
    parser.add_argument("--repeats", type=int, default=20, help="moves at each length, in each way")
    parser.add_argument("--batched-tokens", type=int, default=512, help="tokens in one step at most")
    parser.add_argument("--name", default="", help="of the result file: migration_NAME.json")
    parser.add_argument("--output", type=Path, help="folder for migration.json (default: docs/results)")
    options = parser.parse_args()
    settings = {key: str(value) for key, value in vars(options).items() if key != "output"}
    with tempfile.TemporaryDirectory() as folder:
        config, adapters = prepare(
            options, Path(folder), 1, max_num_batched_tokens=options.batched_tokens,
            max_model_len=max([*options.lengths, 4096]) + BESIDE_TOKENS,
        )  # fmt: skip
        figures = asyncio.run(measure(options, config, adapters["adapter0"]))
    name = f"migration_{options.name}" if options.name else "migration"
    print("written to", write_result(name, {"settings": settings, **figures}, options.output))


if __name__ == "__main__":
    main()
