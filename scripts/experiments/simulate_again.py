"""What a result of live_vs_sim.py had live, simulated again: by another profile, or by what the simulator knows now.

    python scripts/experiments/simulate_again.py docs/results/live_vs_sim_h200.json --captured
    python scripts/experiments/simulate_again.py docs/results/live_vs_sim_h200.json --profile mine.json

The same arrivals at the same rates, as its settings draw them; nothing runs live. `--captured` gives the result's own
profile the sizes of captured steps, which profiles did not have before. Writes the ratios into the result, as `again`.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result

from experiments.live_vs_sim import num_requests, over_seeds, ratios, simulated_merged_share, words, workload
from peft_dist.runner.step_variants import captured_sizes
from peft_dist.sim.experiment import simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.records import summarize


def options_of(figures: Mapping[str, Any]) -> tuple[argparse.Namespace, list[str], SimulationOptions]:
    """What draws a result's workloads, the adapters' names, and the cluster."""
    settings, told = figures["settings"], figures["options"]
    numbers = {name: int(settings[name]) for name in ("max_prompt", "max_total", "adapters")}
    options = argparse.Namespace(
        seeds=ast.literal_eval(settings["seeds"]), seconds=float(settings["seconds"]), **numbers
    )
    names = [f"adapter{index}" for index in range(options.adapters)]
    kept = {name: told[name] for name in ("replicas", "policy", "migration", "rank", "seed")}
    return options, names, SimulationOptions(**kept)


def again(figures: Mapping[str, Any], profile: CostProfile) -> list[dict[str, Any]]:
    """Each load's ratios. Raises SystemExit where the settings do not draw what was put to the live system."""
    options, names, sim = options_of(figures)
    found = []
    for one in figures["rates"]:
        runs = []
        for run in one["runs"]:
            count = num_requests(one["rate"], options.seconds)
            asked = workload(options, names, one["zipf"], one["rate"], count, run["seed"])
            result = simulate(asked.arrivals, profile, sim)
            if len(result.records) != run["requests"]:
                raise SystemExit(
                    f"{run['requests']} requests live, {len(result.records)} by the settings: not the same"
                )
            virtual = asdict(summarize(result.records))
            runs.append({
                "seed": run["seed"], "simulated_over_live": ratios(virtual, run["live"]),
                "simulated_merged_share": simulated_merged_share(result), "live_merged_share": run["live_merged_share"],
            })  # fmt: skip
        found.append({"load": one["load"], "zipf": one["zipf"], **over_seeds(runs), "runs": runs})
        print(f"load {one['load']:g}, Zipf ({one['zipf']:g}), simulated over live: {words(found[-1])}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--profile", help="a file, or a name of the package's (default: the result's own)")
    parser.add_argument("--captured", action="store_true", help="a device that captures its steps, in all their sizes")
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    figures = result["figures"]
    if options.profile is None:
        profile = CostProfile.of(figures["profile"], f"the profile in {options.result}")
    else:
        profile = CostProfile.load(options.profile)
    if options.captured:
        profile = replace(profile, **captured_sizes(profile.max_num_seqs, profile.max_num_batched_tokens))
    told = {"profile": profile.name, "captured": options.captured, "rates": again(figures, profile)}
    print(write_result(options.result.stem, {**figures, "again": told}, options.result.parent, result["environment"]))


if __name__ == "__main__":
    main()
