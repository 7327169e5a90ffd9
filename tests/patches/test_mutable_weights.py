"""Whatever changes an adapter in place between two calls is seen by the next call."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

import peft_dist
from tests.patches import oracle


def first_layer(model: PeftModel, name: str = "v_proj") -> Any:
    return next(m for n, m in model.named_modules() if n.endswith(f"layers.1.self_attn.{name}"))


def optimiser_step(model: PeftModel, adapters: dict[str, Path]) -> None:
    model.set_adapter("narrow")
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert parameters
    optimiser = torch.optim.SGD(parameters, lr=0.5)
    inputs = oracle.inputs(padded=False)
    with torch.enable_grad():
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimiser.step()


def hotswap(model: PeftModel, adapters: dict[str, Path]) -> None:
    # PEFT compares the replacement with the active adapter, and hotswaps no embeddings.
    model.set_adapter("late")
    folder = adapters["late"].parent / "late-swapped"
    folder.mkdir(exist_ok=True)
    tensors = load_file(adapters["late"] / "adapter_model.safetensors")
    save_file({key: value * 1.7 for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((adapters["late"] / "adapter_config.json").read_text())
    hotswap_adapter(model, str(folder), adapter_name="late", torch_device="cpu")


def set_scale(model: PeftModel, adapters: dict[str, Path]) -> None:
    first_layer(model).set_scale("wide", 3.0)


def assign_scaling(model: PeftModel, adapters: dict[str, Path]) -> None:
    first_layer(model).scaling["wide"] = 0.0


def load_state_dict(model: PeftModel, adapters: dict[str, Path]) -> None:
    state = {key: value * 0.5 for key, value in model.state_dict().items() if "lora_" in key}
    model.load_state_dict(state, strict=False)


def set_peft_state(model: PeftModel, adapters: dict[str, Path]) -> None:
    tensors = load_file(adapters["wide"] / "adapter_model.safetensors")
    set_peft_model_state_dict(model, {k: v * 0.3 for k, v in tensors.items()}, adapter_name="wide")


def write_data_in_place(model: PeftModel, adapters: dict[str, Path]) -> None:
    weight = first_layer(model).lora_B["wide"].weight
    before = (weight._version, weight.data_ptr())
    weight.data.mul_(-2.0)
    assert (weight._version, weight.data_ptr()) == before, "this write is meant to leave no trace"


def rebind_data(model: PeftModel, adapters: dict[str, Path]) -> None:
    weight = first_layer(model).lora_A["wide"].weight
    weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


def write_embedding(model: PeftModel, adapters: dict[str, Path]) -> None:
    layer = model.get_base_model().get_input_embeddings()
    layer.lora_embedding_A["wide"].data.add_(0.2)


def replace_parameter(model: PeftModel, adapters: dict[str, Path]) -> None:
    weight = first_layer(model).lora_B["wide"].weight
    first_layer(model).lora_B["wide"].weight = torch.nn.Parameter(weight.detach() * 2.5)


def change_base(model: PeftModel, adapters: dict[str, Path]) -> None:
    first_layer(model).get_base_layer().weight.data.mul_(0.5)


def delete_and_readd(model: PeftModel, adapters: dict[str, Path]) -> None:
    model.set_adapter("late")
    model.delete_adapter("wide")
    model.load_adapter(adapters["spare"], adapter_name="wide")
    model.eval()


CHANGES: list[Callable[[PeftModel, dict[str, Path]], None]] = [
    optimiser_step,
    hotswap,
    set_scale,
    assign_scaling,
    load_state_dict,
    set_peft_state,
    write_data_in_place,
    rebind_data,
    write_embedding,
    replace_parameter,
    change_base,
    delete_and_readd,
]


def answers(model: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = oracle.inputs(padded=False)
    with torch.no_grad():
        logits = model(**inputs, adapter_names=oracle.NAMES).logits
    return logits, model.generate(**inputs, adapter_names=oracle.NAMES, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_between_calls_is_seen(
    change: Callable[[PeftModel, dict[str, Path]], None],
    make: Callable[..., PeftModel],
    adapters: dict[str, dict[str, Path]],
) -> None:
    ours, theirs = peft_dist.patch(make()), make()
    before, _ = answers(ours)
    for model in (ours, theirs):
        change(model, adapters["llama"])
    (logits, tokens), (expected_logits, expected_tokens) = answers(ours), answers(theirs)
    assert not torch.allclose(logits, before, atol=1e-3), "the change changed nothing"
    oracle.assert_logits_close(logits, expected_logits)
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_of_the_whole_model_is_seen(dtype: torch.dtype, make: Callable[..., PeftModel]) -> None:
    ours, theirs = peft_dist.patch(make()), make()
    answers(ours)
    inputs = oracle.inputs(padded=False)
    with torch.no_grad():
        actual, expected = (model.to(dtype)(**inputs, adapter_names=oracle.NAMES).logits for model in (ours, theirs))
    assert actual.dtype == expected.dtype == dtype
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-12}[dtype]


def test_bfloat16_base_with_float32_adapters(make: Callable[..., PeftModel]) -> None:
    ours, theirs = peft_dist.patch(make()), make()
    inputs = oracle.inputs(padded=False)
    logits = []
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
        with torch.no_grad():
            logits.append(model(**inputs, adapter_names=oracle.NAMES).logits.float())
    error = (logits[0] - logits[1]).abs().max() / logits[1].abs().max()
    assert math.isfinite(error) and error < 0.05
