"""A real replica that cannot open the memory of others, as on a host of its own. Imported by worker processes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from peft_dist.core.config import EngineConfig
from peft_dist.runner.shared_memory import MemoryGoneError


def build(config: EngineConfig) -> Any:
    from peft_dist.runner.replica import build_replica

    for module in ("peft_dist.worker.kv_server", "peft_dist.runner.kv_transfers"):
        mock.patch(f"{module}.open_memory", _no_such_process).start()
    return build_replica(config)


def _no_such_process(pid: int, descriptor: int, token: str, num_bytes: int) -> torch.Tensor:
    raise MemoryGoneError("another host's")
