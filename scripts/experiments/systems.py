"""The systems that are compared: the paper's as its artifact runs them and as is fair, and modern ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_dist.core.errors import ConfigError
from peft_dist.placement.placer import MigrationKind


@dataclass(frozen=True, slots=True)
class System:
    """One way to serve.

    Attributes:
        name: In the CSV's column ``system``.
        label: In pictures.
        exec_type: As the simulator knows it (``peft_dist.sim.baselines`` has the other ones than "dlora").
        kind: What the artifact's column ``exec_type`` says.
        form: "artifact" (by the constants and rules of the authors' code), "fair" (the same system done well, dLoRA
            being ours), or "modern" (not in the paper).
        policy, migration: As ``peft-dist serve`` knows them; None leaves them to the kind of execution.
        style: Of its line.
        live: How a live server that is asked for it differs from what is meant; empty: it does not.
        is_live: Whether such a server says anything of it at all.
    """

    name: str
    label: str
    exec_type: str
    kind: str
    form: str
    policy: str | None
    migration: MigrationKind
    style: Mapping[str, Any]
    live: str = ""
    is_live: bool = True


_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _BROWN = (
    f"tab:{name}" for name in ("blue", "orange", "green", "red", "purple", "brown")
)


# Of live servers.
_MOVES_KV = "running requests that move bring their KV where that is cheaper"
_OUR_CLUSTER = f"batches and constants are the artifact's, dispatch, placement and moves are ours; {_MOVES_KV}"
_MADE_ANEW = "a model that is not on the device is merged there from the base, and not copied in"
_NOT_EVERY_STEP = "its batches are the artifact's, but weights are not merged and unmerged in every step"


def _line(color: str, line: str = "-", marker: str = "o") -> dict[str, Any]:
    return {"color": color, "linestyle": line, "marker": marker, "markersize": 3, "linewidth": 1.2}


def _artifacts(name: str, label: str, color: str, policy: str, migration: MigrationKind) -> System:
    """dLoRA with its artifact's constants and rules."""
    style = _line(color, ":", "^")
    return System(name, f"{label}, artifact's", "dlora", "dlora", "artifact", policy, migration, style, _OUR_CLUSTER)


def _ours(name: str, label: str, color: str, policy: str = "credit", migration: MigrationKind = "dlora") -> System:
    live = _MOVES_KV if migration == "dlora" else ""
    return System(name, label, "dlora", "dlora", "fair", policy, migration, _line(color), live)


def _modern(name: str, label: str, color: str, exec_type: str, policy: str, migration: MigrationKind) -> System:
    return System(name, label, exec_type, "dlora", "modern", policy, migration, _line(color, "--", "s"))


def _baseline(name: str, label: str, color: str, form: str, migration: MigrationKind) -> System:
    kind, fair = name.removesuffix("-artifact"), form == "fair"
    style = _line(color) if fair else _line(color, ":", "^")
    words = label if fair else f"{label}, artifact's"
    live = {"vllm": _MADE_ANEW, "peft": "" if fair else _NOT_EVERY_STEP}[kind]
    return System(name, words, name, kind, form, None, migration, style, live, is_live=name != "peft-artifact")


_ALL = (
    _baseline("vllm-artifact", "vLLM", _BLUE, "artifact", "rr"),
    _baseline("vllm", "vLLM", _BLUE, "fair", "rr"),
    _baseline("peft-artifact", "PEFT", _ORANGE, "artifact", "dlora"),
    _baseline("peft", "PEFT", _ORANGE, "fair", "rr"),
    _artifacts("dlora-artifact", "dLoRA", _GREEN, "credit", "dlora"),
    _artifacts("fcfs-artifact", "unmerged only", _BLUE, "fcfs", "dlora"),
    _artifacts("merge-artifact", "merged only", _ORANGE, "merge", "dlora"),
    _artifacts("rr-artifact", "RR", _BLUE, "credit", "rr"),
    _artifacts("proactive-artifact", "proactive", _ORANGE, "credit", "proactive"),
    _ours("dlora", "dLoRA", _GREEN),
    _ours("fcfs", "unmerged only", _BLUE, policy="fcfs"),
    _ours("merge", "merged only", _ORANGE, policy="merge"),
    _ours("rr", "RR", _BLUE, migration="rr"),
    _ours("proactive", "proactive", _ORANGE, migration="proactive"),
    _modern("kv", "dLoRA, KV moves too", _RED, "dlora", "credit", "dlora"),
    _modern("grouped", "grouped kernel, unmerged only", _PURPLE, "grouped", "fcfs", "proactive"),
    _modern("corrected", "grouped kernel, merged with corrections", _BROWN, "grouped", "credit", "dlora"),
)
SYSTEMS: Mapping[str, System] = {one.name: one for one in _ALL}


def chosen(names: Iterable[str], wanted: Iterable[str]) -> list[System]:
    """Of a figure's systems those that were asked for, all if none was. Raises ConfigError for unknown names."""
    names, wanted = list(names), list(wanted)
    if unknown := [name for name in wanted if name not in names]:
        raise ConfigError(f"this figure does not show the system {unknown[0]!r}: it has {', '.join(names)}")
    return [SYSTEMS[name] for name in names if not wanted or name in wanted]
