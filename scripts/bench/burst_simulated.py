"""The 512 requests at once of a GPU benchmark, simulated: how far from what they took?

    python scripts/bench/burst_simulated.py docs/results/gpu.json --profile h100-8b

Simulates each line of ``ours_gpu.py``'s throughput in a result of bench_gpu.py: the same lengths and adapters, all at
once, in steps of ``LLM``'s size, by a profile of that kind of device. Prints steps and seconds, and simulated over
measured. The simulator gets nothing of these lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gpu_workload import ADAPTERS, MAX_MODEL_LEN, SEATS, STEP_TOKENS, choose_for_throughput, lengths
from peft_dist.sim.experiment import simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Arrival


class Burst(NamedTuple):
    """Of which adapters; steps and seconds, measured and simulated."""

    adapters: str
    steps: int
    seconds: float
    simulated_steps: int
    simulated_seconds: float


def bursts(lines: list[dict[str, Any]], profile: CostProfile) -> Iterator[Burst]:
    """One for each line of an engine with adapters."""
    names = tuple(f"a{i}" for i in range(ADAPTERS))
    options = SimulationOptions(
        adapters=names, policy="fcfs", max_num_batched_tokens=STEP_TOKENS, max_num_seqs=SEATS, max_loras=ADAPTERS,
        token_times=False,
    )  # fmt: skip
    profile = replace(profile, max_model_len=MAX_MODEL_LEN)
    for line in lines:
        if (line.get("engine"), line.get("part"), line.get("mode")) != ("ours", "throughput", "lora"):
            continue
        chosen = choose_for_throughput(line["adapters"], line["requests"])
        asked = [
            Arrival(0.0, None if chosen is None else names[chosen[i]], prompt, output)
            for i, (prompt, output) in enumerate(lengths()[: line["requests"]])
        ]
        done = simulate(asked, profile, options)
        ended = max(record.finished for record in done.records)
        yield Burst(line["adapters"], line["steps"], line["seconds"], done.replicas[0].steps, ended)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="of bench_gpu.py")
    parser.add_argument("--profile", required=True, help="a name of the package's, or a file")
    options = parser.parse_args()
    lines = json.loads(options.result.read_text())["figures"]["measurements"]
    print("| adapters | steps, simulated | seconds, simulated | simulated over measured |\n|---|---|---|---|")
    for one in bursts(lines, CostProfile.load(options.profile)):
        ratio = one.simulated_seconds / one.seconds
        seconds = f"{one.seconds:.2f}, {one.simulated_seconds:.2f}"
        print(f"| {one.adapters} | {one.steps:,}, {one.simulated_steps:,} | {seconds} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
