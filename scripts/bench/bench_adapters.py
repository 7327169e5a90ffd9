"""A thousand adapters on one replica: what loads cost the requests that need none, and whether memory stays flat.

    python scripts/bench/bench_adapters.py [--adapters 1000] [--requests 10000]

A small random Llama (CPU, float32), adapters of ranks 4 to 64 on all its linears, room for 32 on the device and for
some hundred on the host. Three figures:

- **memory**: closed-loop Zipf traffic over all adapters; the slope of the resident set over the last four fifths.
- **blocked**: in the same run, the time that the engine's thread was held up by loads: in waits while a request could
  have run, and off the processor inside the calls that begin, publish and drop loads.
- **registrations**: what the engine's thread did for each new adapter, which was read and checked on another one; the
  first puts LoRA layers around the model's linears (bench_adapter_load.py has the figure for a larger model).
- **ttft**: one schedule of Poisson arrivals is run twice, interleaved in rounds. Half of the requests go to 8 adapters
  that stay resident; their time to the first token is reported. The others go to 16 more resident adapters
  ("without_loads"), or each to the next of all others, so that every one of them loads ("with_loads").

Writes docs/results/adapters.json.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import select
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bench.load_trace import Trace
from bench.report import write_result
from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.collector import freeze_heap
from peft_dist.core.config import EngineConfig
from peft_dist.core.request import Request
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.runner.background import BackgroundCalls
from peft_dist.runner.replica import Replica, build_replica

RANKS = (4, 8, 16, 32, 64)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROOM = 32
HOST_BYTES = 64 << 20
NUM_HOT, NUM_WARM = 8, 16
PROMPT_TOKENS, NEW_TOKENS = 8, 4
IN_FLIGHT = 24
RATE = 40.0  # requests a second of the TTFT runs: a fraction of what the replica can do
ROUNDS, ROUND_SECONDS = 6, 6.0


def make_files(folder: Path, num_adapters: int) -> list[Path]:
    """The base model in ``folder``/base, and adapters beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, bos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    shapes = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in TARGETS
    }
    return [
        _make_adapter(folder / f"a{number:04}", shapes, RANKS[number % len(RANKS)]) for number in range(num_adapters)
    ]


def _make_adapter(folder: Path, shapes: dict[str, tuple[int, int]], rank: int) -> Path:
    folder.mkdir()
    tensors = {}
    for name, (inputs, outputs) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs) * 0.02
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": TARGETS,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


class Driver:
    """Runs one replica as a worker does, without a socket."""

    def __init__(self, replica: Replica, trace: Trace) -> None:
        self.replica = replica
        self.trace = trace
        self.first_token: dict[str, float] = {}
        self.errors: list[str] = []
        self._ids = count()
        self._prompts = random.Random(1)

    def submit(self, spec: AdapterSpec, kind: str = "r") -> str:
        request_id = f"{kind}{next(self._ids)}"
        prompt = [self._prompts.randrange(2, 512) for _ in range(PROMPT_TOKENS)]
        params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        self.replica.engine.add_request(Request(request_id, prompt, params, 0, time.perf_counter(), spec))
        return request_id

    def step(self, until: float | None = None) -> list[str]:
        """One step, or a wait (to ``until`` at most) when only a load can help; the requests that ended in it."""
        engine = self.replica.engine
        if not engine.has_work or engine.waits_for_load:
            start = time.perf_counter()
            timeout = None if until is None else max(0.0, until - start)
            select.select([self.replica.fileno()], [], [], timeout)
            if engine.has_work:
                waited = time.perf_counter() - start
                manager = engine.scheduler.adapters
                could_run = any(r.adapter is None or manager.is_resident(r.adapter) for r in engine.requests.values())
                if could_run:
                    self.trace.blocked += waited
                else:
                    self.trace.idle += waited
        ended = []
        for progress in engine.step(time.perf_counter()) if engine.has_work else []:
            self.first_token.setdefault(progress.request_id, time.perf_counter())
            if progress.error:
                self.errors.append(progress.error)
            if progress.finish_reason:
                ended.append(progress.request_id)
        return ended


