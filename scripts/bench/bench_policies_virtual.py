"""The credit policy against the better of first come and merge, in virtual time with the paper's constants.

    python scripts/bench/bench_policies_virtual.py [--seeds 3] [--seconds 30]

One replica with 16 seats, 15 ms for a merged step, 27 ms for an unmerged one and 20 ms for a switch serves Poisson
arrivals of 4 and 8 adapters, at four shares of one of them and three rates. Nothing is measured: the figures are the
same on every machine. Writes docs/results/policies_virtual.json: by load and policy mean and P90 of seconds a token,
and those of `credit` over the better of the other two; the range of these ratios over all loads.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from tests.policy.comparison import Load, compare

ADAPTERS = (4, 8)
SHARES = (0.25, 0.5, 0.7, 0.9)
# Unmerged, 16 seats serve about 9 of these requests a second, merged 16.
RATES = (3.0, 8.0, 11.0)
FIGURES = ("mean", "p90")


def measure(load: Load, seeds: int) -> dict[str, Any]:
    """Outcomes of one load by policy, and the credit policy's over the better of the others'."""
    outcomes = {name: asdict(outcome) for name, outcome in compare(load, range(seeds)).items()}
    best = {figure: min(outcomes[name][figure] for name in ("fcfs", "merge")) for figure in FIGURES}
    ratios = {figure: outcomes["credit"][figure] / best[figure] for figure in FIGURES}
    return {"load": asdict(load), "policies": outcomes, "credit_over_better": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals")
    parser.add_argument("--output", type=Path, help="folder for the result (default: docs/results)")
    args = parser.parse_args()
    loads = []
    for num_adapters, share, rate in product(ADAPTERS, SHARES, RATES):
        loads.append(measure(Load(num_adapters, share, rate, args.seconds), args.seeds))
        told = ", ".join(f"{figure} {loads[-1]['credit_over_better'][figure]:.3f}" for figure in FIGURES)
        print(f"{num_adapters} adapters, share {share}, {rate:g} a second: {told} of the better one's", flush=True)
    ranges = {}
    for figure in FIGURES:
        ratios = [load["credit_over_better"][figure] for load in loads]
        ranges[figure] = (min(ratios), max(ratios))
        print(f"{figure}: {min(ratios):.2f} to {max(ratios):.2f} of the better one's")
    figures = {"seeds": args.seeds, "credit_over_better": ranges, "loads": loads}
    path = write_result("policies_virtual", figures, args.output)
    print(path)


if __name__ == "__main__":
    main()
