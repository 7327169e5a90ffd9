"""Every family: a mixed batch gives each row what PEFT gives it with its adapter set alone."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch as replace

import pytest
import torch
from peft import PeftModel

import peft_dist
from peft_dist.patches import attention
from tests.patches import oracle
from tests.tiny_models import FAMILIES

NEW_TOKENS = 10


def _alone(model: PeftModel, inputs: dict[str, torch.Tensor], **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    for row, name in enumerate(oracle.NAMES):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        outputs.append(oracle.alone(model, name, lambda one=one: model.generate(**one, **options)))
    return torch.cat([o.sequences for o in outputs]), torch.cat([torch.stack(o.logits, 1) for o in outputs])


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_each_row_what_its_adapter_gives_alone(family: str, make: Callable[..., PeftModel]) -> None:
    model, inputs = make(family), oracle.inputs()
    options = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    sequences, logits = _alone(model, inputs, **options)
    peft_dist.patch(model)
    with replace.object(attention.kernels, "paged_attention", wraps=attention.kernels.paged_attention) as paged:
        mixed = model.generate(**inputs, adapter_names=oracle.NAMES, **options)
    assert torch.equal(mixed.sequences, sequences)
    oracle.assert_logits_close(torch.stack(mixed.logits, 1), logits)
    layers = model.config.num_hidden_layers
    assert paged.call_count == NEW_TOKENS * layers, "attention did not run on paged blocks"


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_gives_each_row_what_its_adapter_gives_alone(family: str, make: Callable[..., PeftModel]) -> None:
    model, inputs = make(family), oracle.inputs(padded=False)
    rows = [
        oracle.alone(model, name, lambda row=row: model(inputs["input_ids"][row : row + 1]).logits)
        for row, name in enumerate(oracle.NAMES)
    ]
    peft_dist.patch(model)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=oracle.NAMES).logits
        last = model(**inputs, adapter_names=oracle.NAMES, logits_to_keep=2).logits
    oracle.assert_logits_close(mixed, torch.cat(rows))
    oracle.assert_logits_close(last, torch.cat(rows)[:, -2:])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "opt"])
def test_forward_on_padded_rows_is_that_of_adapter_names_in_peft(family: str, make: Callable[..., PeftModel]) -> None:
    """All positions, padded ones too. (PEFT itself cannot mix adapters in OPT, whose layers flatten the batch.)"""
    model, inputs = make(family), oracle.inputs()
    with torch.no_grad():
        expected = model(**inputs, adapter_names=oracle.NAMES).logits
        peft_dist.patch(model)
        oracle.assert_logits_close(model(**inputs, adapter_names=oracle.NAMES).logits, expected)
