"""Tables of the experiments' results beside the authors' figures, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import authors, origin
from experiments.authors import rate_at
from experiments.measured import OBJECTIVE
from experiments.systems import SYSTEMS
from experiments.tables import Row

Found = Mapping[str, Mapping[str, Any]]


def tables(found: Found) -> dict[str, str]:
    """By name of the CSV; ``fig5`` is one table of all devices, ``fig9`` of all panels."""
    made = {name: _TABLES[name](found[name]["rows"], found[name]["about"]) for name in _TABLES if name in found}
    if devices := [one for name, one in found.items() if name == "fig5" or name.startswith("fig5_")]:
        made["fig5"] = _fig5(devices)
    panels = {name.removeprefix("fig9_"): one for name, one in found.items() if name.startswith("fig9_")}
    if panels:
        made["fig9"] = _fig9(panels)
    return made


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(lines + [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows])


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _what(about: Mapping[str, Any]) -> str:
    """Where a table comes from."""
    data = about.get("data")
    told = ", ".join(f"{key} {value}" for key, value in data.items()) if isinstance(data, dict) else data
    parts = [about.get("mode"), f"scale {about['scale']}" if "scale" in about else None, told]
    seed = f"seed {about['seed']}" if "seed" in about else None
    parts = [*parts[:1], *origin.server(about), *parts[1:], seed, *origin.unusual(about)]
    words = "; ".join(part for part in parts if part)
    return f"*{words}*\n\n" if words else ""


def _by_system(rows: Sequence[Row], x: str, y: str) -> dict[str, dict[float, float]]:
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        found.setdefault(row["system"], {})[row[x]] = row[y]
    return found


def _curves(
    rows: Sequence[Row], about: Mapping[str, Any], x: str, y: str, head: str, known: Mapping[str, dict[float, float]]
) -> str:
    """A row for each system and, behind, for each curve of the authors'."""
    own = _by_system(rows, x, y)
    places = sorted({place for curve in (*own.values(), *known.values()) for place in curve})
    lines: list[list[Any]] = [
        [SYSTEMS[name].label, *(curve.get(place) for place in places)] for name, curve in own.items()
    ]
    lines += [[f"*authors: {name}*", *(curve.get(place) for place in places)] for name, curve in known.items()]
    return _what(about) + _table([head, *(f"{place:g}" for place in places)], lines)


