"""Pictures in PDF and PNG whose bytes depend on nothing but what they show (and matplotlib's release)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import origin
from experiments.systems import SYSTEMS
from experiments.tables import Row, read_csv, read_json
from peft_dist.core.errors import ConfigError

# Without these, dates, versions and random ids are written into the files.
_METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None},
    "png": {"Software": None},
}
_HATCHES = {"artifact": "////"}
_STYLE = {"svg.hashsalt": "peft-dist", "pdf.fonttype": 42, "font.size": 9.0}


def figure(width: float, height: float) -> Any:
    """An empty figure, inches. Raises ConfigError without matplotlib (the extra ``figures``)."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ConfigError("a picture needs matplotlib: pip install 'peft-dist[figures]'") from missing
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Any, folder: Path, name: str, tables: Sequence[str]) -> None:
    """``name``.pdf and ``name``.png, which say above what the JSON beside the CSVs ``tables`` says of their origin."""
    import matplotlib

    origins = dict.fromkeys(_origin(read_json(folder / f"{table}.json")) for table in tables)
    drawn.suptitle("\n".join(words for words in origins if words), fontsize=6, color="dimgrey")
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        for kind, metadata in _METADATA.items():
            drawn.savefig(folder / f"{name}.{kind}", metadata=metadata, dpi=150)


def _origin(about: Mapping[str, Any]) -> str:
    """Simulated or live, of what, how large, with which data and what else is unusual; empty where nothing is told."""
    data = about.get("data", {})
    if isinstance(data, str):
        data = {"data": data.partition(",")[0]}
    elif data and all(str(value).startswith("synthetic") for value in data.values()):
        more = [f"{key} {value.split('(')[1].rstrip(')')}" for key, value in data.items() if value != "synthetic"]
        data = {"data": ", ".join(["synthetic", *more])}
    parts = {key: about[key] for key in ("device", "scale", "seed") if key in about} | data
    words = [f"{key} {value}" for key, value in parts.items()]
    return ", ".join([*filter(None, [about.get("mode")]), *origin.server(about), *words, *origin.unusual(about)])


def lines(axes: Any, rows: Sequence[Row], x: str, y: str) -> None:
    """A line for each system."""
    for name in dict.fromkeys(row["system"] for row in rows):
        own = sorted((row for row in rows if row["system"] == name), key=lambda row: row[x])
        points = [(row[x], row[y]) for row in own if row[y] is not None]
        system = SYSTEMS[name]
        axes.plot(*zip(*points, strict=True), label=system.label, **system.style)


def bars(axes: Any, rows: Sequence[Row], x: str, y: str) -> None:
    """A group of bars for each value of ``x``, in it one for each system."""
    places = list(dict.fromkeys(row[x] for row in rows))
    names = list(dict.fromkeys(row["system"] for row in rows))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        own = {row[x]: row[y] for row in rows if row["system"] == name}
        offsets = [index + (number - (len(names) - 1) / 2) * width for index in range(len(places))]
        heights = [own.get(place) or 0.0 for place in places]
        system = SYSTEMS[name]
        hatch = _HATCHES.get(system.form)
        axes.bar(offsets, heights, width, label=system.label, color=system.style["color"], hatch=hatch, edgecolor="w")
    axes.set_xticks(range(len(places)), [str(place) for place in places])


def bar_picture(
    folder: Path, table: str, name: str, x: str, y: str, words: tuple[str, str], size: tuple[float, float] = (4.5, 3.2)
) -> None:
    """A picture ``name`` of one CSV. ``words``: At its axes; ``size``: inches."""
    drawn = figure(*size)
    axes = drawn.add_subplot()
    bars(axes, read_csv(folder / f"{table}.csv"), x, y)
    axes.set(xlabel=words[0], ylabel=words[1])
    legend(drawn, [axes])
    save(drawn, folder, name, [table])


def legend(drawn: Any, axes: Any) -> None:
    """One for the whole figure, below it."""
    found = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    columns = int(drawn.get_figwidth() // 2.2)
    drawn.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False, fontsize=7
    )
