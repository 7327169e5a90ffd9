"""Wrong options name themselves, their value and what to give instead, before anything is loaded."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError

NAMES = [field.name for field in fields(EngineConfig)]
COUNTS = ("max_model_len", "block_size", "num_blocks", "kv_cache_bytes", "max_num_seqs", "max_num_batched_tokens")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [object(), b"8", [8], 1j])
def test_every_option_checks_its_type(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=.* cannot be used: give "):
        EngineConfig(**{"model": "m", name: value})


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        *((name, value, "an int of at least 1") for name in COUNTS for value in (0, -1, 2.0, True, "8")),
        ("max_loras", 0, "an int of at least 1"),
        ("num_threads", 0, "an int of at least 1 or None"),
        ("num_host_blocks", -1, "an int of at least 0"),
        ("num_host_blocks", None, "an int of at least 0"),
        ("depth", -1, "an int of at least 0 or None"),
        ("gpu_memory_utilization", 0, "above 0 and up to 1"),
        ("gpu_memory_utilization", 1.01, "above 0 and up to 1"),
        ("gpu_memory_utilization", float("nan"), "above 0 and up to 1"),
        ("gpu_memory_utilization", True, "above 0 and up to 1"),
        ("preemption", "drop", "one of auto, recompute, swap"),
        ("preemption", None, "one of auto, recompute, swap"),
        ("device", 5, "str"),
        ("dtype", 16, "str"),
        ("seed", "0", "int or None"),
        ("enable_prefix_caching", 1, "bool"),
        ("pack_weights", "yes", "bool or None"),
        ("trust_remote_code", "false", "bool"),
        ("model", "", "a folder or hub id"),
        ("model", None, "a folder or hub id"),
    ],
)
def test_wrong_values(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{"model": "m", name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r} ")
    assert remedy in message


def test_right_values() -> None:
    lowest = dict.fromkeys((*COUNTS, "max_loras", "num_threads"), 1)
    EngineConfig(model="m", **lowest, num_host_blocks=0, depth=0, gpu_memory_utilization=1, seed=-3, pack_weights=True)
    EngineConfig(model="m", preemption="swap", num_host_blocks=1)
    with pytest.raises(ConfigError, match="num_host_blocks"):
        EngineConfig(model="m", preemption="swap")
