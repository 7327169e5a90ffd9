"""With which attention a replica's steps are captured, on a GPU that has stand-ins of the back ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.kernels import attention_backends
from peft_dist.kernels.attention_torch import TorchAttention
from peft_dist.runner.graph_setup import are_captured, choose_attention

CUDA = torch.device("cuda", 0)


def stand_in(name: str, graph_capturable: bool) -> TorchAttention:
    found: Any = TorchAttention()
    found.name, found.graph_capturable = name, graph_capturable
    return found  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {
        "vllm-flash-attn": "it is not installed",
        "flashinfer": stand_in("flashinfer", False),
        "triton": stand_in("triton", True),
        "torch": stand_in("torch", False),
    }
    monkeypatch.setattr(attention_backends, "load", lambda name, device: found[name])


@pytest.mark.parametrize(
    ("options", "expected", "captured"),
    [
        ({}, "triton", True),
        ({"enforce_eager": True}, "flashinfer", False),
        ({"attention_backend": "flashinfer"}, "flashinfer", False),
    ],
)
def test_auto_takes_what_lets_steps_be_captured(options: dict[str, Any], expected: str, captured: bool) -> None:
    config = EngineConfig("m", device="cuda", **options)
    name = choose_attention(config, CUDA, torch.bfloat16, [(8, 128)])
    assert name == expected
    assert are_captured(config, CUDA, name) == captured


def test_one_that_cannot_run_is_an_error_of_the_configuration() -> None:
    config = EngineConfig("m", device="cuda", attention_backend="vllm-flash-attn")
    with pytest.raises(ConfigError, match=r"attention_backend='vllm-flash-attn': .*it is not installed"):
        choose_attention(config, CUDA, torch.bfloat16, [(8, 128)])
