"""A model that the engine would not compute exactly is refused when it is loaded, with the reason and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Llama4TextConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen2MoeConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from peft_dist import LLM, SamplingParams
from peft_dist.core.errors import ConfigError
from tests.oracle import PeftOracle
from tests.tiny_models import make_model, random_adapter

torch.set_num_threads(1)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def save(config: PreTrainedConfig, folder: Path) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
    model.save_pretrained(folder)
    return model


def llama4(**options: Any) -> Llama4TextConfig:
    return Llama4TextConfig(
        num_key_value_heads=2, head_dim=8, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=8,
        **SIZES, **options,
    )  # fmt: skip


def qwen2_moe(**options: Any) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, use_sliding_window=True, **SIZES, **options,
    )  # fmt: skip


def test_chunked_attention_is_refused(tmp_path: Path) -> None:
    save(llama4(), tmp_path)
    with pytest.raises(ConfigError, match=r"Llama4ForCausalLM has layers of type chunked_attention.*patch\(model\)"):
        LLM(tmp_path, device="cpu", num_blocks=16)


def test_a_window_that_only_the_mask_knows_is_refused(tmp_path: Path) -> None:
    save(qwen2_moe(sliding_window=6), tmp_path)
    with pytest.raises(ConfigError, match=r"sliding window.*Qwen2MoeAttention.*layer 0.*patch\(model\)"):
        LLM(tmp_path, device="cpu", num_blocks=16)


def test_an_argument_that_attention_does_not_know_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("llama", tmp_path)
    original = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, *a, **k: original(self, *a, invented=1, **k))
    with pytest.raises(ConfigError, match=r"cannot honour invented.*LlamaAttention.*layer 0.*patch\(model\)"):
        LLM(tmp_path, device="cpu", num_blocks=16)


def test_a_model_that_computes_all_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("llama", tmp_path)
    original = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, input_ids, **k: original(self, input_ids, **k))
    with pytest.raises(ConfigError, match=r"takes no logits_to_keep.*patch\(model\)"):
        LLM(tmp_path, device="cpu", num_blocks=16)


def test_layers_between_decoder_and_head_have_adapters(tmp_path: Path) -> None:
    """BERT's head has a linear layer of its own, which sees only the rows whose logits are wanted."""
    model = save(BertConfig(is_decoder=True, **SIZES), tmp_path / "base")
    adapter = random_adapter(model, tmp_path / "a0", targets=["query", "dense"])
    prompts, names = [[5, 6, 7], [9, 8, 7, 6, 5], [11]], ["a0", None, "a0"]
    oracle = PeftOracle(model, {"a0": adapter})
    with LLM(tmp_path / "base", {"a0": adapter}, device="cpu", num_blocks=16) as llm:
        outputs = llm.generate(prompts, GREEDY, names, use_tqdm=False)
    for output, prompt, name in zip(outputs, prompts, names, strict=True):
        assert output.outputs[0].token_ids == oracle.answer(prompt, name, 6).tokens
