"""The targets of the GPU benchmarks, and whether lines of measurements meet them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

Line = dict[str, Any]
ByBatch = dict[int, Line]
USUAL_RANK = "16"


@dataclass(frozen=True)
class Check:
    """A figure beside its target.

    Attributes:
        value, limit: In the same unit; ``limit`` may come from another measurement.
        at_least: Whether more is better.
    """

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def verdict(self) -> str:
        """ "met", or by how much not."""
        if self.met:
            return "met"
        return f"missed by {abs(1 - self.value / self.limit):.1%}" if self.limit else "missed"

    def as_dict(self) -> Line:
        found = {**asdict(self), "met": self.met, "verdict": self.verdict}
        return {key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()}


class Lines:
    """Measurements, found by what they are. Of two alike the later one counts."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self.all = list(lines)

    def find(self, **wanted: Any) -> Iterator[Line]:
        return (line for line in self.all if all(line.get(key) == value for key, value in wanted.items()))

    def last(self, **wanted: Any) -> Line | None:
        return next(reversed(list(self.find(**wanted))), None)

    def decode(self, engine: str, mode: str, kind: str, **more: Any) -> ByBatch:
        """The decode lines of a mode by batch size."""
        wanted = {"rank": USUAL_RANK, "resident_rank": None, **more}
        found = self.find(engine=engine, part="decode", mode=mode, adapters=kind, **wanted)
        if engine == "ours" and mode == "lora" and "resident" not in more:
            found = (line for line in found if line["resident"] == (8 if line["shape"] == "tiny" else 32))
        return {line["batch"]: line for line in found}

    def best_vllm(self, kind: str) -> ByBatch:
        """vLLM's better figures, with its opt-in flags or without."""
        plain, tuned = (self.decode("vllm", mode, kind) for mode in ("lora", "tuned"))
        better = {**tuned, **plain}
        for batch in plain.keys() & tuned.keys():
            better[batch] = min(plain[batch], tuned[batch], key=lambda line: line["step_ms"])
        return better

    def peft(self, part: str) -> ByBatch:
        return {line["batch"]: line for line in self.find(engine="peft", part=part)}

    def throughput(self, engine: str, mode: str, kind: str) -> Line | None:
        return self.last(engine=engine, part="throughput", mode=mode, adapters=kind, rank=USUAL_RANK)


def checks(lines: Lines) -> list[Check]:
    """Every target whose measurements are there."""
    groups: tuple[Callable[[Lines], Iterator[Check]], ...] = (
        _decode, _prefill, _throughput, _peft, _neighbour, _merge, _accuracy, _others,
    )  # fmt: skip
    return [check for group in groups for check in group(lines)]


def _steps(what: str, ours: ByBatch, factor: float, other: ByBatch, least_batch: int = 0) -> Iterator[Check]:
    for batch in sorted(ours.keys() & other.keys()):
        if batch >= least_batch:
            yield Check(f"{what}, B={batch}, ms", ours[batch]["step_ms"], factor * other[batch]["step_ms"])


def _decode(lines: Lines) -> Iterator[Check]:
    base = lines.decode("ours", "base", "none")
    distinct = lines.decode("ours", "lora", "distinct")
    yield from _steps("base ≤ 0.97 × vLLM's base", base, 0.97, lines.decode("vllm", "base", "none"))
    yield from _steps("merged ≤ 1.01 × our base", lines.decode("ours", "merged", "same"), 1.01, base)
    yield from _steps("one adapter ≤ 1.10 × our base", lines.decode("ours", "lora", "same"), 1.10, base)
    yield from _steps("32 distinct ≤ 1.20 × our base", distinct, 1.20, base)
    yield from _steps("32 distinct ≤ 0.5 × vLLM's better", distinct, 0.5, lines.best_vllm("distinct"), 32)
    for line in lines.find(engine="ours", part="decode", mode="merged"):
        yield Check(
            f"merged: share of steps that were, B={line['batch']}", line["merged_steps"] / line["steps"], 1.0, True
        )


