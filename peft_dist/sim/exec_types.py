"""Execution types by name."""

from __future__ import annotations

from collections.abc import Mapping

from peft_dist.core.errors import ConfigError
from peft_dist.sim.baselines import BASELINES
from peft_dist.sim.hardware import ExecType, dlora

EXEC_TYPES: Mapping[str, ExecType] = {"dlora": ExecType(dlora), **BASELINES}


def find(name: str) -> ExecType:
    """Raises ConfigError for an unknown one."""
    if name not in EXEC_TYPES:
        raise ConfigError(f"exec_type={name!r} is unknown to the simulator: use {', '.join(EXEC_TYPES)}")
    return EXEC_TYPES[name]
