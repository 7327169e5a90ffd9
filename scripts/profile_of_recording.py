"""A profile for the simulator from what running replicas recorded: no device, and no benchmark, is needed.

    PEFT_DIST_RECORD=FOLDER peft-dist serve ...                                # and requests, and then
    python scripts/profile_of_recording.py FOLDER/engine-*.jsonl --like h100-8b --output mine.json
    python scripts/profile_of_recording.py FOLDER/engine-*.jsonl --against mine.json  # how far it is from what ran

All recordings count as of one kind of replica. Terms of a step, and what a token of context takes, are fitted to every
step by itself (least relative errors, none below 0): where steps are in flight, to the seconds from the end of the one
before it to its own, as the engine saw them. Not to steps beside which an adapter was on its way or before which the
weights changed; not to those whose seconds are further than the factor ``--disturbed`` from the device's (something
held the engine up), or above what a first fit says (captures). How many these are is told, and all terms are multiplied
by one factor, so that the sum of the seconds is right with them. Each term of ``--like`` counts as one step more: it
decides between terms that the recorded steps do not tell apart. A load takes what it took from its turn on, from the
files to the device; switches take their median. What recordings do not tell (moves of KV, swaps, messages), and what
was not in them, is the profile's of ``--like``.

``--against`` writes nothing: it shows, by kind of step, the median of recorded over expected seconds, of the device and
from end to end, and the seconds that loads and other disturbances added.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from bench.recorded_steps import RecordedStep, Recording, recordings, service_seconds
from profile_costs import sizes_of

from peft_dist.core.cost_model import STEP_TERMS, CostPrior, StepFeatures
from peft_dist.runner.adapter_loader import NUM_THREADS
from peft_dist.sim.executor import padded
from peft_dist.sim.fitting import WithContext, fit_line, fit_with_context
from peft_dist.sim.profile import CostProfile, options_of
from peft_dist.sim.replay import read

_LEAST_STEPS = 100


@dataclass(frozen=True, slots=True)
class Steps:
    """Undisturbed ones, the number and seconds of the others, and what all terms are multiplied by for these."""

    used: list[tuple[StepFeatures, int, float]]
    disturbed: int
    disturbed_seconds: float
    factor: float


def all_of(paths: Iterable[Path]) -> list[Recording]:
    """Raises SystemExit where engines differ in what a profile says once."""
    found = [one for path in paths for one in recordings(read(path))]
    kinds = {(one.info.model, one.info.dtype, one.info.depth, one.info.tensor_parallel_size) for one in found}
    ranks = {spec.num_rank_rows for one in found for spec in one.specs.values()}
    if len(kinds) > 1:
        raise SystemExit(f"these are recordings of several kinds of replica: {sorted(kinds)}")
    if len(ranks) > 1:
        raise SystemExit("adapters of several ranks: a profile has the costs of one, record a run with such adapters")
    return found


def seconds_of(step: RecordedStep, *, in_flight: bool) -> float | None:
    """None where a step in flight did not follow right on another."""
    return step.between if in_flight else step.seconds


def fitted(found: Sequence[Recording], like: CostPrior, disturbed: float) -> tuple[WithContext, Steps]:
    """Costs, and which steps they are of; ``disturbed`` is as of ``--disturbed``."""
    in_flight, sizes = found[0].info.depth > 0, sizes_of(found[0].info, found[0].config)
    every, measured = [], []
    for step in (step for one in found for step in one.steps if not step.loading and not step.switched):
        seconds = seconds_of(step, in_flight=in_flight)
        if seconds is None or seconds <= 0:
            continue
        every.append((padded(step.features, **sizes), step.num_cached, seconds))
        # Behind a call that came late the next one finds its step done: neither is what a step takes.
        if step.seconds / disturbed <= seconds <= step.seconds * disturbed:
            measured.append(every[-1])
    if len(measured) < _LEAST_STEPS:
        raise SystemExit(
            f"{len(measured)} undisturbed steps are recorded, and {_LEAST_STEPS} needed: let the replicas serve longer"
        )
    first = fit_with_context(measured, like)
    used = [one for one in measured if one[2] <= disturbed * first.predicted(one[0], one[1])]
    fit = fit_with_context(used, like)
    together = sum(seconds for _, _, seconds in every)
    factor = together / sum(fit.predicted(features, cached) for features, cached, _ in every)
    others = together - sum(seconds for _, _, seconds in used)
    return fit.scaled(factor), Steps(used, len(every) - len(used), others, factor)


def costs_of(found: Sequence[Recording], step: Mapping[str, float], like: CostPrior) -> tuple[CostPrior, list[str]]:
    """Costs, and what of them was not recorded."""
    kept = {one.name: getattr(like, one.name) for one in fields(CostPrior) if one.name not in STEP_TERMS}
    missing = ["moves of KV", "swaps", "messages"]
    if loads := [one for recording in found for one in service_seconds(recording.loads, NUM_THREADS)]:
        kept["load"] = fit_line(loads)
    else:
        missing.append("loads")
    for way in ("merge", "unmerge"):
        taken = [seconds for one in found for kind, seconds in one.switches if kind == way]
        if taken:
            kept[way] = (statistics.median(taken), 0.0)
        else:
            missing.append(way)
    return CostPrior(**kept, **step), missing


def made(found: Sequence[Recording], like: CostProfile, name: str, disturbed: float) -> CostProfile:
    """The profile."""
    fit, steps = fitted(found, like.costs, disturbed)
    costs, missing = costs_of(found, fit.step, like.costs)
    if not found[0].info.depth:
        missing.append("the host's seconds between steps")
    first, spec = found[0], next((spec for one in found for spec in one.specs.values()), None)
    errors: dict[str, list[float]] = defaultdict(list)
    for features, cached, seconds in steps.used:
        kind = f"{features.regime} {'prompts' if features.prefill_tokens else 'decode'}"
        errors[kind].append(abs(fit.predicted(features, cached) / seconds - 1))
    told = ", ".join(f"{kind} {statistics.fmean(own):.1%} of {len(own)}" for kind, own in sorted(errors.items()))
    sizes: dict[str, Any] = {}
    if spec is not None:
        rank = max(spec.ranks.values())
        sizes = {"modules": len(spec.ranks), "rank_bytes": spec.num_bytes // rank}
    info, config = first.info, first.config
    return replace(
        like,
        name=name,
        source=(
            f"made by scripts/profile_of_recording.py of {len(found)} recorded replica(s): {len(steps.used)} steps "
            f"that nothing disturbed; mean distance of the fit: {told}. {steps.disturbed} others held "
            f"{steps.disturbed_seconds:.1f} s, for which all terms are multiplied by {steps.factor:.3f}. "
            f"{sum(len(one.loads) for one in found)} loads, {NUM_THREADS} at once. "
            f"Not recorded, and as of {like.name}: {', '.join(missing)}"
        ),
        model=f"{Path(info.model).name}, {info.dtype}",
        costs=costs,
        **options_of(info, config),
        versions=dict(info.versions),
        **sizes_of(info, config),
        context_token=fit.context_token,
        context=fit.context,
        loads_at_once=NUM_THREADS,
        **sizes,
    )


def compared(found: Sequence[Recording], profile: CostProfile) -> str:
    """Markdown: recorded over expected seconds, by kind of step; and what was added to the device's seconds."""
    weights = WithContext(
        {name: getattr(profile.costs, name) for name in STEP_TERMS}, profile.context_token, profile.context
    )
    kinds: dict[str, list[tuple[float, float | None, float]]] = defaultdict(list)
    device = expected = loading = other = 0.0
    for step in (step for one in found for step in one.steps):
        told = weights.predicted(padded(step.features, profile.prompt_sizes, profile.decode_sizes), step.num_cached)
        device, expected = device + step.seconds, expected + told
        if step.between is not None:
            added = step.between - step.seconds
            loading, other = loading + added * step.loading, other + added * (not step.loading)
        if not step.loading and not step.switched:
            kinds[_kind(step.features)].append((step.seconds, step.between, told))
    lines = ["| steps | number | expected (ms) | device | end to end |", "|---|---|---|---|---|"]
    for kind, own in sorted(kinds.items()):
        between = [seconds / told for _, seconds, told in own if seconds is not None]
        lines.append(
            f"| {kind} | {len(own)} | {1e3 * statistics.fmean(told for _, _, told in own):.2f} | "
            f"{statistics.median(seconds / told for seconds, _, told in own):.2f} | "
            + (f"{statistics.median(between):.2f} |" if between else "- |")
        )
    return "\n".join([
        *lines,
        f"device {device:.1f} s, expected {expected:.1f} s; between the ends of steps that follow each other "
        f"{loading:.1f} s more while adapters were on their way, and {other:.1f} s else",
    ])  # fmt: skip


