"""Which attention back end is chosen, and where layers go that it does not take."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import get_args

import pytest
import torch

from peft_dist.core.config import AttentionName
from peft_dist.kernels import attention, attention_backends, reference
from peft_dist.kernels.attention_interface import AttentionNeeds, BackendUnavailableError
from peft_dist.kernels.attention_torch import TorchAttention
from tests.kernels.cases import assert_close, cache_of, fill_context, metadata

CPU = torch.device("cpu")
NEEDS = AttentionNeeds(CPU, torch.float32, torch.float32, 4, 2, 8, 8, 4)


class Picky(TorchAttention):
    """Runs in torch, and takes no layer with a window."""

    name = "picky"
    description = "picky 1.0"

    def supports(self, needs: AttentionNeeds) -> str | None:
        return "windows" if needs.window else "heads of 7" if needs.head_dim == 7 else None


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What ``load`` returns by name, torch aside; order: picky, triton, torch."""
    back_ends: dict[str, object] = {"picky": Picky(), "triton": "no driver"}
    load = attention_backends.load
    monkeypatch.setattr(
        attention_backends, "load", lambda name, device: back_ends[name] if name in back_ends else load(name, device)
    )
    monkeypatch.setattr(attention_backends, "ORDER", {"cpu": ("picky", "triton", "torch")})
    attention_backends.forget()
    yield back_ends
    attention_backends.forget()


def test_the_best_that_takes_a_layer_is_chosen_and_logged(
    found: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert attention_backends.choose("cpu", torch.float32, [(2, 8), (2, 7)], 16) == "picky"
    assert caplog.messages == ["attention for torch.float32 on cpu: picky 1.0"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert attention_backends.choose("cpu", torch.float32, [(2, 7)], 16) == "torch"
    passed, chosen = caplog.messages
    assert passed.endswith("picky: heads of 7; triton: no driver") and chosen.endswith(": torch")


def test_one_can_be_forced_and_what_cannot_run_says_why(found: dict[str, object]) -> None:
    assert attention_backends.choose("cpu", torch.float32, [(2, 8)], 16, "torch") == "torch"
    with pytest.raises(
        BackendUnavailableError, match=r"'triton' cannot run on cpu.*: no driver\. Remedy: install triton"
    ):
        attention_backends.choose("cpu", torch.float32, [(2, 8)], 16, "triton")
    with pytest.raises(BackendUnavailableError, match=r"heads of 7\. Remedy"):
        attention_backends.choose("cpu", torch.float32, [(2, 7)], 16, "picky")
    with pytest.raises(BackendUnavailableError, match="compile_kernels=False"):
        attention_backends.choose("cpu", torch.float32, [(2, 8)], 16, "c", compile_kernels=False)
    with pytest.raises(
        BackendUnavailableError, match=r"compute capability.*Remedy: install vllm or the kernels package"
    ):
        attention_backends.choose("cpu", torch.float32, [(2, 8)], 16, "vllm-flash-attn")


def test_where_steps_are_captured_what_graphs_can_hold_comes_first(
    found: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """As with FlashInfer installed and no FlashAttention: planned on the host, it would have every step launched by
    Python, kernel by kernel."""
    in_graphs = Picky()
    in_graphs.name, in_graphs.description, in_graphs.graph_capturable = "triton", "triton 3.0", True
    found["triton"] = in_graphs
    assert attention_backends.choose("cpu", torch.float32, [(2, 8)], 16) == "picky", "no steps are captured"
    with caplog.at_level(logging.INFO):
        assert attention_backends.choose("cpu", torch.float32, [(2, 8)], 16, captured=True) == "triton"
    passed, chosen = caplog.messages
    assert passed.endswith("passed over: picky: CUDA graphs cannot hold it") and chosen.endswith(": triton 3.0")
    # Named, it is taken as named.
    assert attention_backends.choose("cpu", torch.float32, [(2, 8)], 16, "picky", captured=True) == "picky"
    # Where nothing can be captured, the best of the others.
    assert attention_backends.choose("cpu", torch.float32, [(2, 7)], 16, captured=True) == "torch"
    found["triton"] = "no driver"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert attention_backends.choose("cpu", torch.float32, [(2, 8)], 16, captured=True) == "picky"
    assert caplog.messages[0].endswith("passed over: triton: no driver")


def test_without_a_compiler_torch_is_chosen() -> None:
    assert attention_backends.choose("cpu", torch.float32, [(2, 8)], 16, compile_kernels=False) == "torch"


def test_a_layer_falls_back_and_that_is_said_once(
    found: dict[str, object], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_backends, "_FALLBACK", {"cpu": ("triton", "torch")})
    with caplog.at_level(logging.INFO):
        assert attention_backends.resolve("picky", NEEDS).name == "picky"
        for block_size in (4, 8, 4):
            needs = NEEDS._replace(window=True, block_size=block_size)
            assert attention_backends.resolve("picky", needs).name == "torch"
    assert caplog.messages == ["attention back end picky does not take some layers (windows): torch runs them"]


def test_layers_of_one_model_may_run_in_different_back_ends(found: dict[str, object]) -> None:
    meta, num_blocks = metadata([(3, 9), (1, 5)], 4)
    meta.backend = "picky"
    cache = cache_of(num_blocks, 4, (2, 8), torch.float32)
    fill_context(cache, meta, torch.Generator().manual_seed(0))
    query = torch.randn(4, 4, 8)
    for window in (None, 2):
        got = attention.paged_attention(query, cache, meta, scale=0.4, sliding_window=window)
        assert_close(got, reference.paged_attention(query, cache, meta, scale=0.4, sliding_window=window))


def test_the_configuration_knows_every_name() -> None:
    assert set(get_args(AttentionName)) == {"auto", *attention_backends.NAMES}
    assert {name for names in attention_backends.ORDER.values() for name in names} == set(attention_backends.NAMES)
    with pytest.raises(ValueError, match="unknown attention back end 'xformers'"):
        attention_backends.load("xformers", CPU)
