"""Figure 5: what a pair of LoRA matrices takes beside the base's product, on the device at hand.

    python scripts/experiments/fig05_operators.py [--device cuda] [--reps 1000] [--warm-up 10000] [--output figures]

A product with a 4096 x 4096 weight in float32 (Wx) against one with a 16 x 4096 and a 4096 x 16 one behind it (BAx),
for batches of 2 to 16 rows, as in the artifact. This is a measurement: the files tell device and versions, and no two
runs are alike. Needs nothing but torch. Writes fig5.csv, fig5.json, and figure5 where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import environment

from experiments import authors, drawing
from experiments.tables import Row, read_csv, write_csv, write_json
from peft_dist.core.errors import ConfigError

COLUMNS = ("batch", "Wx", "BAx")
UNITS = {"batch": "rows", "Wx": "us", "BAx": "us"}
# Repetitions that are timed together: a single one is shorter than what reading the clock disturbs.
_TOGETHER = 10


def measure(device: str, batches: range, size: int, rank: int, reps: int, warm_up: int) -> list[Row]:
    """Microseconds of one product, medians of groups of repetitions."""
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> Any:
        return torch.randn(rows, columns, device=device, generator=generator)

    weight, down, up = matrix(size, size), matrix(rank, size), matrix(size, rank)
    wait: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    rows = []
    with torch.inference_mode():
        for batch in batches:
            x = matrix(batch, size)
            base = _microseconds(partial(torch.matmul, x, weight.T), wait, reps, warm_up)
            pair = _microseconds(partial(_pair, x, down.T, up.T), wait, reps, warm_up)
            rows.append(
                {"batch": batch, "Wx": base, "BAx": pair, "mode": "measured", "units": "batch=rows Wx=us BAx=us"}
            )
            print(f"batch {batch}: Wx {base:.1f} us, BAx {pair:.1f} us ({pair / base:.0%})", flush=True)
    return rows


def _pair(x: Any, down: Any, up: Any) -> Any:
    return (x @ down) @ up


def _microseconds(work: Callable[[], Any], wait: Callable[[], None], reps: int, warm_up: int) -> float:
    for _ in range(warm_up):
        work()
    wait()
    found = []
    for _ in range(max(1, reps // _TOGETHER)):
        start = time.perf_counter()
        for _ in range(_TOGETHER):
            work()
        wait()
        found.append((time.perf_counter() - start) / _TOGETHER)
    return 1e6 * statistics.median(found)


def draw(folder: Path) -> None:
    rows = read_csv(folder / "fig5.csv")
    drawn = drawing.figure(3.6, 2.6)
    axes = drawn.add_subplot()
    for column, color in (("Wx", "tab:blue"), ("BAx", "tab:orange")):
        axes.plot([row["batch"] for row in rows], [row[column] for row in rows], "o-", color=color, label=column)
    axes.set(xlabel="batch (rows)", ylabel="us", ylim=(0, None))
    axes.legend(frameon=False)
    drawing.save(drawn, folder, "figure5", ["fig5"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--reps", type=int, default=1000)
    parser.add_argument("--warm-up", type=int, default=10_000, help="repetitions before the clock starts")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, help="of a CPU; torch's default if not given")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    parser.add_argument("--plot", action="store_true", help="measure nothing, draw what the folder holds")
    options = parser.parse_args()
    if not options.plot:
        import torch

        if options.threads:
            torch.set_num_threads(options.threads)
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        rows = measure(device, range(2, 17, 2), options.size, options.rank, options.reps, options.warm_up)
        write_csv(options.output / "fig5.csv", COLUMNS, rows)
        about = {"figure": "5", "mode": "measured", "device": device, "environment": environment()}
        numbers = {"size": options.size, "rank": options.rank, "reps": options.reps, "warm_up": options.warm_up}
        write_json(options.output / "fig5.json", about | numbers | {"units": UNITS, "authors": authors.FIGURE5})
    try:
        draw(options.output)
    except ConfigError as error:
        print(f"no picture: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
