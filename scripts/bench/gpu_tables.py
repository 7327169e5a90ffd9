"""Measurements of the GPU benchmarks as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bench.gpu_checks import ByBatch, Check, Lines

_ROWS = (
    ("vLLM, base only", "vllm", "base", "none"),
    ("vLLM, LoRA on, unused", "vllm", "lora", "none"),
    ("vLLM, one adapter", "vllm", "lora", "same"),
    ("vLLM tuned, one adapter", "vllm", "tuned", "same"),
    ("vLLM, Zipf over 32", "vllm", "lora", "zipf"),
    ("vLLM tuned, Zipf over 32", "vllm", "tuned", "zipf"),
    ("vLLM, 32 distinct", "vllm", "lora", "distinct"),
    ("vLLM tuned, 32 distinct", "vllm", "tuned", "distinct"),
    ("ours, base only", "ours", "base", "none"),
    ("ours, merged", "ours", "merged", "same"),
    ("ours, LoRA on, unused", "ours", "lora", "none"),
    ("ours, one adapter", "ours", "lora", "same"),
    ("ours, Zipf over 32", "ours", "lora", "zipf"),
    ("ours, 32 distinct", "ours", "lora", "distinct"),
)
Cell = Callable[[dict[str, Any]], str]


def tables(lines: Lines, checks: Iterable[Check]) -> Iterator[str]:
    """One after another, those for which there are measurements."""
    ours, vllm = (lines.decode(engine, "base", "none") for engine in ("ours", "vllm"))
    rows = {label: lines.decode(engine, mode, kind) for label, engine, mode, kind in _ROWS}
    yield _by_batch("decode step, ms (× our base)", rows, lambda line: f"{line['step_ms']:.2f}{_times(line, ours)}")
    yield _by_batch("decode step ÷ vLLM's on the same adapters", {
        label: _ratios(rows[label], vllm if kind == "none" else lines.best_vllm(kind))
        for label, engine, _, kind in _ROWS if engine == "ours"
    }, lambda line: f"{line['ratio']:.2f}")  # fmt: skip
    yield _by_batch("prefill of B × 128 tokens, ms", rows, lambda line: f"{line['prefill_ms']:.1f}")
    yield _throughput(lines)
    peft = {f"PEFT, {part}": lines.peft(part) for part in ("base", "one", "mixed", "dropin")}
    peft["LLM, 8 adapters"] = lines.decode("ours", "lora", "eight")
    yield _by_batch("step of generate, ms", peft, lambda line: f"{line['step_ms']:.2f}")
    yield _by_batch("32 distinct by rank, step, ms", {
        f"rank {rank}": lines.decode("ours", "lora", "distinct", rank=rank) for rank in ("8", "16", "64", "128", "mix")
    } | {"rank 8 beside a resident 128": lines.decode("ours", "lora", "distinct", rank="8", resident_rank=128)},
        lambda line: f"{line['step_ms']:.2f}")  # fmt: skip
    yield _by_batch("adapters evenly by how many are resident, step, ms", {
        f"{count} resident": lines.decode("ours", "lora", "distinct", resident=count) for count in (1, 4, 8, 32, 128)
    }, lambda line: f"{line['step_ms']:.2f}")  # fmt: skip
    yield _checks(checks)


def _times(line: dict[str, Any], base: ByBatch) -> str:
    other = base.get(line["batch"])
    return (
        f" ({line['step_ms'] / other['step_ms']:.2f})"
        if other and line["engine"] == "ours" and line is not other
        else ""
    )


def _ratios(ours: ByBatch, others: ByBatch) -> ByBatch:
    return {
        batch: {"ratio": line["step_ms"] / others[batch]["step_ms"]} for batch, line in ours.items() if batch in others
    }


def _by_batch(title: str, rows: dict[str, ByBatch], cell: Cell) -> str:
    batches = sorted({batch for row in rows.values() for batch in row})
    body = [[label, *(cell(row[b]) if b in row else "" for b in batches)] for label, row in rows.items() if row]
    return _table([title, *(f"B={batch}" for batch in batches)], body)


def _throughput(lines: Lines) -> str:
    body = []
    for label, engine, mode, kind in _ROWS:
        if line := lines.throughput(engine, mode, kind):
            sizes = f"{line['requests']}: {line['prompt_tokens']:,} in, {line['output_tokens']:,} out"
            body.append([label, f"{line['output_tokens_per_s']:,.0f}", f"{line['seconds']:.1f}", sizes])
    return _table(["all requests at once", "output tokens/s", "seconds", "requests"], body)


def _checks(found: Iterable[Check]) -> str:
    body = [[check.what, f"{check.value:.4g}", f"{check.limit:.4g}", check.verdict] for check in found]
    return _table(["target", "measured", "limit", ""], body)


def _table(head: list[str], body: list[list[str]]) -> str:
    """Empty when it has no rows."""
    if not body:
        return ""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
