"""From a command's options to what is configured by them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from dataclasses import fields
from typing import Any

from peft_dist.core.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")


def of(kind: type[Any], given: Mapping[str, Any], **more: Any) -> Any:
    """A configuration dataclass from the options of a command that are called as its fields are; ``more`` overrides.

    Args:
        given: All options by name, such as ``locals()`` at the command's beginning.
    """
    own = {field.name for field in fields(kind)}
    return kind(**{**{name: value for name, value in given.items() if name in own}, **more})


def of_text(kind: type[Any], option: str, text: str) -> Any:
    """A configuration dataclass of numbers from ``name=value,name=value``; what is not named is as usual.

    Raises:
        ConfigError: a name is unknown, or a value is no number or not one of these.
    """
    known = {field.name: field.default for field in fields(kind) if not isinstance(field.default, bool)}
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name in found:
            raise ConfigError(f"{option} says twice what {name} is: leave one out")
        if name not in known:
            raise ConfigError(f"{option} {part!r}: there is no {name!r}, but {', '.join(known)}")
        try:
            found[name] = float(value)
        except ValueError:
            raise ConfigError(f"{option} {part!r}: write {name}={known[name]:g}, say") from None
    return kind(**found)


def one_of(option: str, value: str, choices: tuple[str, ...]) -> Any:
    """The value. Raises ConfigError where it is none of these."""
    if value not in choices:
        raise ConfigError(f"--{option} {value!r} is unknown: use one of {', '.join(choices)}")
    return value


def json_object(option: str, text: str) -> dict[str, Any]:
    """The value of an option that is a JSON object. Raises ConfigError."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is no JSON: {error}. Give an object, {{}} for nothing") from error
    if not isinstance(value, dict):
        raise ConfigError(f'{option} {text!r} is no JSON object, such as {{"name": "value"}}')
    return value


def run(work: Coroutine[Any, Any, None]) -> None:
    """Until its end, on uvloop where that is installed."""
    try:
        import uvloop
    except ModuleNotFoundError:
        asyncio.run(work)
    else:
        uvloop.run(work)
