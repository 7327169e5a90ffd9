"""Time to the first token of adapters that stay on the device, alone and while a thousand others load and leave.

    python scripts/bench/ttft_gpu.py [--rounds 5] [--loads 1000] [--rate 80] [--rank 8]

Poisson arrivals. Half of the requests go to eight adapters that stay; their times are reported. The other half go to
sixteen more that stay ("without loads"), or each to the next of 64 that take turns in sixteen places, so that every one
of them loads ("with loads"). One round runs the same arrivals both ways; the order changes from round to round. The
figure is P99 with loads over P99 without, of each round and of all rounds together (target: at most 1.1). Lines of
the part "rounds" say what the engine did in the longest of its rounds, and between them, each way; how long each load
took, from the request for it on and of it the copy to the device; and the times of the other requests.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gpu_driver import Driver, Round, register, start_replica
from bench.gpu_engine import DEVICE, add_engine_options
from bench.gpu_options import make_parser, parse
from bench.gpu_workload import PROMPT_TOKENS, Stream, emit, ranks_of, write_adapters

# Places for half again as many as ask at once: with 8, requests for one adapter waited for each other, and loaded once.
HOT, WARM, SPARE, COLD = 8, 16, 16, 64
ROUND_TOKENS = 16


def arrivals(seed: int, others: int, rate: float) -> list[tuple[float, bool]]:
    """(seconds, whether it goes to one that stays hot), until ``others`` have gone elsewhere."""
    chance = random.Random(seed)
    found: list[tuple[float, bool]] = []
    now = 0.0
    while others:
        now += chance.expovariate(rate)
        hot = chance.random() < 0.5
        others -= not hot
        found.append((now, hot))
    return found


def ttft_round(
    driver: Driver, schedule: list[tuple[float, bool]], hot: list[Any], others: Iterator[Any], stream: Stream
) -> tuple[list[float], list[float]]:
    """Seconds to the first token, from when it was due, of each request to a hot adapter, and of each other."""
    from peft_dist import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=ROUND_TOKENS, ignore_eos=True)
    prompts = [stream.prompt(PROMPT_TOKENS) for _ in schedule]
    chosen = [hot[i % len(hot)] if is_hot else next(others) for i, (_, is_hot) in enumerate(schedule)]
    due: tuple[dict[str, float], dict[str, float]] = ({}, {})
    start, position = time.perf_counter(), 0
    while position < len(schedule) or driver.arrived:
        while position < len(schedule) and time.perf_counter() - start >= schedule[position][0]:
            at, is_hot = schedule[position]
            request_id = driver.submit(chosen[position], prompts[position], params, start + at)
            due[not is_hot][request_id] = start + at
            position += 1
        driver.step(start + schedule[position][0] if position < len(schedule) else None)
    to_hot, to_others = ([driver.first_token[name] - at for name, at in each.items()] for each in due)
    return to_hot, to_others


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def milliseconds(values: list[float]) -> dict[str, float]:
    if not values:
        return {"n": 0}
    shares = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99}
    return {"n": len(values), **{name: round(percentile(values, at) * 1e3, 3) for name, at in shares.items()}}


def told(schedules: Sequence[Sequence[Round]], number: int = 12) -> dict[str, Any]:
    """Milliseconds of an engine's rounds and of the gaps between them, and what the longest of these held.

    ``schedules``: The rounds of each; between two of them lies what is of no matter.
    """
    rounds = [each for schedule in schedules for each in schedule]
    gaps = [
        gap
        for schedule in schedules
        for gap in (0.0, *(max(0.0, b.began - a.began - a.seconds) for a, b in pairwise(schedule)))
    ]
    longest = sorted(zip(rounds, gaps, strict=True), key=lambda both: -both[0].seconds - both[1])[:number]
    return {
        "rounds": milliseconds([each.seconds for each in rounds]),
        "gaps": milliseconds(gaps),
        "captured": sum(each.captured for each in rounds),
        "longest": [
            {"ms": round(1e3 * each.seconds, 1), "gap_ms": round(1e3 * gap, 1), "captured": each.captured}
            | submitted(each.decision)
            for each, gap in longest
        ],
    }


def submitted(decision: Any) -> dict[str, Any]:
    """Of a round's step; None: it submitted none."""
    if decision is None:
        return {}
    switch = decision.switch_seconds
    return {
        "tokens": decision.num_tokens,
        "sequences": sum(decision.scheduled.values()),
        "adapters": len(decision.scheduled),
        "passed_over": sum(decision.passed_over.values()),
        "merged": decision.merged_adapter is not None,
        "switch_ms": None if switch is None else round(1e3 * switch, 1),
        "predicted_ms": round(1e3 * decision.predicted_seconds, 1),
    }


