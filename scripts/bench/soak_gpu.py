"""Random saturated traffic: does memory hold, and what is the throughput?

    python scripts/bench/soak_gpu.py [--minutes 10] [--requests 20000] [--memory 0.9] [--adapters 32] [--rank mix]

More requests than seats at all times, with log-normal lengths, half of them behind shared prefixes (prefix cache on),
for half as many adapters again as fit, greedy and sampled; some are aborted. Adapters may be merged (the engine's own
policy). Ends after the minutes or the requests, whichever comes first; then every KV block must be free again. Prints
a line of JSON when the model, the adapters and the captured steps are there, then every half minute, and at the end the
peak of reserved and allocated memory. Where no line comes for five minutes, it tells where it stands (on stderr).
"""

from __future__ import annotations

import faulthandler
import random
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gpu_driver import Driver, register, start_replica
from bench.gpu_engine import DEVICE, add_engine_options
from bench.gpu_options import make_parser, parse
from bench.gpu_workload import Stream, emit, ranks_of, write_adapters

SHARED_PREFIXES, PREFIX_TOKENS = 16, 200
ABORT_CHANCE = 0.02
REPORT_SECONDS = 30.0
SILENT_SECONDS = 300.0


class Traffic:
    """Random requests from a seed."""

    def __init__(self, shape: str, specs: list[Any], longest: int, seed: int = 0) -> None:
        self._stream = Stream(f"soak {seed}", shape, len(specs))
        self._chance = random.Random(seed)
        self._specs = specs
        self._longest = longest
        self._weights = [1 / (place + 1) for place in range(len(specs))]
        self._prefixes = [self._stream.prompt(min(PREFIX_TOKENS, longest // 4)) for _ in range(SHARED_PREFIXES)]

    def next(self) -> tuple[Any, list[int], Any]:
        """(adapter or None, prompt, sampling parameters)."""
        from peft_dist import SamplingParams

        chance = self._chance
        prompt, new = (max(4, min(self._longest // 4, int(chance.lognormvariate(mu, 1.0)))) for mu in (4.6, 4.9))
        tokens = self._stream.prompt(prompt)
        if chance.random() < 0.5:
            tokens = chance.choice(self._prefixes) + tokens
        spec = None if chance.random() < 0.1 else chance.choices(self._specs, self._weights)[0]
        sampled = {"temperature": 0.8, "top_p": 0.9, "top_k": 40} if chance.random() < 0.3 else {"temperature": 0.0}
        return spec, tokens, SamplingParams(max_tokens=new, ignore_eos=True, **sampled)

    def victim(self, running: dict[str, float]) -> str | None:
        """A request to abort now, if any."""
        return self._chance.choice(list(running)) if running and self._chance.random() < ABORT_CHANCE else None


def tell(**figures: Any) -> None:
    """A line; until the next one, threads' stacks are told whenever none came for ``SILENT_SECONDS``."""
    emit(engine="ours", **figures)
    faulthandler.dump_traceback_later(SILENT_SECONDS, repeat=True)


def memory() -> dict[str, float]:
    """GB: this process's peaks, and what the whole device has left."""
    if DEVICE == "cpu":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3),
        "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3),
        "reserved_gb": round(torch.cuda.memory_reserved() / 1e9, 3),
        "device_used_gb": round((total - free) / 1e9, 3),
        "device_total_gb": round(total / 1e9, 3),
        "alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
    }


def counts(driver: Driver, seconds: float) -> dict[str, Any]:
    engine = driver.replica.engine
    stats, detail = engine.stats(), engine.detail()
    return {
        "seconds": round(seconds, 1), "finished": driver.finished, "aborted": driver.aborted,
        "failed": len(driver.errors), "output_tokens_per_s": round(driver.tokens / seconds, 1),
        "preemptions": stats.num_preemptions, "steps": detail.num_steps, "merged_steps": detail.num_merged_steps,
        "loads": detail.num_adapter_loads, "evictions": detail.num_adapter_evictions,
        "prefix_hit_share": round(stats.prefix_cache_hits / max(1, stats.prefix_cache_queries), 3),
        **memory(),
    }  # fmt: skip


def soak(driver: Driver, traffic: Traffic, options: Namespace) -> dict[str, Any]:
    """The final counts.

    Raises:
        torch.OutOfMemoryError: what is looked for.
        AssertionError: a request failed, or KV blocks were lost.
    """
    start = reported = time.perf_counter()
    submitted, seats = 0, driver.replica.config.max_num_seqs * 3 // 2
    now = start
    while now - start < options.minutes * 60 and submitted < options.requests:
        while len(driver.arrived) < seats and submitted < options.requests:
            driver.submit(*traffic.next())
            submitted += 1
        driver.step()
        if (victim := traffic.victim(driver.arrived)) is not None:
            driver.abort(victim)
        driver.first_token.clear()  # What grows must be the replica.
        now = time.perf_counter()
        if now - reported > REPORT_SECONDS:
            reported = now
            tell(part="soak so far", **counts(driver, now - start))
    seconds, tokens = now - start, driver.tokens
    driver.drain()
    blocks = driver.replica.engine.scheduler.blocks
    blocks.check()
    assert blocks.num_free == blocks.num_blocks, f"{blocks.num_blocks - blocks.num_free} KV blocks were lost"
    assert not driver.errors, driver.errors[:3]
    assert driver.finished + driver.aborted == submitted
    return {**counts(driver, time.perf_counter() - start), "requests": submitted,
            "output_tokens_per_s": round(tokens / seconds, 1)}  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, ("soak",))
    add_engine_options(parser)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.set_defaults(memory=0.9, requests=20_000, rank="mix")
    options = parse(parser)
    files = options.adapters * 3 // 2
    paths = write_adapters(options.shape, options.folder, ranks_of(options.rank, files), DEVICE)
    merging = {"enable_prefix_caching": True, "policy": None, "merge": "auto"}
    if options.tiny:
        merging |= {"max_num_seqs": 16, "num_blocks": 256}
        options.requests = 200
    began = time.perf_counter()

    def started(what: str) -> None:
        tell(part="start", mode="soak", started=what, seconds=round(time.perf_counter() - began, 1), **memory())

    started("nothing")
    replica = start_replica(options, ranks_of(options.rank, options.adapters), **merging)
    started("model")
    driver = Driver(replica)
    specs = register(replica, paths, started)
    longest = replica.model_info.max_model_len
    figures = soak(driver, Traffic(options.shape, specs, longest), options)
    replica.close()
    tell(part="soak", rank=options.rank, memory_share=options.memory,
         kv_blocks=replica.model_info.num_blocks, merge=replica.model_info.merge_way, **figures)  # fmt: skip


if __name__ == "__main__":
    main()
