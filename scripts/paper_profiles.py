"""Write the simulator's profiles of the paper: 7b from its artifact's constants, 13b and 70b scaled from them.

    python scripts/paper_profiles.py [--output FOLDER]

Nothing is measured. The rule, which every file repeats: a step reads the weights of one device and the caches once, so
its seconds grow with the bytes of weights on one device; what LoRA adds and what a switch takes grow with the bytes of
LoRA's rows and of the adapted weights there; a prompt token adds its FLOPs at half of an A100's peak.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from peft_dist.core.cost_model import CostPrior
from peft_dist.sim.profile import FOLDER, CostProfile

# Of dLoRA's artifact, for Llama-2-7B: a step merged and unmerged, and a switch.
MERGED, UNMERGED, SWITCH = 15e-3, 27e-3, 20e-3
# Its seats, its tokens in one step, and the blocks a second of 8 MiB that it lets KV move with (32 GiB/s).
SEATS = 16
TOKENS = 4096
BUS = 32 * 2**30
# Of an A100 with 80 GB: dense FLOP/s at 16 bits. The paper names no device.
PEAK, USED = 312e12, 0.5
DEVICE_BYTES, MEMORY_SHARE = 80e9, 0.9
# Adapters on a device: at most this many of rank 16 (the artifact has room for all that are placed there).
LORAS, RANK = 64, 16
WIDTH = 2
BLOCK = 16


@dataclass(frozen=True)
class Shape:
    """A Llama 2 model; every linear layer is adapted."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int = 32_000

    @property
    def adapted_parameters(self) -> int:
        attention = 2 * self.hidden * (self.hidden + self.kv_width)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        return self.adapted_parameters + (2 * self.layers + 1 + 2 * self.vocabulary) * self.hidden

    def row_parameters(self, devices: int) -> int:
        """Of an adapter on one device, for each of its rank, as the artifact keeps it.

        q, k and v are one product of three times the rank, and gate and up one with a common A. A of these and B of the
        others are on every device, what belongs to the split side is split.
        """
        qkv = 3 * self.hidden + 3 * (self.hidden + 2 * self.kv_width) // devices
        out = self.hidden // devices + self.hidden
        gate_up = self.hidden + 2 * self.intermediate // devices
        down = self.intermediate // devices + self.hidden
        return self.layers * (qkv + out + gate_up + down)

    @property
    def block_bytes(self) -> int:
        return 2 * WIDTH * BLOCK * self.layers * self.kv_width


SMALL = Shape("Llama-2-7B", 32, 4096, 11_008, 4096)
MIDDLE = Shape("Llama-2-13B", 40, 5120, 13_824, 5120)
LARGE = Shape("Llama-2-70B", 80, 8192, 28_672, 1024)
PROFILES = {"paper-7b": (SMALL, 1), "paper-13b": (MIDDLE, 1), "paper-70b-tp4": (LARGE, 4)}


def profile(name: str, shape: Shape, devices: int) -> CostProfile:
    """The profile of a shape over so many devices."""
    weights = shape.parameters / devices / SMALL.parameters
    rows = shape.row_parameters(devices) / SMALL.row_parameters(1)
    merged = shape.adapted_parameters / devices / SMALL.adapted_parameters
    costs = CostPrior(
        step=_rounded(MERGED * weights),
        decode_sequence=0.0,
        prefill_token=_rounded(2 * shape.parameters / devices / (USED * PEAK)),
        lora_step=_rounded((UNMERGED - MERGED) * rows),
        lora_token=0.0,
        adapter=0.0,
        merge=(_rounded(SWITCH * merged), 0.0),
        unmerge=(_rounded(SWITCH * merged), 0.0),
        load=(1e-3, _rounded(1 / BUS / devices)),
        swap=(1e-3, _rounded(1 / BUS / devices)),
        transfer=(1e-3, _rounded(2 / BUS / devices)),
    )
    rank_bytes = WIDTH * devices * shape.row_parameters(devices)
    taken = WIDTH * shape.parameters + LORAS * RANK * rank_bytes
    return CostProfile(
        name=name,
        source=_source(shape, devices, weights, rows, merged),
        hardware=f"{devices} x a GPU of 80 GB as the paper's, which it does not name",
        model=f"{shape.name}, 16 bits, LoRA on all linear layers",
        costs=costs,
        num_blocks=int((MEMORY_SHARE * DEVICE_BYTES * devices - taken) / shape.block_bytes),
        block_bytes=shape.block_bytes,
        modules=7 * shape.layers,
        rank_bytes=rank_bytes,
        block_size=BLOCK,
        max_num_seqs=SEATS,
        max_num_batched_tokens=TOKENS,
        max_loras=LORAS,
        tensor_parallel_size=devices,
        weight_bytes=WIDTH * shape.parameters,
    )


def _source(shape: Shape, devices: int, weights: float, rows: float, merged: float) -> str:
    rule = (
        "dLoRA (OSDI'24), constants of its artifact for Llama-2-7B: 15 ms a merged step, 27 ms an unmerged one, 20 ms "
        "a switch, 16 sequences and 4096 tokens in a step. Whatever a batch holds, but for prompt tokens, of which the "
        f"artifact knows nothing: their FLOPs at {USED:.0%} of {PEAK / 1e12:.0f} TFLOP/s a device (an A100's peak; the "
        "share is an assumption). Loads and swaps at the artifact's 32 GiB/s to each device, moves of KV at half of it "
        "(out and in), each with 1 ms (an assumption)."
    )
    if shape is SMALL:
        return rule
    return (
        f"{rule} Scaled to {shape.name} on {devices} device(s): steps by the bytes of weights on one device "
        f"(x {weights:.4f}), what LoRA adds by the bytes of its rows there (x {rows:.4f}), switches by the bytes of "
        f"the adapted weights there (x {merged:.4f}), prompt tokens by FLOPs. Exchange between devices is left out."
    )


def _rounded(value: float) -> float:
    """To 6 digits, so that a file reads well."""
    return float(f"{value:.6g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder (default: the package's)")
    args = parser.parse_args()
    for name, (shape, devices) in PROFILES.items():
        path = args.output / f"{name}.json"
        profile(name, shape, devices).dump(path)
        print(path)


if __name__ == "__main__":
    main()
