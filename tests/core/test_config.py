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
        ("fuse", None, "bool"),
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


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"exec_type": "vllm", "merge": "shadow"}, ("merge='shadow'", "exec_type='vllm'")),
        ({"exec_type": "vllm", "merge": "host"}, ("merge='host'", "exec_type='vllm'")),
        ({"exec_type": "vllm", "merge": "off"}, ("merge='off'", "exec_type='vllm'")),
        ({"exec_type": "peft", "merge": "off"}, ("merge='off'", "exec_type='peft'")),
        ({"policy": "merge", "merge": "off"}, ("merge='off'", "policy='merge'")),
        ({"exec_type": "peft", "policy": "credit"}, ("exec_type='peft'", "policy='credit'")),
        ({"resident_models": 3}, ("resident_models=3", "exec_type='dlora'")),
        ({"merged_minority": True, "policy": "fcfs"}, ("merged_minority=True", "policy='fcfs'")),
        ({"merged_minority": True, "policy": "merge"}, ("merged_minority=True", "policy='merge'")),
        ({"merged_minority": True, "exec_type": "peft"}, ("merged_minority=True", "exec_type='peft'")),
        ({"merged_minority": True, "merge": "off"}, ("merged_minority=True", "merge='off'")),
        (
            {"merged_minority": True, "policy_profile": "artifact"},
            ("merged_minority=True", "policy_profile='artifact'"),
        ),
        (
            {"max_adapter_wait": 2.0, "policy_profile": "artifact"},
            ("max_adapter_wait=2.0", "policy_profile='artifact'"),
        ),
    ],
)
def test_options_that_exclude_one_another_are_both_named(options: dict[str, Any], named: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="m", **options)
    assert all(name in str(caught.value) for name in named), caught.value


def test_options_that_go_together() -> None:
    for options in (
        {"exec_type": "vllm", "resident_models": 3},
        {"exec_type": "peft", "merge": "host", "policy": "merge"},
        {"merged_minority": True},
        {"merged_minority": True, "policy": "credit", "merge": "shadow", "max_adapter_wait": 1.0},
        {"policy_profile": "artifact", "max_adapter_wait": float("inf")},
        {"policy_profile": "artifact", "policy": "fcfs", "merge": "off"},
    ):
        EngineConfig(model="m", **options)  # type: ignore[arg-type]


def test_right_values() -> None:
    lowest = dict.fromkeys((*COUNTS, "max_loras", "num_threads"), 1)
    EngineConfig(model="m", **lowest, num_host_blocks=0, depth=0, gpu_memory_utilization=1, seed=-3, pack_weights=True)
    EngineConfig(model="m", preemption="swap", num_host_blocks=1)
    with pytest.raises(ConfigError, match="num_host_blocks"):
        EngineConfig(model="m", preemption="swap")
