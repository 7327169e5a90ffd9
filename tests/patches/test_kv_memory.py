"""How much KV memory a call of generate is given ahead, and what of it is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, LlamaConfig

from peft_dist.patches.adapter_rows import longest_length, prompt_length
from peft_dist.patches.kv_memory import BLOCK_SIZE, KVMemory, block_bytes, blocks_for

LLAMA = LlamaConfig(
    num_hidden_layers=4, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=10
)


@pytest.mark.parametrize(
    ("kwargs", "default", "length"),
    [
        ({"max_new_tokens": 7}, {"max_length": 500}, 107),
        ({"max_length": 150}, {"max_new_tokens": 500}, 150),
        ({}, {"max_new_tokens": 9}, 109),
        ({}, {"max_length": 300}, 300),
        ({}, {"max_length": 20}, 120),
        ({}, {}, 120),
        ({"generation_config": GenerationConfig(max_new_tokens=3)}, {"max_new_tokens": 9}, 103),
    ],
)
def test_longest_length(kwargs: dict[str, Any], default: dict[str, int], length: int) -> None:
    settings = SimpleNamespace(**{"max_new_tokens": None, "max_length": None, **default})
    assert longest_length(100, kwargs, settings) == length


def test_prompt_length() -> None:
    ids, embeds = torch.zeros(2, 5), torch.zeros(2, 3, 8)
    assert prompt_length((ids,), {}) == prompt_length((), {"input_ids": ids}) == 5
    assert prompt_length((), {"inputs_embeds": embeds}) == 3
    # Which of them the mask covers depends on more than their shapes.
    assert prompt_length((), {"input_ids": ids, "inputs_embeds": embeds}) is None
    assert prompt_length((), {}) is None


@pytest.mark.parametrize(
    ("config", "num_layers", "heads", "dim"),
    [
        (LLAMA, 4, 2, 32),
        (GPT2Config(n_layer=3, n_embd=64, n_head=4), 3, 4, 16),
    ],
)
def test_bytes_of_a_block(config: Any, num_layers: int, heads: int, dim: int) -> None:
    memory = KVMemory(5)
    for layer in range(num_layers):
        memory.ensure_layer(layer, torch.zeros(1, heads, 1, dim, dtype=torch.bfloat16))
    assert memory.num_bytes == 5 * block_bytes(config, 2) and memory.may_be_kept


def test_no_more_than_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_bytes(LLAMA, 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * block, 1000 * block))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50 * block)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30 * block)
    device = torch.device("cuda")
    assert blocks_for(2, 3 * BLOCK_SIZE, LLAMA, 2, device) == 8
    assert blocks_for(100, 3 * BLOCK_SIZE, LLAMA, 2, device) == 60


def test_growing_keeps_contents_and_tells() -> None:
    memory = KVMemory(2)
    memory.ensure_layer(0, torch.zeros(1, 2, 1, 4))
    caches = memory.caches
    caches[0].key.fill_(3.0)
    version = memory.version
    memory.grow(5)
    assert caches is memory.caches and len(caches[0].key) == 5
    assert (caches[0].key[:2] == 3).all() and memory.version > version
    version = memory.version
    memory.ensure_layer(0, torch.zeros(1, 2, 1, 4))
    assert memory.version == version
    memory.ensure_layer(0, torch.zeros(1, 2, 1, 4, dtype=torch.float16))
    assert memory.version > version and caches[0].key.dtype == torch.float16
