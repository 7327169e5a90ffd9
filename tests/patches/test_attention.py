"""Paged attention behind Hugging Face's interface: it answers rightly or says why it cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from peft_dist.forward_context import ForwardContext
from peft_dist.patches.attention import ATTENTION_NAME, paged_attention_forward, register
from peft_dist.patches.paged_cache import PagedRows


class Layer(torch.nn.Module):
    layer_idx = 0


def run(context: ForwardContext | None, states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    arguments = {"attention_mask": None, "scaling": 0.5, **kwargs}
    if context is None:
        return paged_attention_forward(Layer(), *states, **arguments)[0]
    with context:
        return paged_attention_forward(Layer(), *states, **arguments)[0]


def make(tokens: np.ndarray) -> tuple[ForwardContext, torch.Tensor]:
    """A context over ``tokens`` (bool ``[B, S]``) and query, key, value ``[3, B, H, S, D]``."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, len(tokens), 2, tokens.shape[1], 4, generator=generator)
    rows = PagedRows(len(tokens), torch.device("cpu"))
    meta, token_rows = rows.begin(tokens)
    rows.memory.ensure_layer(0, states[1])
    return ForwardContext(attention=meta, kv_caches=rows.caches, token_rows=token_rows), states


@pytest.mark.parametrize("window", [None, 3])
def test_padded_batch_is_masked_attention(window: int | None) -> None:
    tokens = np.arange(7)[None] >= np.array([[0], [3], [6]])
    context, states = make(tokens)
    actual = run(context, states, sliding_window=window)
    distance = torch.arange(7)[:, None] - torch.arange(7)[None]
    seen = (distance >= 0) & (distance < (window or 99)) & torch.from_numpy(tokens)[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=seen, scale=0.5).transpose(1, 2)
    mask = torch.from_numpy(tokens)
    assert torch.allclose(actual[mask], expected[mask], atol=1e-5)
    assert (actual[~mask] == 0).all()


def test_registering_twice_is_once_and_builds_no_mask() -> None:
    register()
    before = dict(AttentionInterface._global_mapping)
    register()
    assert AttentionInterface._global_mapping == before
    assert AttentionInterface()[ATTENTION_NAME] is paged_attention_forward
    assert ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_bias", torch.zeros(1)),
        ("attention_mask", torch.zeros(1, 1, 2, 2)),
        ("dropout", 0.1),
        ("is_causal", False),
        ("cu_seq_lens_q", torch.zeros(2)),
        ("output_attentions", True),
        ("invented", 1),
    ],
)
def test_argument_that_would_change_the_result_is_refused(name: str, value: Any) -> None:
    context, states = make(np.ones((1, 2), bool))
    with pytest.raises(NotImplementedError, match=rf"{name}.*Layer.*layer 0"):
        run(context, states, **{name: value})


def test_arguments_without_effect_are_accepted() -> None:
    context, states = make(np.ones((1, 2), bool))
    harmless = {"position_ids": torch.zeros(1, 2), "use_cache": True, "output_attentions": False, "invented": None}
    assert torch.equal(run(context, states, **harmless), run(make(np.ones((1, 2), bool))[0], states))


@pytest.mark.parametrize("context", [None, ForwardContext()])
def test_call_outside_of_a_context_is_refused(context: ForwardContext | None) -> None:
    _, states = make(np.ones((1, 2), bool))
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        run(context, states)
