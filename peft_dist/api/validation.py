"""What pydantic found wrong in a body, in words that name the field as its sender wrote it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

_SHOWN_CHARS = 80
_TYPE_NAMES = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list"}


def describe_validation_error(error: RequestValidationError) -> tuple[str, str | None]:
    """Message and field name (None for the body as a whole) of the first problem."""
    first: dict[str, Any] = dict(error.errors()[0])
    location = tuple(first["loc"])[1:]
    if first["type"] == "json_invalid":
        at = f" at character {location[0]}" if location else ""
        return f"the body is not valid JSON: {first['ctx']['error']}{at}", None
    if not location:
        if first["type"] == "string_unicode":
            return "the body is not valid: a field's name holds half of a surrogate pair: send valid Unicode", None
        return f"the body must be a JSON object, not {describe_type(first.get('input'))}", None
    name, param = field_name(location), field_name(_without_positions(location))
    if first["type"] == "missing":
        return f"{name} is missing: it is required", param
    return f"{name}={shorten(first.get('input'))} is not valid: {first['msg']}", param


def _without_positions(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Where within a list of numbers is for the message; which message it was is part of the name."""
    if location[0] == "messages":
        return location
    return tuple(itertools.takewhile(lambda part: isinstance(part, str), location))


def field_name(location: Sequence[str | int]) -> str:
    """``("messages", 0, "role")`` as ``messages[0].role``."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return ascii(name)[1:-1]


def shorten(value: object) -> str:
    """A value as one would write it in JSON, cut to a readable length, in ASCII."""
    literals = {True: "true", False: "false", None: "null"}
    text = literals[value] if value is None or isinstance(value, bool) else ascii(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def describe_type(value: object) -> str:
    """What JSON calls a value's type, with its article."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), "something else")
