"""From a command's options to what is configured by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def of(kind: type[Any], given: Mapping[str, Any], **more: Any) -> Any:
    """A configuration dataclass from the options of a command that are called as its fields are; ``more`` overrides.

    Args:
        given: All options by name, such as ``locals()`` at the command's beginning.
    """
    own = {field.name for field in fields(kind)}
    return kind(**{**{name: value for name, value in given.items() if name in own}, **more})
