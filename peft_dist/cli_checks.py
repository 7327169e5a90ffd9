"""What ``peft-dist serve`` can know to be wrong before it loads a model, which may take minutes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from peft_dist.core.errors import ConfigError


def check_port_file(file: Path | None) -> None:
    """Raises ConfigError where the port could not be written once the server answers."""
    if file is not None and not file.parent.is_dir():
        raise ConfigError(f"--port-file {file} cannot be written: there is no folder {file.parent}, make it first")


def check_names(adapters: Sequence[tuple[str, str]]) -> None:
    """Raises ConfigError where two of the (name, path) have one name: the first would not be served."""
    names = [name for name, _ in adapters]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--adapter names {name!r} twice: give every adapter a name of its own")


def check_adapters(adapters: Iterable[tuple[str, str]]) -> None:
    """Raises AdapterError where a path is neither a folder of this host nor written like a hub id.

    Args:
        adapters: (name, path) of each.
    """
    from peft_dist.runner.adapter_source import check_exists

    for _, path in adapters:
        check_exists(path)
