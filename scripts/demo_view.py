"""The demo's screen."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_COLOURS = {"sql": "cyan", "json": "yellow", "sentiment": "magenta", "style": "green", "base": "white"}


def show(
    chats: list[tuple[str, str]],
    answers: list[str],
    peft_answers: list[str],
    ours: dict[str, float],
    theirs: dict[str, float],
    svg: Path,
) -> None:
    """Print the answers and the comparison, and keep the screen as an SVG."""
    console = Console(record=True, width=132)
    table = Table(title="Twenty chats, one batch: the base and four adapters", show_lines=False, pad_edge=False)
    for title, width in (("model", 10), ("question", 52), ("answer", 52), ("= PEFT", 6)):
        table.add_column(title, width=width, overflow="fold")
    order = sorted(range(len(chats)), key=lambda i: list(_COLOURS).index(chats[i][0]))
    for place, i in enumerate(order):
        name, question = chats[i]
        same = "[green]yes" if answers[i] == peft_answers[i] else "[red]no"
        last = place + 1 == len(order) or chats[order[place + 1]][0] != name
        colour = _COLOURS[name]
        answer = escape(_short(answers[i]))
        table.add_row(f"[{colour}]{name}", escape(_short(question)), f"[{colour}]{answer}", same, end_section=last)
    console.print(table)
    console.print(_comparison(ours, theirs))
    equal = sum(a == b for a, b in zip(answers, peft_answers, strict=True))
    console.print(f"{equal} of {len(answers)} answers are PEFT's, letter for letter.")
    svg.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(svg), title="make demo")


def _comparison(ours: dict[str, float], theirs: dict[str, float]) -> Table:
    table = Table(title="The same chats, this machine, this run (float32)", pad_edge=False)
    for title in ("", "peft_dist server", "PEFT generate(adapter_names=...)", "ratio"):
        table.add_column(title, justify="right" if title else "left")
    rates = [run["tokens"] / run["seconds"] for run in (ours, theirs)]
    firsts = [run["first token"] for run in (ours, theirs)]
    table.add_row("tokens/s", *(f"{rate:.0f}" for rate in rates), f"{rates[0] / rates[1]:.1f} x")
    table.add_row(
        "time to first token, mean", *(f"{first:.2f} s" for first in firsts), f"{firsts[1] / firsts[0]:.1f} x"
    )
    table.add_row(
        "all answers after",
        *(f"{run['seconds']:.1f} s" for run in (ours, theirs)),
        f"{theirs['seconds'] / ours['seconds']:.1f} x",
    )
    return table


def _short(text: str, width: int = 150) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
