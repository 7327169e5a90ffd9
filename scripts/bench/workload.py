"""The small chat workload of the CPU benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

NEW_TOKENS = 32
NUM_ADAPTERS = 8
RANK = 8
_TOPICS = (
    "France", "rain", "bread", "music", "a dog", "the sea", "Python code", "history", "a train", "tea", "stars",
    "chess", "soup", "a river", "winter", "gold",
)  # fmt: skip
PROMPTS = [f"Tell me one short fact about {topic}." for topic in _TOPICS]
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapters(
    model_path: Path, folder: Path, rank: int = RANK, num_adapters: int = NUM_ADAPTERS
) -> dict[str, Path]:
    """Random adapters on all seven linears of a Llama-like model, float32, in PEFT's format."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model_path / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    paths = {}
    for number in range(num_adapters):
        generator = torch.Generator().manual_seed(number)
        path = paths[f"adapter{number}"] = folder / f"adapter{number}"
        path.mkdir()
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for name, (inputs, outputs) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.02
                tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.02
        save_file(tensors, path / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0,
            "bias": "none", "target_modules": _TARGETS, "base_model_name_or_path": "", "inference_mode": True,
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(settings))
    return paths
