"""What a model's ``generation_config.json`` recommends for requests that say nothing of it themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_dist.core.errors import ConfigError, InvalidRequestError
from peft_dist.core.sampling_params import SamplingParams

FILE = "generation_config.json"
# Fields of SamplingParams that it may hold, under the same names.
_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def recommended(source: str, revision: str | None = None, *, only_local: bool = False) -> dict[str, Any]:
    """Sampling parameters by name; empty where there is no such file, or it says nothing of them.

    Args:
        source: Folder or hub id of the base model.
        only_local: Of a hub id look at what was downloaded with the model, and ask nobody.

    Raises:
        ConfigError: the file holds what no request could ask for, or there is no such model.
    """
    # Slow to import, and whoever has no tokenizer needs nothing else of it.
    from transformers.utils import cached_file

    try:
        path = cached_file(
            source,
            FILE,
            revision=revision,
            local_files_only=only_local,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise ConfigError(f"{FILE} of {source!r} cannot be looked for ({error}): correct the model's name") from error
    if path is None:
        return {}
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {name: told[name] for name in _NAMES if told.get(name) is not None}
        SamplingParams(**found)
    except (ValueError, AttributeError, InvalidRequestError) as error:
        problem = f"{path} cannot be followed ({error}): correct it, or leave it out"
        raise ConfigError(problem) from error
    return found


def in_words(parameters: dict[str, Any]) -> str:
    """For the log."""
    return ", ".join(f"{name} {value:g}" for name, value in parameters.items())
