"""Measure a profile for the simulator: what this device's steps, switches, loads and moves of KV take.

    python scripts/profile_costs.py --output cpu.json                      # SmolLM2-135M-Instruct on the CPU
    python scripts/profile_costs.py --shape 8b --load-format dummy --dtype bfloat16 --output gpu.json
    python scripts/profile_costs.py --beside 1 --output cpu.json           # while another such replica computes too
    torchrun --nproc-per-node 4 scripts/profile_costs.py --shape 70b ...   # one replica on four GPUs

Drives a real engine: unmerged decode steps over batch sizes and numbers of distinct adapters, decodes behind prompts of
other lengths, prompts, merged steps, switches, loads of adapters, and KV moved to other blocks; each batch once
unmeasured, and then `--rounds` times. Fits the terms of the cost model to the medians of equal steps (least relative
errors, none below 0), each with the tokens of the captured step that takes it, and writes one file that `peft-dist
simulate --profile FILE` takes, with the hardware, the versions and how far the fit is from what was measured. Adapters
have one rank on all linear layers: for another rank measure again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from bench.cluster_engine import add_engine_options, prepare
from bench.cost_runs import CostRuns, Measured
from bench.gpu_engine import is_first_rank, world_size
from bench.report import environment

from peft_dist.core.config import EngineConfig, ModelInfo
from peft_dist.core.cost_model import STEP_TERMS, CostPrior, StepFeatures
from peft_dist.sim.executor import padded
from peft_dist.sim.fitting import fit_line, fit_steps, mean_error, medians, predicted
from peft_dist.sim.profile import CostProfile, options_of

READY = "ready"
Kind = TypeVar("Kind")


def build(options: argparse.Namespace, folder: Path) -> CostRuns | None:
    """A replica with its adapters registered, ready to be driven; None of a rank that has followed one to its end."""
    from peft_dist.runner.replica import build_replica

    more: dict[str, Any] = {"max_num_seqs": max(options.sizes), "enable_prefix_caching": False}
    for name in ("dtype", "load_format"):
        if getattr(options, name) is not None:
            more[name] = getattr(options, name)
    if options.threads and not options.shape:
        more["num_threads"] = options.threads
    more["tensor_parallel_size"] = world_size()
    config, paths = prepare(options, folder, options.adapters, **more)
    replica = build_replica(config)
    if not is_first_rank():
        replica.follow()
        return None
    specs = [replica.load_adapter(name, path) for name, path in paths.items()]
    replica.warm_up()
    return CostRuns(replica, specs)


def measure(options: argparse.Namespace, runs: CostRuns) -> None:
    sizes = options.sizes, options.prompt, options.tokens
    steps = [
        ("decode", lambda: runs.decodes(*sizes, options.distinct, options.rounds)),
        ("contexts", lambda: runs.contexts(middle(options.sizes), options.contexts, options.tokens, options.rounds)),
        ("prompts", lambda: runs.prefills(options.prompts, options.rounds)),
        ("moves of KV", runs.transfers),
        ("merged", lambda: runs.merged(*sizes, options.switches, options.rounds)),
        ("loads", lambda: runs.loads(2 * len(runs.specs))),
    ]
    for name, step in steps:
        if name == "merged" and runs.replica.model_info.merge_way == "off":
            continue
        began = time.perf_counter()
        step()
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


def middle(sizes: Sequence[int]) -> int:
    return sizes[len(sizes) // 2]


def context_token(measured: Measured, *, in_flight: bool) -> float:
    """Seconds of a decode for each token of its sequence in the KV cache."""
    found = seconds_of(measured.contexts, in_flight=in_flight)
    return fit_line(found)[1] if len({tokens for tokens, _ in found}) > 1 else 0.0


def sizes_of(info: ModelInfo, config: EngineConfig) -> dict[str, tuple[int, ...]]:
    """Sizes of the steps that a replica captures, by their names in a profile."""
    from peft_dist.runner.step_variants import captured_sizes

    if not info.device.startswith("cuda") or config.enforce_eager:
        return {"decode_sizes": (), "prompt_sizes": ()}
    return captured_sizes(config.max_num_seqs, config.max_num_batched_tokens)


def seconds_of(steps: Iterable[tuple[Kind, float, float | None]], *, in_flight: bool) -> list[tuple[Kind, float]]:
    """With a step in flight it lasts from the end of the one before it to its own, whatever the device says of it,
    unless there was none right before."""
    return [(kind, between if in_flight and between is not None else seconds) for kind, seconds, between in steps]


def fitted(measured: Measured, *, in_flight: bool, **sizes: Sequence[int]) -> tuple[CostPrior, dict[str, float]]:
    """Costs, and the mean relative error of the fit by regime and by whether there are prompts in a step. ``sizes``: As
    of ``sizes_of``."""
    known = [(padded(one, **sizes), seconds) for one, seconds in seconds_of(measured.steps, in_flight=in_flight)]
    step = fit_steps(known)
    lines = {name: fit_line(found) for name, found in measured.others.items()}
    # Of one rank: a switch's seconds have no part that grows with it.
    switches = {name: (lines.pop(name, (0.0, 0.0))[0], 0.0) for name in ("merge", "unmerge")}
    transfer = lines.get("transfer", (0.0, 0.0))
    swap = (transfer[0] / 2, transfer[1] / 2)
    costs = CostPrior(**step, **switches, swap=swap, transfer=transfer, load=lines.get("load", (0.0, 0.0)))
    kinds: dict[str, list[tuple[StepFeatures, float]]] = defaultdict(list)
    for features, seconds in known:
        kinds[f"{features.regime} {'prompts' if features.prefill_tokens else 'decode'}"].append((features, seconds))
    return costs, {kind: mean_error(step, own) for kind, own in sorted(kinds.items())}


def write_steps(path: Path, measured: Measured, costs: CostPrior, *, in_flight: bool, **sizes: Sequence[int]) -> None:
    """Each kind of step with the median of its seconds and what the fit says, for whoever asks where it is wrong."""
    weights = {name: getattr(costs, name) for name in STEP_TERMS}
    rows = [
        {**msgspec.structs.asdict(one.features), "measured": one.number, "seconds": one.seconds,
         "fitted": predicted(weights, padded(one.features, **sizes))}
        for one in medians(seconds_of(measured.steps, in_flight=in_flight))
    ]  # fmt: skip
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def profile(options: argparse.Namespace, runs: CostRuns, seconds: float) -> CostProfile:
    from peft_dist.runner.cost_prior import ModelSize

    info, config, spec = runs.replica.model_info, runs.replica.loaded_with, runs.specs[0]
    sizes = sizes_of(info, config)
    costs, errors = fitted(runs.measured, in_flight=info.depth > 0, **sizes)
    found = environment()
    if options.steps is not None:
        write_steps(options.steps, runs.measured, costs, in_flight=info.depth > 0, **sizes)
    told = ", ".join(f"{kind} {error:.1%}" for kind, error in errors.items())
    hardware = found.get("gpu") or f"{found['cpu']}, {found['torch_threads']} thread(s) of {found['cores']} cores"
    return CostProfile(
        name=options.output.stem,
        source=(
            f"measured by scripts/profile_costs.py on {found['date']} in {seconds:.0f} s: {len(runs.measured.steps)} "
            f"steps of {min(options.sizes)} to {max(options.sizes)} sequences with prompts of {options.prompt} and up "
            f"to {max(options.distinct)} distinct adapters of rank {options.rank}, while {options.beside} such "
            f"replica(s) computed beside it; mean distance of the fit from the medians of equal steps: {told}. Swaps "
            "are taken to be half a move of KV."
        ),
        hardware=str(hardware),
        model=f"{options.shape or 'SmolLM2-135M-Instruct'}, {info.dtype}, rank {options.rank} on all linear layers",
        costs=costs,
        **options_of(info, config),
        **sizes,
        modules=len(spec.ranks),
        rank_bytes=spec.num_bytes // options.rank,
        versions={k: str(v) for k, v in found.items() if k not in ("date", "cpu", "cores", "torch_threads", "gpu")},
        host_seconds=runs.host_seconds() if info.depth == 0 else 0.0,
        weight_bytes=info.tensor_parallel_size * ModelSize.of(runs.replica.runner.model).num_bytes,
        context_token=context_token(runs.measured, in_flight=info.depth > 0),
        # The first token of a sequence is no decode's.
        context=options.prompt + options.tokens / 2 - 1,
    )


@contextlib.contextmanager
def others(number: int) -> Iterator[None]:
    """So many replicas that compute until the end, each in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--as-load"]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(number)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            while READY not in (line := process.stdout.readline()):
                if not line:
                    raise SystemExit("a replica beside this one ended before it was ready: see above")
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def compute_for_ever(options: argparse.Namespace, runs: CostRuns) -> None:
    """What a replica beside the measured one does: batches of middling size, one after another."""
    runs.use(policy="fcfs")
    size = middle(options.sizes)
    print(READY, flush=True)
    while True:
        runs.batch([i % len(runs.specs) for i in range(size)], options.prompt, options.tokens)
        runs.measured.steps.clear()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--output", type=Path, required=True, help="the profile; its name is the file's")
    parser.add_argument("--dtype")
    parser.add_argument("--load-format", choices=("auto", "dummy"))
    parser.add_argument("--threads", type=int, default=1, help="of a replica on the CPU")
    parser.add_argument("--adapters", type=int, help="default: 8 on the CPU, 32 of a shape")
    parser.add_argument("--sizes", type=int, nargs="+", help="batch sizes")
    parser.add_argument("--distinct", type=int, nargs="+", help="distinct adapters in a batch; 0: the base alone")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompts of decode steps")
    parser.add_argument("--tokens", type=int, help="decode steps of each batch")
    parser.add_argument("--prompts", type=int, nargs="+", help="lengths of prompts that are measured alone")
    parser.add_argument("--contexts", type=int, nargs="+", help="lengths of prompts of which decodes are compared")
    parser.add_argument("--rounds", type=int, default=3, help="of each batch, after one that is not measured")
    parser.add_argument("--steps", type=Path, metavar="FILE", help="write every kind of step there, and its fit")
    parser.add_argument("--switches", type=int, default=6)
    parser.add_argument("--beside", type=int, default=0, help="replicas that compute meanwhile, on the same cores")
    parser.add_argument("--as-load", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    usual: dict[str, Any] = {"adapters": 8, "sizes": [1, 2, 4, 8, 16], "distinct": [0, 1, 4, 8], "tokens": 12,
                             "prompts": [32, 128, 384], "contexts": [32, 384]}  # fmt: skip
    if options.shape:
        usual = {"adapters": 32, "sizes": [1, 4, 16, 24, 32, 48, 64, 96, 128, 192, 256],
                 "distinct": [0, 1, 8, 32], "tokens": 24,
                 "prompts": [128, 512, 2048], "contexts": [128, 1024]}  # fmt: skip
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parse()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = build(options, Path(folder))
        if runs is None:
            return
        if options.as_load:
            compute_for_ever(options, runs)
        print(f"ready after {time.perf_counter() - began:.1f} s", flush=True)
        with others(options.beside):
            measure(options, runs)
        made = profile(options, runs, time.perf_counter() - began)
        runs.replica.close()
    made.dump(options.output)
    print(made.source)
    print(options.output)


if __name__ == "__main__":
    main()
