"""Execution types by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from peft_dist.core.errors import ConfigError
from peft_dist.sim.baselines import BASELINES
from peft_dist.sim.hardware import ExecType, dlora
from peft_dist.sim.options import SimulationOptions

EXEC_TYPES: Mapping[str, ExecType] = {"dlora": ExecType(dlora), **BASELINES}


def effective(options: SimulationOptions) -> SimulationOptions:
    """What is run: of options that an execution type decides itself, what it decides.

    Raises ConfigError where one of these was given another value.
    """
    kind, usual = find(options.exec_type), SimulationOptions()
    for name, value in kind.decides.items():
        given = getattr(options, name)
        if given not in (getattr(usual, name), value):
            is_it = "has none" if value is None else f"takes {value!r}"
            raise ConfigError(
                f"{name}={given!r} is not used: exec_type={options.exec_type!r} {is_it}. Leave it out, or simulate "
                "another execution type"
            )
    return replace(options, **kind.decides)


def find(name: str) -> ExecType:
    """Raises ConfigError for an unknown one."""
    if name not in EXEC_TYPES:
        raise ConfigError(f"exec_type={name!r} is unknown to the simulator: use {', '.join(EXEC_TYPES)}")
    return EXEC_TYPES[name]
