"""What ``peft-dist serve`` can know to be wrong before it loads a model, which may take minutes."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError

logger = logging.getLogger("peft_dist.serve")
# Nobody has more connections, and some programs close every number up to the limit, one by one.
_MOST_FILES = 1 << 16
# Sockets of replicas, libraries, connections that ask for nothing.
_OTHER_FILES = 256


def check_port_file(file: Path | None) -> None:
    """Raises ConfigError where the port could not be written once the server answers."""
    if file is not None and not file.parent.is_dir():
        raise ConfigError(f"--port-file {file} cannot be written: there is no folder {file.parent}, make it first")


def check_decision_log(file: str | None) -> None:
    """Raises ConfigError where no replica could write it."""
    if file is not None and not Path(file).parent.is_dir():
        folder = Path(file).parent
        raise ConfigError(f"--decision-log {file} cannot be written: there is no folder {folder}, make it first")


def check_names(adapters: Sequence[tuple[str, str]], bases: Sequence[str]) -> None:
    """Raises ConfigError where two of the (name, path) have one name, or one has one of the base's: the first would
    not be served."""
    names = [name for name, _ in adapters]
    for name in names:
        if name in bases:
            raise ConfigError(f"--adapter names {name!r}, which is the base model's name: give the adapter another one")
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


def check_gpus(num_replicas: int, engine: EngineConfig) -> None:
    """Raises ConfigError where replicas share GPUs of this host, each with more of their memory than its part."""
    from peft_dist.worker.launcher import visible_gpus

    if engine.device not in ("auto", "cuda") or engine.num_blocks is not None:
        return
    if engine.device == "auto" and version("torch").endswith("+cpu"):
        return
    num_gpus = len(visible_gpus())
    places = num_gpus // engine.tensor_parallel_size
    sharers = -(-num_replicas // places) if places else 0
    if sharers > 1 and sharers * engine.gpu_memory_utilization > 1:
        raise ConfigError(
            f"--replicas {num_replicas} of {engine.tensor_parallel_size} GPU(s) each are {sharers} on one GPU of the "
            f"{num_gpus} here, where each takes {engine.gpu_memory_utilization:g} of its memory: lower "
            f"--replicas to {places}, or --gpu-memory-utilization to at most {100 // sharers / 100:.2f}"
        )


def raise_file_limit() -> int:
    """Files that this process may have open from now on. Every connection is one; the usual 1,024 is only a default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _MOST_FILES if soft == resource.RLIM_INFINITY else soft


def check_file_limit(num_requests: int) -> None:
    """Say so where fewer clients can be connected than requests may be unfinished: others would get no answer."""
    limit = raise_file_limit()
    if limit < num_requests + _OTHER_FILES:
        logger.warning(
            "%d files may be open, and each of up to %d requests is a connection: whoever comes when all are in use "
            "waits instead of being told that the queue is full. Raise the limit (ulimit -Hn), or lower --max-queue",
            limit,
            num_requests,
        )
