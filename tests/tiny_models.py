"""Small random models of twelve families, and random adapters for them in PEFT's file format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

VOCAB_SIZE = 96
NUM_LAYERS = 3
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB_SIZE}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    **_SPECIAL,
}


def _build(model_class: type[PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    """A float32 model in eval mode whose logits are of order ten, so that greedy tokens are well separated."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def _llama() -> PreTrainedModel:
    config = LlamaConfig(num_key_value_heads=2, tie_word_embeddings=False, **_SIZES)
    return _build(LlamaForCausalLM, config, 1)


def _qwen2() -> PreTrainedModel:
    return _build(Qwen2ForCausalLM, Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **_SIZES), 2)


def _qwen3() -> PreTrainedModel:
    return _build(Qwen3ForCausalLM, Qwen3Config(num_key_value_heads=2, head_dim=16, **_SIZES), 3)


def _mistral() -> PreTrainedModel:
    return _build(MistralForCausalLM, MistralConfig(num_key_value_heads=2, sliding_window=6, **_SIZES), 4)


def _gemma2() -> PreTrainedModel:
    config = Gemma2Config(
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
        **_SIZES,
    )
    # Up to transformers 5.17, its "sdpa" leaves the soft-cap out; "eager" computes the model as it was trained.
    config._attn_implementation = "eager"
    return _build(Gemma2ForCausalLM, config, 5)


def _gemma3() -> PreTrainedModel:
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        layer_types=layer_types[:NUM_LAYERS],
        **_SIZES,
    )
    return _build(Gemma3ForCausalLM, config, 6)


def _phi3() -> PreTrainedModel:
    return _build(Phi3ForCausalLM, Phi3Config(num_key_value_heads=2, **_SIZES), 7)


def _opt() -> PreTrainedModel:
    config = OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=256,
        **_SPECIAL,
    )
    return _build(OPTForCausalLM, config, 8)


def _gpt2() -> PreTrainedModel:
    return _build(GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=NUM_LAYERS, n_head=4, n_positions=256, **_SPECIAL), 9)


def _gpt_neox() -> PreTrainedModel:
    return _build(GPTNeoXForCausalLM, GPTNeoXConfig(rotary_pct=0.5, **_SIZES), 10)


def _mixtral() -> PreTrainedModel:
    config = MixtralConfig(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **_SIZES)
    return _build(MixtralForCausalLM, config, 11)


def _gpt_oss() -> PreTrainedModel:
    config = GptOssConfig(
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=6,
        rope_scaling=None,
        **_SIZES,
    )
    return _build(GptOssForCausalLM, config, 12)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
}

_EMBEDDINGS = {"opt": ("embed_tokens",), "gpt2": ("wte",), "gpt_neox": ("embed_in",)}


def target_modules(family: str) -> list[str]:
    """Last path parts of every linear (the head is one) and of the token embedding of a family."""
    model = FAMILIES[family]()
    linears = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, _LINEAR)}
    return sorted(linears | set(_EMBEDDINGS.get(family, ("embed_tokens",))))


_LINEAR = (nn.Linear, Conv1D)


def make_model(family: str, folder: Path) -> PreTrainedModel:
    """Save the family's model (without a tokenizer) to ``folder`` and return it."""
    model = FAMILIES[family]()
    model.save_pretrained(folder)
    return model


def random_adapter(
    model: PreTrainedModel,
    path: str | Path,
    r: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: Sequence[int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    strength: float = 0.6,
) -> Path:
    """Write an adapter folder as PEFT saves it, with random non-zero A and B; return the folder.

    Args:
        targets: Last path parts of the modules to adapt.
        rank_pattern, alpha_pattern: As in ``LoraConfig`` (suffixes or regular expressions of module paths).
        strength: Standard deviation of the adapter's weights times the root of the rank.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not _is_target(name, module, targets, layers_to_transform):
            continue
        rank = _from_pattern(name, rank_pattern, r)
        for key, shape in _shapes(name, module, rank).items():
            std = strength / max(rank, shape[-1] if key.endswith("A.weight") else rank) ** 0.5
            tensors[key] = (torch.randn(*shape, generator=generator) * std).to(dtype)
    if not tensors:
        raise ValueError(f"none of {list(targets)} (layers {layers_to_transform}) is in {type(model).__name__}")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": isinstance(model, GPT2LMHeadModel),
        "target_modules": sorted(targets),
        "use_rslora": use_rslora,
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        "layers_to_transform": list(layers_to_transform) if layers_to_transform is not None else None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def _is_target(name: str, module: nn.Module, targets: Sequence[str], layers: Sequence[int] | None) -> bool:
    if not isinstance(module, (*_LINEAR, nn.Embedding)) or name.rsplit(".", 1)[-1] not in targets:
        return False
    if layers is None:
        return True
    number = re.search(r"\.(\d+)\.", name)
    return number is not None and int(number.group(1)) in layers


def _from_pattern(name: str, pattern: Mapping[str, int] | None, default: int) -> int:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _shapes(name: str, module: nn.Module, rank: int) -> dict[str, tuple[int, int]]:
    prefix = f"base_model.model.{name}"
    if isinstance(module, nn.Embedding):
        a, b = (rank, module.num_embeddings), (module.embedding_dim, rank)
        return {f"{prefix}.lora_embedding_A": a, f"{prefix}.lora_embedding_B": b}
    assert isinstance(module, _LINEAR)
    rows, columns = module.weight.shape
    inputs, outputs = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
    return {f"{prefix}.lora_A.weight": (rank, inputs), f"{prefix}.lora_B.weight": (outputs, rank)}