def _kind(features: StepFeatures) -> str:
    prompts = features.prefill_tokens
    what = "decode" if not prompts else f"prompts to {next((n for n in (64, 256, 1024) if prompts <= n), '2048+')}"
    rows = next((n for n in (8, 16, 32, 64, 128) if features.decode_sequences <= n), "256+")
    return f"{features.regime}, {what}, rows to {rows}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, nargs="+", help="engine-*.jsonl")
    parser.add_argument("--like", help="profile that has the rest: a name of the package's, or a file")
    parser.add_argument("--output", type=Path, help="the profile; its name is the file's")
    parser.add_argument("--against", metavar="PROFILE", help="compare with this one, and write nothing")
    parser.add_argument("--disturbed", type=float, default=1.5, metavar="RATIO",
                        help="no term is fitted to steps that are further from what they should be")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.against is None and (options.like is None or options.output is None):
        parser.error("give --like and --output, or --against")
    found = all_of(options.recordings)
    if options.against is not None:
        print(compared(found, CostProfile.load(options.against)))
        return
    profile = made(found, CostProfile.load(options.like), options.output.stem, options.disturbed)
    profile.dump(options.output)
    print(profile.source)
    print(json.dumps({name: getattr(profile.costs, name) for name in (*STEP_TERMS, "load", "merge", "unmerge")}))
    print(options.output)


if __name__ == "__main__":
    main()