def _prefill(lines: Lines, batch: int = 128) -> Iterator[Check]:
    base, vllm = (lines.decode(engine, "base", "none").get(batch) for engine in ("ours", "vllm"))
    distinct = lines.decode("ours", "lora", "distinct").get(batch)
    if base and vllm:
        yield Check("prefill of 128 × 128, base ≤ vLLM's, ms", base["prefill_ms"], vllm["prefill_ms"])
    if base and distinct:
        yield Check("prefill of 128 × 128, 32 adapters ≤ 1.10 × our base, ms", distinct["prefill_ms"],
                    1.10 * base["prefill_ms"])  # fmt: skip


def _throughput(lines: Lines) -> Iterator[Check]:
    key = "output_tokens_per_s"
    base, vllm = (lines.throughput(engine, "base", "none") for engine in ("ours", "vllm"))
    if base and vllm:
        yield Check("512 requests, base ≥ vLLM's, tokens/s", base[key], vllm[key], True)
    for kind in ("distinct", "zipf"):
        ours = lines.throughput("ours", "lora", kind)
        others = [line[key] for mode in ("lora", "tuned") if (line := lines.throughput("vllm", mode, kind))]
        if ours and others:
            yield Check(f"512 requests, {kind} ≥ 1.9 × vLLM's, tokens/s", ours[key], 1.9 * max(others), True)
        if ours and base:
            yield Check(f"512 requests, {kind} ≥ 0.88 × our base, tokens/s", ours[key], 0.88 * base[key], True)


def _peft(lines: Lines) -> Iterator[Check]:
    mixed = lines.peft("mixed")
    for what, ours, factor in (
        ("patch(model) ≥ 20 × PEFT", lines.peft("dropin"), 20),
        ("LLM ≥ 60 × PEFT", lines.decode("ours", "lora", "eight"), 60),
    ):
        for batch in sorted(ours.keys() & mixed.keys()):
            yield Check(
                f"{what}, 8 adapters, B={batch}, ×", mixed[batch]["step_ms"] / ours[batch]["step_ms"], factor, True
            )


def _neighbour(lines: Lines) -> Iterator[Check]:
    alone = lines.decode("ours", "lora", "distinct", rank="8")
    beside = lines.decode("ours", "lora", "distinct", rank="8", resident_rank=128)
    yield from _steps("rank 8 beside a resident rank 128 ≤ 1.02 × alone", beside, 1.02, alone)


def _merge(lines: Lines) -> Iterator[Check]:
    if line := lines.last(engine="ours", part="merge"):
        yield Check("merge ≤ 1.5 × copying as much, ms", line["merge_ms"], 1.5 * line["copy_ms"])
        # Asking an idle device whether it is done takes several times the limit by itself.
        beyond = round(line["unmerge_ms"] - line["idle_ms"], 4)
        yield Check("unmerge ≤ 0.1 ms, beyond asking an idle device", beyond, 0.1)


def _accuracy(lines: Lines) -> Iterator[Check]:
    for path in ("prefill", "decode"):
        if line := lines.last(engine="ours", part="accuracy", path=path):
            for peft in ("peft_bf16", "peft_autocast"):
                yield Check(
                    f"RMS error of {path}, {line['rows']} rows ≤ 1.05 × {peft}", line[f"ours_over_{peft}"], 1.05
                )


def _others(lines: Lines) -> Iterator[Check]:
    if line := lines.last(engine="ours", part="ttft"):
        yield Check("P99 of TTFT beside loads ≤ 1.1 × without, median of rounds", line["median_p99_ratio"], 1.1)
    for line in lines.find(engine="ours", part="profile decode"):
        label = f"{line['mode']}, {line['adapters']}, B={line['batch']}"
        yield Check(f"GPU idle ≤ 2 %, {label}", line["idle_share"], 0.02)
    if line := lines.last(engine="ours", part="soak"):
        yield Check("soak: requests that failed", line["failed"], 0)
    if starts := [
        line["first_token_s"] for line in lines.find(engine="ours", part="start", mode="lora", rank=USUAL_RANK)
    ]:
        yield Check("start to first token ≤ 60 s", min(starts), 60)
