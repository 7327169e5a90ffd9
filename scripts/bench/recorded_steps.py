"""What steps, switches and loads of recorded engines took (docs/simulator.md, replay), with what they were."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig, ModelInfo
from peft_dist.core.cost_model import StepFeatures
from peft_dist.engine.recording import Add, Begin, Collected, Entry, Import, Loaded, Register, Step, Submitted, Switched


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One step. Seconds are of the engine's clock.

    Attributes:
        at: When the engine began to decide it.
        features: Of its batch.
        num_cached: Tokens in the KV cache before it, of all sequences that compute one token.
        seconds: What the device said that it took.
        between: From the end of the step before it to its own, as the engine saw them; None where none was right
            before it.
        switched: A change of the weights went before it.
        loading: An adapter was on its way to the device meanwhile.
    """

    at: float
    features: StepFeatures
    num_cached: int
    seconds: float
    between: float | None
    switched: bool
    loading: bool


@dataclass(frozen=True, slots=True)
class RecordedLoad:
    """An adapter's way to the device: bytes, when it was asked for and there, and seconds of the last copy alone."""

    num_bytes: int
    began: float
    ended: float
    copy_seconds: float | None


@dataclass(slots=True)
class Recording:
    """One engine.

    Attributes:
        config, info: What it was started with.
        specs: Its adapters, by content.
        adds: Requests, in order.
        switches: ("merge" or "unmerge", seconds) of each change of the weights that told its seconds, but for those
            back to a merged copy that was kept.
    """

    config: EngineConfig
    info: ModelInfo
    specs: dict[str, AdapterSpec] = field(default_factory=dict)
    adds: list[Add] = field(default_factory=list)
    steps: list[RecordedStep] = field(default_factory=list)
    loads: list[RecordedLoad] = field(default_factory=list)
    switches: list[tuple[str, float]] = field(default_factory=list)


@dataclass(slots=True)
class _Round:
    """One call of the engine: when it began, and what it submitted and collected."""

    now: float
    submitted: Submitted | None = None
    switch: Switched | None = None
    collected: Collected | None = None


def recordings(entries: Iterable[Entry]) -> list[Recording]:
    """One for each engine that a file tells of."""
    found: list[tuple[Recording, list[_Round]]] = []
    for entry in entries:
        if isinstance(entry, Begin):
            found.append((Recording(entry.config, entry.info), []))
        elif found:
            _take(entry, *found[-1])
    for recording, rounds in found:
        recording.steps = list(_steps(recording, rounds))
    return [recording for recording, _ in found]


def service_seconds(loads: Sequence[RecordedLoad], at_once: int) -> list[tuple[int, float]]:
    """(bytes, seconds) of each load from when it had its turn, where so many run at once and others wait in order."""
    free = [float("-inf")] * at_once
    found = []
    for load in sorted(loads, key=lambda one: (one.began, one.ended)):
        begins = max(load.began, heapq.heappop(free))
        found.append((load.num_bytes, max(load.ended - begins, 0.0)))
        heapq.heappush(free, load.ended)
    return found


def _take(entry: Entry, into: Recording, rounds: list[_Round]) -> None:
    match entry:
        case Register(spec=spec):
            into.specs[spec.content_hash] = spec
        case Add():
            into.adds.append(entry)
        case Import(requests=requests):
            into.adds.extend(requests)
        case Step(now=now):
            rounds.append(_Round(now))
        case Loaded(outcomes=outcomes):
            for one in outcomes:
                # Taken up in this round, or in the one that is about to begin.
                if one.error is None and rounds and (spec := into.specs.get(one.content_hash)):
                    now = rounds[-1].now
                    into.loads.append(RecordedLoad(spec.num_bytes, now - one.seconds, now, one.copy_seconds))
        case Submitted() if rounds:
            rounds[-1].submitted = entry
        case Switched() if rounds:
            rounds[-1].switch = entry
        case Collected() if rounds:
            rounds[-1].collected = entry


def _steps(recording: Recording, rounds: Sequence[_Round]) -> Iterable[RecordedStep]:
    hashes = {add.request_id: add.content_hash or "" for add in recording.adds}
    ways = sorted((load.began, load.ended) for load in recording.loads)
    begun: dict[int, tuple[int, Submitted, Switched | None]] = {}
    merged = held = None
    for index, one in enumerate(rounds):
        if one.submitted is not None:
            begun[one.submitted.step] = index, one.submitted, one.switch
        if one.collected is None or one.collected.result.step not in begun:
            continue
        result = one.collected.result
        started, submitted, switch = begun.pop(result.step)
        if switch is not None and switch.error is None:
            seconds = result.switch_seconds if switch.seconds is None else switch.seconds
            # Back to a merged copy that was kept is no merge.
            if seconds is not None and switch.target not in (merged, held):
                recording.switches.append(("unmerge" if switch.target is None else "merge", seconds))
            merged = switch.target
            if merged is not None and recording.info.merge_way == "shadow":
                held = merged
        if result.seconds is None or not submitted.sequences:
            continue
        follows = rounds[index + 1].now if index + 1 < len(rounds) else None
        # The one before it was waited for in the call that submitted this one, and the call that waited for this one
        # had submitted another: the device was never without work, and the next call came at once.
        is_between = started < index and rounds[started].collected is not None and one.submitted is not None
        between = follows - one.now if follows is not None and is_between else None
        ends = one.now if follows is None else follows
        yield RecordedStep(
            at=rounds[started].now,
            features=_features(submitted, hashes, recording.specs),
            num_cached=sum(start for _, start, tokens, _ in submitted.sequences if tokens == 1),
            seconds=result.seconds,
            between=between,
            switched=switch is not None,
            loading=_overlaps(ways, rounds[started].now, ends),
        )


def _features(submitted: Submitted, hashes: dict[str, str], specs: dict[str, AdapterSpec]) -> StepFeatures:
    rows = []
    for request, _, tokens, _ in submitted.sequences:
        name = hashes.get(request, "")
        rows.append((name, tokens, specs[name].num_rank_rows if name else 0))
    merged = submitted.merged_adapter
    rank = max((rank for name, _, rank in rows if name == merged), default=0)
    return StepFeatures.of(rows, merged, rank)


def _overlaps(ways: Sequence[tuple[float, float]], begins: float, ends: float) -> bool:
    """Whether one of the intervals shares a moment with this one."""
    return any(began <= ends and ended >= begins for began, ended in ways)
