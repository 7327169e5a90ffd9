"""Options that are refused, and sizes in words."""

from __future__ import annotations

import pytest

from peft_dist.core.config import EngineConfig, parse_bytes
from peft_dist.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("77", 77),
        ("512MiB", 512 << 20),
        ("1.5 gib", 3 << 29),
        ("2GB", 2 * 10**9),
        ("3kb", 3000),
        (" 1TiB ", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes("--x", text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "1XB", "1 2", "0x10", "1.GiB"])
def test_what_is_no_size_is_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--adapter-host-memory .*512MiB"):
        parse_bytes("--adapter-host-memory", text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"adapter_device_memory": 0},
        {"adapter_host_memory": -1},
        {"adapter_load_timeout": 0.0},
        {"adapter_load_timeout": float("nan")},
        {"max_loras": 0},
    ],
)
def test_wrong_values_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineConfig("model", **wrong)  # type: ignore[arg-type]
