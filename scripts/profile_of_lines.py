"""A profile for the simulator from what GPU benchmarks measured, without a device.

    python scripts/profile_of_lines.py docs/results/gpu_h200.json --like earlier.json --output h200-8b.json \
        --moves docs/results/migration_gpu.json --kv-bandwidth 4.45e12
    python scripts/profile_of_lines.py docs/results/four_gpus.json --like h200-8b --shape 70b \
        --output h200-70b-tp4.json

Reads results of bench_gpu.py or bench_four_gpus.py: the steps of our engine, and prompts that one step takes. Fits the
terms of a step to them as ``profile_costs.py`` does, and switches to lines of merging, where there are some; everything
else (loads, moves of KV, limits) is the profile's of ``--like``. Without lines of merged steps these take what the
base's do, as they do where both were measured. ``--leave-out`` names lines that are known to hold something else. With
``--shape`` sizes of KV, adapters and weights are those of the shape, in bfloat16.

Steps with prompts take the sizes that a server captures. ``--moves``: a result of bench_migration.py on the same kind
of device, of which a move takes what the longest gap of a stream that moves with 1,000 tokens or more is above that of
one beside it. The measured decodes had some 200 tokens of context each. With ``--kv-bandwidth`` a simulated one takes
longer for every token more, and less for every token fewer: the token's KV at that bandwidth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from bench.gpu_workload import PROMPT_TOKENS, SHAPES, STEP_TOKENS, linear_shapes

from peft_dist.core.cost_model import STEP_TERMS, CostPrior, StepFeatures
from peft_dist.runner.step_variants import captured_sizes
from peft_dist.sim.fitting import fit_steps, mean_error
from peft_dist.sim.profile import CostProfile

_MERGED = ("merged_step", "merged_token")
# Moves of less are not told from the steps around them.
_LEAST_MOVED = 1000
Line = dict[str, Any]
Measured = list[tuple[StepFeatures, float]]


def steps_of(lines: list[Line], rank: int) -> Iterator[tuple[str, StepFeatures, float]]:
    """(kind, features, seconds) of each decode step and of each prefill that is one step."""
    for line in lines:
        if line.get("engine") != "ours" or line.get("part") != "decode" or int(line["rank"]) != rank:
            continue
        batch, merged = line["batch"], line["mode"] == "merged"
        adapters = 0 if merged or line["adapters"] == "none" else line["distinct"]
        regime = "merged" if merged else "unmerged" if adapters else "base"
        yield f"{regime} decode", _features(merged, batch, 0, batch, adapters, rank), line["step_ms"] / 1e3
        tokens = batch * PROMPT_TOKENS
        if tokens <= STEP_TOKENS and not merged:
            seconds = line["prefill_ms"] / 1e3
            yield f"{regime} prompts", _features(False, 0, tokens, tokens, adapters, rank), seconds


def _features(merged: bool, decodes: int, prompts: int, tokens: int, adapters: int, rank: int) -> StepFeatures:
    lora = tokens if adapters else 0
    return StepFeatures(merged, decodes, prompts, lora, adapters, rank * adapters, rank * lora)


def without_disturbed(lines: list[Line], most: float) -> list[Line]:
    """Those whose two prefills lie no further apart than this, as a ratio: what disturbs one disturbs its steps."""
    kept = []
    for line in lines:
        both = line.get("prefills_ms") or [1.0]
        if max(both) <= most * min(both):
            kept.append(line)
    return kept


def without(lines: list[Line], named: list[str]) -> list[Line]:
    """But for the steps that are named by mode and batch. Raises SystemExit for a name that is of none."""
    known = {f"{line['mode']}:{line['batch']}" for line in lines if line.get("part") == "decode"}
    if unknown := sorted(set(named) - known):
        raise SystemExit(f"there are no steps {', '.join(unknown)} to leave out: there are {', '.join(sorted(known))}")
    return [line for line in lines if line.get("part") != "decode" or f"{line['mode']}:{line['batch']}" not in named]


def fitted(lines: list[Line], rank: int, like: CostPrior) -> tuple[CostPrior, dict[str, float], int]:
    """Costs, the mean error of the fit by kind, and how many steps it is of."""
    kinds: dict[str, Measured] = defaultdict(list)
    for kind, features, seconds in steps_of(lines, rank):
        kinds[kind].append((features, seconds))
    everything = [one for own in kinds.values() for one in own]
    step = fit_steps(everything)
    if "merged decode" not in kinds:
        # What the other profile adds to merged steps belongs to its own terms: added to these it counts twice.
        step |= dict.fromkeys(_MERGED, 0.0)
    switches = {
        name: (line[f"{name}_ms"] / 1e3, 0.0)
        for line in lines
        if line.get("part") == "merge"
        for name in ("merge", "unmerge")
    }
    kept = {one.name: getattr(like, one.name) for one in fields(CostPrior) if one.name not in STEP_TERMS}
    errors = {kind: mean_error(step, own) for kind, own in sorted(kinds.items())}
    return CostPrior(**{**kept, **step, **switches}), errors, len(everything)


def move_seconds(gaps: Mapping[str, Any]) -> float:
    """What moves with KV add to a stream's longest gap, which is about the same at every size that counts."""
    found = [
        (gap["kv"]["p50_ms"] - gap["kv"]["beside"]["p50_ms"]) / 1e3
        for tokens, gap in gaps.items()
        if int(tokens) >= _LEAST_MOVED
    ]
    return fmean(found)


