"""Load, replace and unload calls under traffic: does a request fail, is a token of other weights than asked for?

    python scripts/bench/bench_adapter_traffic.py

A server's service and its worker process with a small random Llama (CPU, float32), 12 adapters of ranks 2 to 35, six
clients that ask without pause for one of those served, and 300 calls that load, replace (also over the files of
adapters in use) and unload, as fast as requests begin and end. Four settings, at depth 0 and 1: with three adapter
slots, and with one slot and no host copies, so that running requests lose their adapter's place. Every answer is
compared with PEFT's, computed from the weights that the name had when the request was sent. Writes
docs/results/adapter_traffic.json; exits 1 when a request failed or a token is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

from bench.report import write_result
from tests.adapter_traffic import ROOT, SETTINGS, compare, run


def measure(depth: int, num_copies: int, options: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        world, oracle = run(Path(folder), depth, num_copies, options)
        found = compare(world, oracle)
    return {
        "depth": depth,
        "options": options,
        "host_copies": num_copies,
        "calls": world.calls,
        "calls_over_files_in_use": world.num_overwritten,
        "seconds": round(world.seconds, 2),
        "calls_per_minute": round(60 * sum(world.calls.values()) / world.seconds),
        "failed_requests": len(world.errors),
        **found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="folder of the result (docs/results)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # A warning at every answer of PEFT's.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    runs = []
    for setting in SETTINGS:
        runs.append(measure(*setting))
        print(json.dumps(runs[-1]), flush=True)
    names = ("failed_requests", "wrong_tokens", "ties", "answers", "tokens")
    total = {name: sum(own[name] for own in runs) for name in names}
    print(total, "written to", write_result("adapter_traffic", {"total": total, "runs": runs}, options.output))
    return int(bool(total["failed_requests"] or total["wrong_tokens"]))


if __name__ == "__main__":
    sys.exit(main())