def _fig2b(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    return _curves(rows, about, "replica_id", "queueing_ratio", "% queueing, by replica", {"vLLM": authors.FIGURE2})


_FIG5 = {
    "Wx": "Wx", "BAx": "BAx", "grouped_one": "grouped kernel, one adapter", "grouped_each": "grouped kernel, one a row",
}  # fmt: skip


def _fig5(devices: Sequence[Mapping[str, Any]]) -> str:
    """A line for each device, and one more for what was captured there."""
    lines: list[list[str]] = []
    for one in devices:
        environment, rows = one["about"].get("environment", {}), one["rows"]
        device = environment.get("gpu")
        if one["about"].get("device") == "cpu":
            device = f"{environment.get('cpu')}, {environment.get('torch_threads')} threads"
        lines.append([str(device), *(_span(rows, name) for name in _FIG5)])
        if "Wx_captured" in rows[0]:
            lines.append([f"{device}, in a CUDA graph", *(_span(rows, f"{name}_captured") for name in _FIG5)])
    known = authors.FIGURE5
    spans = (f"{known[name][0]:g} to {known[name][1]:g}" if name in known else "" for name in _FIG5)
    lines.append(["*authors*", *spans])
    return "*measured*\n\n" + _table(["microseconds, batches of 2 to 16", *_FIG5.values()], lines)


def _span(rows: Sequence[Row], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    return f"{min(values):.4g} to {max(values):.4g}" if values else ""


def _fig7(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    lines = [
        ["quietest over busiest bin", min(row["relative"] for row in rows), authors.FIGURE7[1] / authors.FIGURE7[0]]
    ]
    return _what(about) + _table(["", "ours", "*authors*"], lines)


def _fig9(panels: Mapping[str, Mapping[str, Any]]) -> str:
    """Requests a second at which the mean reaches the objective, and how many times that dLoRA of that form takes."""
    reached = {panel: _reached(one["rows"]) for panel, one in panels.items()}
    names = list(dict.fromkeys(name for one in reached.values() for name in one))
    lines = []
    for name in names:
        line: list[Any] = [SYSTEMS[name].label]
        for one in reached.values():
            text, value = one.get(name, ("", None))
            words, against = one.get("dlora-artifact" if SYSTEMS[name].form == "artifact" else "dlora", ("", None))
            ratio = ""
            if value and against and not text.startswith("above") and not name.startswith("dlora"):
                ratio = f" ({'over ' * words.startswith('above')}{against / value:.1f} ×)"
            line.append(text + ratio)
        lines.append(line)
    known = {name: rate_at(curve, OBJECTIVE) for name, curve in authors.FIGURE9.items()}
    for name, value in known.items():
        ratio = f" ({known['dlora'] / value:.1f} ×)" if value and known["dlora"] and name != "dlora" else ""
        lines.append([f"*authors: {name}*", *(f"{value:.1f}{ratio}" if p == "maf1_7b" else "" for p in reached)])
    lines.append(["*replicas: ours*", *(_replicas(one["rows"]) for one in panels.values())])
    lines.append(["*replicas: authors*", *(_AUTHORS_REPLICAS if p == "maf1_7b" else "" for p in reached)])
    about = next(iter(panels.values()))["about"]
    parts = [_what(about) + _table(["requests/s at a mean of 0.5 s/token", *reached], lines)]
    if "maf1_7b" in panels:
        parts.append(_fig9_curves(panels["maf1_7b"]["rows"]))
    return "\n\n".join(parts)


_AUTHORS_REPLICAS = 32


def _replicas(rows: Sequence[Row]) -> str:
    return ", ".join(map(str, sorted({row["replicas"] for row in rows})))


def _fig9_curves(rows: Sequence[Row]) -> str:
    """The one panel of which the authors' curve is known, by the load of a replica: clusters differ in size."""
    own = [{**row, "share": round(row["rate"] / row["replicas"], 6)} for row in rows]
    known = {
        name: {round(rate / _AUTHORS_REPLICAS, 6): value for rate, value in curve.items()}
        for name, curve in authors.FIGURE9.items()
    }
    return _curves(own, {}, "share", "avg_lat", "MAF1, 7b: mean s/token, by requests/s a replica", known)


def _reached(rows: Sequence[Row]) -> dict[str, tuple[str, float | None]]:
    """By system: words, and the rate where there is one, or which it is above."""
    found: dict[str, tuple[str, float | None]] = {}
    for name, curve in _by_system(rows, "rate", "avg_lat").items():
        known = {rate: value for rate, value in curve.items() if value is not None}
        rate = rate_at(known, OBJECTIVE)
        if rate is not None:
            found[name] = (f"{rate:.3g}", rate)
        elif not known or known[min(known)] > OBJECTIVE:
            found[name] = (f"below {min(curve):g}", None)
        else:
            found[name] = (f"above {max(curve):g}", max(curve))
    return found


def _fig10(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    parts: list[str] = []
    for column, words in (("avg_lat", "mean s/token, by stride"), ("p90_lat", "P90 s/token, by stride")):
        parts.append(_curves(rows, about if not parts else {}, "stride", column, words, authors.FIGURE10[column]))
    return "\n\n".join(parts)


def _fig11a(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    return _curves(rows, about, "rate", "queueing_delay", "queueing s/token, by requests/s", authors.FIGURE11A)


def _fig11b(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    return _curves(rows, about, "ratio", "avg_lat", "mean s/token, by ratio of lengths", authors.FIGURE11B)


def _fig12(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    return _curves(rows, about, "num_models", "throughput", "requests/s, by adapters", authors.FIGURE12)


def _fig13(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    parts: list[str] = []
    for column, words, place in (("switching", "switching", 0), ("solver", "plans", 1)):
        known = {rate: 100 * times[place] / times[2] for rate, times in authors.FIGURE13.items()}
        seconds = about.get("assumed_plan_seconds") if column == "solver" else None
        words += f" of {seconds:g} s each (assumed)" if seconds is not None else ""
        head = f"{words}, % of the run, by requests/s"
        parts.append(_curves(rows, about if not parts else {}, "rate", column, head, {"dlora": known}))
    return "\n\n".join(parts)


_TABLES = {
    "fig2b": _fig2b, "fig7": _fig7, "fig10": _fig10, "fig11a": _fig11a, "fig11b": _fig11b,
    "fig12": _fig12, "fig13": _fig13,
}  # fmt: skip
