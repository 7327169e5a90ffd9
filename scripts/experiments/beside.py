"""Rows of several runs in one file: whether they may stand beside each other, and what is told of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from experiments.loads import LoadSpec
from experiments.origin import USUAL
from experiments.points import Point
from experiments.tables import Row
from peft_dist.core.errors import ConfigError

KEYS: Mapping[str, Callable[[Point], Any]] = {
    "system": lambda point: point.system,
    "num_models": lambda point: point.load.adapters,
}
"""Columns that tell runs apart."""

# What two runs must agree in, and what a file that does not tell it had.
_SAME: Mapping[str, Any] = {"scale": None, "seed": None, "data": None, **USUAL}
# And two live ones: figures of two models or devices are no comparison of systems.
_LIVE: Mapping[str, Any] = _SAME | dict.fromkeys(
    ("model", "max_model_len", "replicas", "device", "versions", "options")
)


def kept(before: Sequence[Row], points: Sequence[Point], keys: Sequence[str]) -> list[Row]:
    """Rows that are not run again."""
    again = {tuple(KEYS[key](point) for key in keys) for point in points}
    return [row for row in before if tuple(row.get(key) for key in keys) not in again]


def check(
    table: Path,
    rows: Sequence[Row],
    told: Mapping[str, Any],
    about: Mapping[str, Any],
    rules: Callable[[str], Mapping[str, Any]],
) -> None:
    """Raises ConfigError where simulated ``rows``, of which ``told`` tells, are not of what ``about`` tells of.

    ``rules``: A system's, as they are now. What is told of a profile or of rules is told once for all rows.
    """
    if not rows:
        return
    names = list(dict.fromkeys(str(row["system"]) for row in rows))
    pairs = [(name, told.get(name, usual), about.get(name, usual)) for name, usual in _SAME.items()]
    # Pictures alone depend on matplotlib's.
    pairs.append(("versions", _without_pictures(told), _without_pictures(about)))
    known = {profile["name"]: profile for profile in told.get("profiles", ())}
    pairs += [(f"profile {one['name']}", known.get(one["name"]), one) for one in about["profiles"]]
    pairs += [(f"rules of {name}", told.get("systems", {}).get(name), rules(name)) for name in names]
    _same(table, names, pairs)


def check_live(
    table: Path, rows: Sequence[Row], keys: Sequence[str], told: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    """Raises ConfigError where live ``rows`` are of another load or server than ``own`` tells of."""
    for run in dict.fromkeys(run_name(keys, row) for row in rows):
        there = told.get("servers", {}).get(run, {})
        pairs = [(name, there.get(name, usual), own.get(name, usual)) for name, usual in _LIVE.items()]
        _same(table, [run], pairs)


def _same(table: Path, names: Sequence[str], pairs: Sequence[tuple[str, Any, Any]]) -> None:
    for name, there, here in pairs:
        for part, old, new in _differing(_plain(there), _plain(here)):
            raise ConfigError(
                f"{table} has rows of {', '.join(names)} that would stand beside others: their {name}{part} is {old}, "
                f"this run's is {new}. Give another --output, or remove the file"
            )


def _plain(value: Any) -> Any:
    """As it is when it was written and read."""
    return json.loads(json.dumps(value))


def _differing(there: Any, here: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values differ, down to the parts of objects that both have."""
    if isinstance(there, dict) and isinstance(here, dict) and there and here:
        for key in dict.fromkeys([*there, *here]):
            for part, old, new in _differing(there.get(key), here.get(key)):
                yield f", {key}{part}", old, new
    elif there != here:
        yield "", there, here


def run_name(keys: Sequence[str], row: Row) -> str:
    """Of what tells live runs apart: the system, and what else is served."""
    return ", ".join(str(row[key]) if key == "system" else f"{key} {row[key]}" for key in keys)


def _without_pictures(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.get("versions", {}).items() if name != "matplotlib"}


def in_order(rows: Sequence[Row], keys: Sequence[str], systems: Sequence[str]) -> list[Row]:
    """As one run of all ``systems`` has them."""
    places = {name: place for place, name in enumerate(systems)}

    def place(row: Row) -> tuple[Any, ...]:
        return (places.get(row["system"], len(places)), *(row[key] for key in keys if key != "system"))

    return sorted(rows, key=place)


def together(told: Mapping[str, Any], about: Mapping[str, Any], systems: Sequence[str]) -> dict[str, Any]:
    """What is told of all rows, which ``check`` has found to be of the same. ``systems``: All that the figure shows."""
    names = [one.name for one in fields(LoadSpec)]
    loads = {tuple(load[name] for name in names): load for load in (*told["loads"], *about["loads"])}
    profiles = {profile["name"]: profile for profile in (*told["profiles"], *about["profiles"])}
    rules = {**told["systems"], **about["systems"]}
    return {
        **about,
        "loads": list(loads.values()),
        "profiles": list(profiles.values()),
        "systems": {name: rules[name] for name in systems if name in rules},
    }