def main() -> None:
    parser = make_parser(__doc__, ("ttft",))
    add_engine_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", type=int, default=1000, help="in each round")
    parser.add_argument("--rate", type=float, default=80.0, help="requests a second")
    parser.set_defaults(rank="8")
    options = parse(parser)
    if options.tiny:
        options.loads, options.rounds = min(options.loads, 40), min(options.rounds, 3)
    count = HOT + WARM + COLD
    paths = write_adapters(options.shape, options.folder, ranks_of(options.rank, count), DEVICE)
    replica = start_replica(options, ranks_of(options.rank, HOT + WARM + SPARE))
    driver, stream = Driver(replica, keeps_rounds=True), Stream("ttft", options.shape)
    specs = register(replica, paths)
    hot, warm, cold = specs[:HOT], specs[HOT : HOT + WARM], specs[HOT + WARM :]
    manager = replica.engine.scheduler.adapters
    for spec in hot + warm:
        manager.pin(spec.name, spec)
    others = {"without_loads": cycle(warm), "with_loads": cycle(cold)}
    for way in others.values():  # Warms up.
        ttft_round(driver, arrivals(-1, 20, options.rate), hot, way, stream)
    found: dict[str, list[list[float]]] = {name: [] for name in others}
    loads: dict[str, list[Any]] = {name: [] for name in others}
    of_others: dict[str, list[float]] = {name: [] for name in others}
    steps: dict[str, list[list[Round]]] = {name: [] for name in others}
    for number in range(options.rounds):
        schedule = arrivals(number, options.loads, options.rate)
        for name in list(others) if number % 2 else list(others)[::-1]:
            driver.loads, driver.rounds = loads[name], []
            to_hot, to_others = ttft_round(driver, schedule, hot, others[name], stream)
            found[name].append(to_hot)
            of_others[name] += to_others
            steps[name].append(driver.rounds)
    replica.close()
    for name, made in steps.items():
        emit(
            engine="ours", part="rounds", way=name, **told(made), others=milliseconds(of_others[name]),
            loads=milliseconds([each.seconds for each in loads[name]]),
            copies=milliseconds([each.copy_seconds for each in loads[name] if each.copy_seconds is not None]),
        )  # fmt: skip
    assert not driver.errors, driver.errors[:3]
    ratios = [percentile(a, 0.99) / percentile(b, 0.99) for a, b in zip(*list(found.values())[::-1], strict=True)]
    pooled = {name: [value for values in rounds for value in values] for name, rounds in found.items()}
    emit(
        engine="ours", part="ttft", rank=options.rank, rate=options.rate, rounds=options.rounds,
        loads={name: len(ended) for name, ended in loads.items()},
        **{name: milliseconds(values) for name, values in pooled.items()},
        p99_ratios=[round(ratio, 3) for ratio in ratios], median_p99_ratio=round(statistics.median(ratios), 3),
        pooled_p99_ratio=round(percentile(pooled["with_loads"], 0.99) / percentile(pooled["without_loads"], 0.99), 3),
    )  # fmt: skip


if __name__ == "__main__":
    main()
