"""What each rank keeps of a model, and which models are refused: without any other process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peft_dist.patches.sharding import UnsupportedShardingError, shard_model
from tests.tiny_models import FAMILIES

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def llama(**options: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 96, **SIZES, **options})).eval()


def on_ranks(model: PreTrainedModel, size: int) -> list[PreTrainedModel]:
    ranks = [copy.deepcopy(model) for _ in range(size)]
    for rank, part in enumerate(ranks):
        shard_model(part, rank, size)
    return ranks


def weights(ranks: list[PreTrainedModel], path: str) -> list[torch.Tensor]:
    return [rank.get_parameter(path) for rank in ranks]


def test_parts_put_together_are_the_whole() -> None:
    model = llama(attention_bias=True, mlp_bias=True)
    ranks = on_ranks(model, 2)
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    by_rows = [f"{attention}.{name}_proj" for name in "qkv"] + [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
    for path in [*(f"{path}.{kind}" for path in by_rows for kind in ("weight", "bias")), "lm_head.weight"]:
        assert torch.equal(torch.cat(weights(ranks, path)), model.get_parameter(path))
    assert torch.equal(torch.cat(weights(ranks, "model.embed_tokens.weight")), model.model.embed_tokens.weight)
    for path in (f"{attention}.o_proj", f"{mlp}.down_proj"):
        assert torch.equal(torch.cat(weights(ranks, f"{path}.weight"), 1), model.get_parameter(f"{path}.weight"))
        first, second = (rank.get_submodule(path).bias for rank in ranks)
        assert torch.equal(first, model.get_parameter(f"{path}.bias")) and second is None, "added once to the sum"


def test_memory_is_shared_out_and_ties_stay() -> None:
    model = llama(tie_word_embeddings=True, num_key_value_heads=2)
    [first, _] = on_ranks(model, 2)
    assert first.lm_head.weight is first.model.embed_tokens.weight
    bytes_kept = {
        weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in first.parameters()
    }
    split = sum(weight.nbytes for weight in model.parameters() if weight.dim() > 1)
    norms = sum(weight.nbytes for weight in model.parameters() if weight.dim() == 1)
    assert sum(bytes_kept.values()) == split // 2 + norms


def test_heads_of_keys_are_kept_by_several_ranks_where_there_are_fewer() -> None:
    model = llama(num_key_value_heads=2)
    key = model.model.layers[0].self_attn.k_proj.weight
    parts = weights(on_ranks(model, 4), "model.layers.0.self_attn.k_proj.weight")
    assert [part.shape[0] for part in parts] == [8] * 4
    assert all(torch.equal(part, key[8 * (rank // 2) :][:8]) for rank, part in enumerate(parts))


def test_tokens_that_do_not_divide_stay_whole() -> None:
    [_, second] = on_ranks(llama(vocab_size=97), 2)
    assert second.lm_head.weight.shape == second.model.embed_tokens.weight.shape == (97, 32)
    assert second.model.layers[0].mlp.up_proj.weight.shape == (24, 32)


def quantised() -> PreTrainedModel:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "size", "reason"),
    [
        (lambda: llama(), 3, "4 heads cannot be split over 3 ranks"),
        (lambda: llama(num_attention_heads=8, num_key_value_heads=2, intermediate_size=51), 2, "51 features"),
        (
            lambda: llama(num_attention_heads=6, num_key_value_heads=2, hidden_size=48),
            3,
            "2 heads cannot be shared out",
        ),
        (quantised, 2, "up_proj of LlamaForCausalLM"),
        (FAMILIES["gpt2"], 2, "no plan for splitting GPT2LMHeadModel"),
        (FAMILIES["gpt_neox"], 2, "query_key_value is no projection whose heads are known"),
        (FAMILIES["mixtral"], 2, "moe_tp_experts"),
        (
            lambda: CohereForCausalLM(CohereConfig(**SIZES, vocab_size=96, use_qk_norm=True)),
            2,
            "not the same for every head",
        ),
    ],
)
def test_refused_with_nothing_changed(make: Any, size: int, reason: str) -> None:
    model = make()
    before = dict(model.named_parameters())
    with pytest.raises(UnsupportedShardingError, match=reason):
        shard_model(model, 0, size)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
