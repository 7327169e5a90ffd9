"""The options of bench_balance.py in its results, and back: the same arrivals can be made from them again."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping
from typing import Any

from experiments.loads import Data

# What decides nothing of a run, and where its data lay.
_LEFT_OUT = ("output", "folder", "plot", "join", "simulate", "profile", "data", "tokenizer")


def to_keep(options: argparse.Namespace, data: Data) -> dict[str, Any]:
    """JSON values; of a trace also where it and its lengths come from."""
    kept = {key: value for key, value in vars(options).items() if key not in _LEFT_OUT}
    return kept | ({"data": data.source} if options.trace else {})


def of_result(settings: Mapping[str, Any], parser: argparse.ArgumentParser, data: Data) -> argparse.Namespace:
    """The options that a result was measured with; those it does not know are as by default.

    Raises SystemExit where its trace or lengths are others than those that are given now.
    """
    options = parser.parse_args([])
    source = settings.get("data")
    if source is not None and source != data.source:
        raise SystemExit(f"the result's data are {source}, not {data.source}: give the same --data")
    for key, value in settings.items():
        if key not in _LEFT_OUT:
            setattr(options, key, _value(key, value))
    return options


def _value(key: str, value: Any) -> Any:
    """Older results have all values in words."""
    if not isinstance(value, str) or key in ("shape", "name"):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
