"""``load_format="dummy"``: a folder with config.json alone becomes a model with random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peft_dist import LLM, SamplingParams
from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.runner.loader import load_model, resolve_device
from peft_dist.runner.rank_group import RankGroup
from tests.tiny_models import FAMILIES, make_model, random_adapter

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


def make_folder(family: str, folder: Path) -> Path:
    """Only the configuration of a family's model."""
    make_model(family, folder).config.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return folder


def load(folder: Path, device: str = "cpu", **options: object) -> PreTrainedModel:
    config = EngineConfig(str(folder), device=device, load_format="dummy", **options)
    return load_model(config, resolve_device(device))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.float().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt_oss"])
def test_weights_are_drawn_in_place(family: str, device: str, tmp_path: Path) -> None:
    model = load(make_folder(family, tmp_path), device, dtype="bfloat16")
    assert {(p.dtype, p.device.type, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, device, False)}
    assert {b.device.type for b in model.buffers()} == {device} and not model.training
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    drawn = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    spread = torch.cat([weight.float().flatten() for weight in drawn]).std()
    assert spread.item() == pytest.approx(0.02, rel=0.05)
    assert not any(torch.equal(one, other) for one, other in zip(drawn, drawn[7:], strict=False))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_buffers_are_those_of_a_model_that_was_made_at_once(family: str, tmp_path: Path) -> None:
    model = load(make_folder(family, tmp_path))
    usual = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    found, expected = dict(model.named_buffers()), dict(usual.named_buffers())
    assert found.keys() == expected.keys() and model.state_dict().keys() == usual.state_dict().keys()
    assert all(torch.equal(found[name], buffer) for name, buffer in expected.items())
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, usual)]
    assert tied[0] == tied[1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_parts_of_what_one_process_has(family: str, size: int, tmp_path: Path) -> None:
    whole = load(make_folder(family, tmp_path))
    weights = dict(whole.named_parameters())
    config = EngineConfig(str(tmp_path), device="cpu", load_format="dummy")
    covered = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for rank in range(size):
        group = RankGroup(rank, size)
        model = load_model(config, torch.device("cpu"), group.shard)
        assert any(part.numel() < weights[name].numel() for name, part in model.named_parameters())
        for name, part in model.named_parameters():
            path, _, kind = name.rpartition(".")
            turned = isinstance(model.get_submodule(path), nn.Embedding)
            of = (
                partial(group.parts[path].of_weight, turned=turned)
                if path in group.parts and kind == "weight"
                else None
            )
            if of is None and part.shape != weights[name].shape:
                continue  # A bias; all of them are 0.
            here, seen = (weights[name], covered[name]) if of is None else (of(weights[name]), of(covered[name]))
            assert torch.equal(part, here)
            seen.fill_(True)
    assert all(seen.all() for name, seen in covered.items() if name.endswith(".weight"))


def test_norms_are_neutral(tmp_path: Path) -> None:
    model = load(make_folder("llama", tmp_path))
    norms = [module.weight for name, module in model.named_modules() if name.endswith("norm")]
    assert len(norms) == 7 and all((weight == 1).all() for weight in norms)


@pytest.mark.parametrize("device", DEVICES)
def test_the_seed_decides_and_disturbs_nobody(device: str, tmp_path: Path) -> None:
    make_folder("llama", tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3, device=device)
    torch.manual_seed(5)
    none, zero, one = (weights(load(tmp_path, device, seed=seed)) for seed in (None, 0, 1))
    assert torch.equal(torch.rand(3, device=device), expected)
    assert torch.equal(none, zero) and not torch.equal(zero, one)


def test_it_generates_with_adapters(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "whole")
    folder = make_folder("llama", tmp_path / "base")
    adapter = random_adapter(model, tmp_path / "adapter")
    greedy = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with LLM(folder, {"a": adapter}, device="cpu", load_format="dummy", num_blocks=16) as llm:
        base, adapted = llm.generate([[3, 4, 5]] * 2, greedy, [None, "a"], use_tqdm=False)
        loaded = {name: tensor.clone() for name, tensor in llm._open.runner.model.state_dict().items()}
    assert len(base.outputs[0].token_ids) == 6 and base.outputs[0].token_ids != adapted.outputs[0].token_ids
    stored = load_file(tmp_path / "whole/model.safetensors")
    assert not torch.equal(loaded["model.layers.0.mlp.up_proj.weight"], stored["model.layers.0.mlp.up_proj.weight"])


def test_a_checkpoint_is_needed_otherwise(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load the base model"):
        load_model(EngineConfig(str(make_folder("llama", tmp_path)), device="cpu"), torch.device("cpu"))
    with pytest.raises(ConfigError, match="load_format='random' cannot be used: give one of auto, dummy"):
        EngineConfig(str(tmp_path), load_format="random")  # type: ignore[arg-type]