def measured_context(lines: list[Line]) -> float:
    """Mean tokens of a sequence in the decode steps."""
    return fmean(PROMPT_TOKENS + line["new_tokens"] / 2 for line in lines if line.get("part") == "decode")


def sizes_of(shape: str, block_size: int) -> dict[str, int]:
    """What a profile says of a model's sizes."""
    sizes, linears = SHAPES[shape], linear_shapes(shape).values()
    layers, hidden = sizes["num_hidden_layers"], sizes["hidden_size"]
    weights = layers * sum(inputs * outputs for inputs, outputs in linears) + 2 * sizes["vocab_size"] * hidden
    kv = 2 * layers * sizes["num_key_value_heads"] * sizes["head_dim"]
    return {
        "block_bytes": 2 * kv * block_size,
        "modules": layers * len(linears),
        "rank_bytes": 2 * layers * sum(inputs + outputs for inputs, outputs in linears),
        "weight_bytes": 2 * weights,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="of bench_gpu.py or bench_four_gpus.py")
    parser.add_argument("--like", required=True, help="profile that has the rest: a name of the package's, or a file")
    parser.add_argument("--output", type=Path, required=True, help="the profile; its name is the file's")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="sizes are this shape's and not those of --like")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--undisturbed", type=float, default=1.2, metavar="RATIO",
                        help="lines whose two prefills lie further apart are left out")  # fmt: skip
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="MODE:BATCH", help="lines of steps, as merged:128"
    )
    parser.add_argument("--moves", type=Path, metavar="RESULT", help="of bench_migration.py")
    parser.add_argument("--kv-bandwidth", type=float, metavar="BYTES", help="read in a second by attention, a device")
    options = parser.parse_args(arguments)
    result, like = json.loads(options.result.read_text()), CostProfile.load(options.like)
    lines = without_disturbed(result["figures"]["measurements"], options.undisturbed)
    lines = without(lines, options.leave_out)
    costs, errors, count = fitted(lines, options.rank, like.costs)
    ranks = next((line["tensor_parallel_size"] for line in lines if "tensor_parallel_size" in line), 1)
    blocks = [line["kv_blocks"] for line in lines if line.get("part") == "start" and line.get("kv_blocks")]
    found = result["environment"]
    told = ", ".join(f"{kind} {error:.1%}" for kind, error in errors.items())
    sizes = sizes_of(options.shape, like.block_size) if options.shape else {}
    more = f"Left out: {', '.join(options.leave_out)}. " if options.leave_out else ""
    if not any(kind.startswith("merged") for kind in errors):
        more += "Merged steps were not measured, and take what the base's do. "
    if options.moves is not None:
        moves = json.loads(options.moves.read_text())
        costs = replace(costs, transfer=(move_seconds(moves["figures"]["added_gap"]), 0.0))
        more += f"Moves of KV are of {options.moves.name}, measured on {moves['environment']['date']}. "
    contexts = {"context_token": 0.0, "context": 0.0}
    if options.kv_bandwidth is not None:
        token_bytes = sizes.get("block_bytes", like.block_bytes) / like.block_size / ranks
        contexts = {"context_token": token_bytes / options.kv_bandwidth, "context": measured_context(lines)}
        more += (
            f"A token of context beyond the measured {contexts['context']:.0f} takes a decode "
            f"{1e9 * contexts['context_token']:.1f} ns, by {options.kv_bandwidth:.3g} bytes of KV a second, which was "
            "not measured here. "
        )
    made = replace(
        like,
        name=options.output.stem,
        source=(
            f"made by scripts/profile_of_lines.py of {options.result.name}, measured on {found['date']}: {count} steps "
            f"and prompts with adapters of rank {options.rank}; mean distance of the fit: {told}. "
            f"{more}Of {like.name}: all else ({like.source})"
        ),
        hardware=f"{ranks} × {found['gpu']}" if ranks > 1 else str(found.get("gpu", like.hardware)),
        model=f"{options.shape}, bfloat16, rank {options.rank} on all linear layers" if options.shape else like.model,
        costs=costs,
        tensor_parallel_size=ranks,
        num_blocks=max(blocks, default=like.num_blocks) if options.shape else like.num_blocks,
        versions={key: str(found[key]) for key in like.versions if key in found} or like.versions,
        **captured_sizes(like.max_num_seqs, like.max_num_batched_tokens),
        **contexts,
        **sizes,
    )
    made.dump(options.output)
    print(made.source)
    print(json.dumps(asdict(made.costs)))
    print(options.output)


if __name__ == "__main__":
    main()
