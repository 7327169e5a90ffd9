"""Figure 5: what a pair of LoRA matrices takes beside the base's product, on the device at hand.

    python scripts/experiments/fig05_operators.py [--device cuda] [--reps 1000] [--warm-up 10000] [--output figures]

A product with a 4096 x 4096 weight in float32 (Wx) against one with a 16 x 4096 and a 4096 x 16 one behind it (BAx),
for batches of 2 to 16 rows, as in the artifact. Beside them what the paper lacks: the grouped kernel that serves here,
which adds BAx to the base's output in one call for rows of any adapters, where all rows have one adapter (grouped_one)
and where each has its own (grouped_each). On a GPU all four are measured a second time as a captured step has them, in
a CUDA graph (NAME_captured), without the launches that the first measurement is of.

This is a measurement: the files tell device and versions, and no two runs are alike. Writes fig5.csv, fig5.json, and
figure5 where matplotlib is installed; with ``--name fig5_gpu`` files of that name, for report.py beside the others.
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

ARTIFACT, GROUPED = ("Wx", "BAx"), ("grouped_one", "grouped_each")
COLUMNS = ("batch", *ARTIFACT)
CAPTURED = "_captured"
BATCHES = range(2, 17, 2)
# Repetitions that are timed together: a single one is shorter than what reading the clock disturbs.
_TOGETHER = 10
_COLORS = dict(zip((*ARTIFACT, *GROUPED), ("tab:blue", "tab:orange", "tab:purple", "tab:brown"), strict=True))

Operators = dict[str, Callable[[], Any]]


class Matrices:
    """A base's weight, and random adapters of one rank for it, as the artifact has them and in a pool.

    Attributes:
        weight: float32 ``[size, size]``.
        pairs: By adapter: A ``[rank, size]`` and B ``[size, rank]``.
    """

    def __init__(self, device: str, size: int, rank: int, adapters: int) -> None:
        import torch

        from peft_dist.kernels.lora_pool import LoRAPool

        self._device, self._size = device, size
        self._random = torch.Generator(device).manual_seed(0)
        self.weight = self._matrix(size, size)
        self.pairs = [(self._matrix(rank, size), self._matrix(size, rank)) for _ in range(adapters)]
        # Pages are of up to 8 rows.
        pool = LoRAPool(device, torch.float32, num_rows=adapters * -(-rank // 8) * 8, num_slots=adapters)
        layer = pool.add_layer(size, size)
        for slot, (down, up) in enumerate(self.pairs):
            pool.load(slot, {layer: (down, up, 1.0)})
        self._pooled = pool.weights[layer]

    def _matrix(self, rows: int, columns: int) -> Any:
        import torch

        return torch.randn(rows, columns, device=self._device, generator=self._random)

    def operators(self, batch: int) -> tuple[Any, Any, Operators]:
        """Inputs ``[batch, size]``, an output that the grouped kernels add to, and what is measured, by its column."""
        import torch

        x, y = self._matrix(batch, self._size), torch.zeros(batch, self._size, device=self._device)
        down, up = self.pairs[0]
        found: Operators = {"Wx": partial(torch.matmul, x, self.weight.T), "BAx": partial(_pair, x, down.T, up.T)}
        for name, slots in zip(GROUPED, ([0] * batch, list(range(batch))), strict=True):
            found[name] = self._grouped(x, y, slots)
        return x, y, found

    def _grouped(self, x: Any, y: Any, slots: list[int]) -> Callable[[], Any]:
        import numpy as np

        from peft_dist.kernels.backend import choose_lora
        from peft_dist.kernels.lora import add_lora_
        from peft_dist.kernels.types import LoRAPlan

        plan = LoRAPlan.from_rows(np.array(slots), choose_lora(self._device))
        return partial(add_lora_, y, x, self._pooled, plan)


def measure(device: str, size: int, rank: int, reps: int, warm_up: int) -> list[Row]:
    """Microseconds of one call, medians of groups of repetitions."""
    import torch

    matrices = Matrices(device, size, rank, BATCHES[-1])
    is_gpu = device.startswith("cuda")
    wait: Callable[[], None] = torch.cuda.synchronize if is_gpu else lambda: None
    rows = []
    with torch.inference_mode():
        for batch in BATCHES:
            _, _, operators = matrices.operators(batch)
            found = {name: _microseconds(work, wait, reps, warm_up) for name, work in operators.items()}
            if is_gpu:
                found |= {f"{name}{CAPTURED}": _captured(work, reps) for name, work in operators.items()}
            units = " ".join(["batch=rows", *(f"{name}=us" for name in found)])
            rows.append({"batch": batch, **found, "mode": "measured", "units": units})
            print(f"batch {batch}: " + ", ".join(f"{name} {value:.1f} us" for name, value in found.items()), flush=True)
    return rows


def _pair(x: Any, down: Any, up: Any) -> Any:
    return (x @ down) @ up


def _captured(work: Callable[[], Any], reps: int) -> float:
    """Microseconds in a CUDA graph of some calls."""
    from peft_dist.kernels.graph_timing import graph_milliseconds

    def some() -> None:
        for _ in range(_TOGETHER):
            work()

    return 1e3 * graph_milliseconds(some, max(10, reps // _TOGETHER)) / _TOGETHER


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


def draw(folder: Path, name: str) -> None:
    """A picture of a CSV; on a GPU beside it one of what was captured."""
    rows = read_csv(folder / f"{name}.csv")
    kinds = [kind for kind in ("", CAPTURED) if rows and f"Wx{kind}" in rows[0]]
    drawn = drawing.figure(3.6 * max(1, len(kinds)), 2.8)
    axes = [drawn.add_subplot(1, len(kinds), place + 1) for place in range(len(kinds))]
    for one, kind in zip(axes, kinds, strict=True):
        for column, color in _COLORS.items():
            if f"{column}{kind}" in rows[0]:
                heights = [row[f"{column}{kind}"] for row in rows]
                one.plot([row["batch"] for row in rows], heights, "o-", color=color, label=column)
        one.set(xlabel="batch (rows)", ylabel="us", ylim=(0, None), title=kind.removeprefix("_"))
    drawing.legend(drawn, axes)
    drawing.save(drawn, folder, name.replace("fig", "figure", 1), [name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--reps", type=int, default=1000)
    parser.add_argument("--warm-up", type=int, default=10_000, help="repetitions before the clock starts")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, help="of a CPU; torch's default if not given")
    parser.add_argument("--name", default="fig5", help="of CSV and JSON, fig5 or fig5_...")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    parser.add_argument("--plot", action="store_true", help="measure nothing, draw what the folder holds")
    options = parser.parse_args()
    if not options.plot:
        import torch

        if options.threads:
            torch.set_num_threads(options.threads)
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        rows = measure(device, options.size, options.rank, options.reps, options.warm_up)
        write_csv(options.output / f"{options.name}.csv", COLUMNS, rows)
        units = dict(unit.split("=") for unit in rows[0]["units"].split())
        about = {"figure": "5", "mode": "measured", "device": device, "environment": environment()}
        numbers = {"size": options.size, "rank": options.rank, "reps": options.reps, "warm_up": options.warm_up}
        write_json(
            options.output / f"{options.name}.json", about | numbers | {"units": units, "authors": authors.FIGURE5}
        )
    try:
        draw(options.output, options.name)
    except ConfigError as error:
        print(f"no picture: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
