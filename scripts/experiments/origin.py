"""What a picture and a table say of where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments import served

# What a load is unless it is asked for otherwise; files of earlier runs do not tell it.
USUAL: Mapping[str, Any] = {"correlated": False, "rate_factor": 1.0, "max_total": None}
_WORDS = {"rate_factor": "rate factor {:g}", "max_total": "at most {} tokens"}


def unusual(about: Mapping[str, Any]) -> list[str]:
    """What of a load is not as the experiment has it, in words: such figures are not beside the paper's."""
    given = {name: about.get(name, usual) for name, usual in USUAL.items()}
    return [_WORDS.get(name, name).format(value) for name, value in given.items() if value != USUAL[name]]


def server(about: Mapping[str, Any]) -> list[str]:
    """Model and device of what is live."""
    return [f"{name} {value}" for name, value in served.words(about).items()]