def resident_set() -> float:
    """MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def zipf_traffic(driver: Driver, specs: list[AdapterSpec], num_requests: int) -> dict[str, Any]:
    chance = random.Random(0)
    order = chance.sample(specs, len(specs))
    weights = [1.0 / (place + 1) for place in range(len(specs))]
    todo = iter(chance.choices(order, weights, k=num_requests))
    samples: list[tuple[int, float]] = []
    done = submitted = 0
    start = time.perf_counter()
    while done < num_requests:
        while submitted - done < IN_FLIGHT and submitted < num_requests:
            driver.submit(next(todo))
            submitted += 1
        before, done = done, done + len(driver.step())
        driver.first_token.clear()  # What grows here must be the replica.
        if done // 100 > before // 100 and done >= num_requests // 5:
            samples.append((done, resident_set()))
    seconds = time.perf_counter() - start
    slope = statistics.linear_regression(*zip(*samples, strict=True)).slope
    manager, host = driver.replica.engine.scheduler.adapters, driver.replica.store.host
    return {
        "requests": num_requests,
        "requests_per_second": round(num_requests / seconds, 1),
        "failed": len(driver.errors),
        "loads": manager.loads,
        "evictions": manager.evictions,
        "host_hits": host.hits,
        "host_misses": host.misses,
        "host_mb": round(host.num_bytes / 1e6, 1),
        "rss_mb": round(samples[-1][1], 1),
        "rss_slope_mb_per_1000_requests": round(slope * 1000, 3),
    }


def arrivals(seed: int) -> Iterator[tuple[float, bool]]:
    """(seconds, whether it goes to a hot adapter)."""
    chance = random.Random(seed)
    now = 0.0
    while (now := now + chance.expovariate(RATE)) < ROUND_SECONDS:
        yield now, chance.random() < 0.5


def ttft_round(driver: Driver, seed: int, hot: list[AdapterSpec], others: Iterator[AdapterSpec]) -> list[float]:
    """Seconds to the first token of the requests to hot adapters."""
    chance = random.Random(seed)
    schedule = [(due, chance.choice(hot) if is_hot else next(others), is_hot) for due, is_hot in arrivals(seed)]
    start = time.perf_counter()
    due_of: dict[str, float] = {}
    left = len(schedule)
    position = 0
    while left:
        while position < len(schedule) and time.perf_counter() - start >= schedule[position][0]:
            due, spec, is_hot = schedule[position]
            request_id = driver.submit(spec)
            if is_hot:
                due_of[request_id] = start + due
            position += 1
        until = start + schedule[position][0] if position < len(schedule) else None
        left -= len(driver.step(until))
    return [driver.first_token[request_id] - due for request_id, due in due_of.items()]


def compare_ttft(driver: Driver, specs: list[AdapterSpec]) -> dict[str, Any]:
    manager = driver.replica.engine.scheduler.adapters
    hot, warm, cold = specs[:NUM_HOT], specs[NUM_HOT : NUM_HOT + NUM_WARM], specs[NUM_HOT + NUM_WARM :]
    for spec in hot + warm:
        manager.pin(spec.name, spec)
        driver.submit(spec)
    while driver.replica.engine.has_work:
        driver.step()
    others = {
        "without_loads": (warm[i % len(warm)] for i in count()),
        "with_loads": (cold[i % len(cold)] for i in count()),
    }
    found: dict[str, list[float]] = {name: [] for name in others}
    loads = dict.fromkeys(others, 0)
    for number in range(ROUNDS):
        for name in list(others) if number % 2 else list(others)[::-1]:
            before = manager.loads
            found[name] += ttft_round(driver, number, hot, others[name])
            loads[name] += manager.loads - before
    return {name: {"loads": loads[name], **_milliseconds(values)} for name, values in found.items()}


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    figures = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in at.items()}
    return {
        "n": len(seconds),
        **{f"{name}_ms": round(v * 1e3, 2) for name, v in [("mean", statistics.mean(seconds)), *figures.items()]},
    }


def register_all(replica: Replica, paths: list[Path], trace: Trace) -> list[AdapterSpec]:
    """As a worker does: read and checked on another thread, then registered on the engine's."""
    fetcher: BackgroundCalls[Path, AdapterSpec] = BackgroundCalls("fetcher", 1)
    for path in paths:
        fetcher.start(path, lambda call, path=path: replica.inspect_adapter(path.name, path))
    specs = []
    while len(specs) < len(paths):
        select.select([fetcher.fileno()], [], [])
        for ended in fetcher.take():
            if ended.result is None:
                raise RuntimeError(f"{ended.key} cannot be served") from ended.error
            trace.register(replica, ended.result)
            specs.append(ended.result)
    fetcher.close()
    return specs


def measure(folder: Path, num_adapters: int, num_requests: int) -> dict[str, Any]:
    paths = make_files(folder, num_adapters)
    # Unpacked: for packed weights oneDNN keeps a kernel for each number of rows that a batch ever had, up to 1024 of
    # them, and that growth, which ends, would hide any other.
    replica = build_replica(
        EngineConfig(
            str(folder / "base"), device="cpu", num_blocks=256, max_model_len=64, max_num_seqs=32, max_loras=ROOM,
            adapter_host_memory=HOST_BYTES, num_threads=1, pack_weights=False,
        )
    )  # fmt: skip
    freeze_heap()  # As a worker does.
    start = time.perf_counter()
    trace = Trace()
    specs = register_all(replica, paths, trace)
    registering = time.perf_counter() - start
    file_bytes = sum((path / "adapter_model.safetensors").stat().st_size for path in paths)
    driver = Driver(replica, trace)
    trace.watch(replica)
    for layer in replica.store.pool._layers:
        # A CPU's pages count when they are first written. Their bound is known; what is looked for is growth beyond.
        layer.weights.A.zero_()
        layer.weights.B.zero_()
    memory = zipf_traffic(driver, specs, num_requests)
    blocked = {
        "seconds_waiting_while_a_request_could_run": round(trace.blocked, 6),
        "seconds_off_the_processor_in_load_calls": round(trace.off_processor, 6),
        "adapter_files_opened_by_the_engines_thread": trace.file_opens,
        "seconds_waiting_with_nothing_to_run": round(trace.idle, 3),
        "load_calls": _milliseconds(trace.calls),
    }
    ttft = compare_ttft(driver, specs)
    replica.close()
    return {
        "adapters": num_adapters,
        "ranks": RANKS,
        "device_room": ROOM,
        "host_budget_mb": HOST_BYTES / 1e6,
        "registering": {"seconds": round(registering, 2), "mb": round(file_bytes / 1e6, 1)},
        "memory": memory,
        "blocked": blocked,
        "registrations": {
            "first_ms": round(trace.registrations[0] * 1e3, 2),
            "layers_put_in_by_the_first": replica.store.num_layers,
            "others": _milliseconds(trace.registrations[1:]),
        },
        "ttft_of_resident_adapters": ttft,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=None, help="folder of the result (docs/results)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.adapters, options.requests)
    path = write_result("adapters", figures, options.output)
    print(json.dumps(figures, indent=2))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
