"""Simulated rows of several runs in one file: whether they may stand beside each other, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from experiments.loads import LoadSpec
from experiments.points import Point
from experiments.tables import Row
from peft_dist.core.errors import ConfigError

KEYS: Mapping[str, Callable[[Point], Any]] = {
    "system": lambda point: point.system,
    "num_models": lambda point: point.load.adapters,
}
"""Columns that tell runs apart."""

# What two runs must agree in, and what a file that does not tell it had.
_SAME = {"scale": None, "seed": None, "data": None, "correlated": False, "rate_factor": 1.0, "max_total": None}


def kept(before: Sequence[Row], points: Sequence[Point], keys: Sequence[str]) -> list[Row]:
    """Rows that are not run again."""
    again = {tuple(KEYS[key](point) for key in keys) for point in points}
    return [row for row in before if tuple(row.get(key) for key in keys) not in again]


def check(table: Path, rows: Sequence[Row], told: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Raises ConfigError where ``rows``, of which ``told`` tells, are not of what ``about`` tells of."""
    if not rows:
        return
    systems = ", ".join(dict.fromkeys(str(row["system"]) for row in rows))
    own = {name: (told.get(name, usual), about.get(name, usual)) for name, usual in _SAME.items()}
    # Pictures alone depend on matplotlib's.
    own["versions"] = (_without_pictures(told), _without_pictures(about))
    for name, (there, here) in own.items():
        if there != here:
            raise ConfigError(
                f"{table} has rows of {systems} that would stand beside others: their {name} is {there}, this run's is "
                f"{here}. Give another --output, or remove the file"
            )


def _without_pictures(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.get("versions", {}).items() if name != "matplotlib"}


def in_order(rows: Sequence[Row], keys: Sequence[str], systems: Sequence[str]) -> list[Row]:
    """As one run of all ``systems`` has them."""
    places = {name: place for place, name in enumerate(systems)}

    def place(row: Row) -> tuple[Any, ...]:
        return (places.get(row["system"], len(places)), *(row[key] for key in keys if key != "system"))

    return sorted(rows, key=place)


def together(told: Mapping[str, Any], about: Mapping[str, Any], systems: Sequence[str]) -> dict[str, Any]:
    """What is told of all rows. ``systems``: All that the figure shows."""
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
