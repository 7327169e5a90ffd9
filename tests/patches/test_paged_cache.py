"""The paged cache holds what Hugging Face's dynamic cache holds, whatever generate does to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, MistralConfig

from peft_dist.kernels import attention as kernels
from peft_dist.patches.paged_cache import BLOCK_SIZE, PagedCache
from peft_dist.patches.row_blocks import RowBlocks

LAYERS, HEADS, DIM = 2, 2, 4


def append(paged: PagedCache, plain: DynamicCache, new: np.ndarray, seed: int) -> None:
    """One forward pass over ``new`` (bool ``[B, S]``) in both caches; padding is zero in the plain one."""
    meta, token_rows = paged.paged.begin(new)
    generator = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        states = torch.randn(2, *new.shape, HEADS, DIM, generator=generator) * torch.from_numpy(new)[..., None, None]
        key, value = states.transpose(2, 3)
        plain.update(key, value, layer)
        paged.update(key, value, layer)
        rows = states.flatten(1, 2) if token_rows is None else states.flatten(1, 2)[:, token_rows]
        kernels.write_kv(rows[0], rows[1], paged.paged.caches[layer], meta)


def check_equal(paged: PagedCache, plain: DynamicCache) -> None:
    assert paged.get_seq_length() == plain.get_seq_length()
    for layer in range(LAYERS):
        key, value = paged.paged.gather(layer)
        assert torch.equal(key, plain.layers[layer].keys) and torch.equal(value, plain.layers[layer].values)


def check_blocks(blocks: RowBlocks) -> None:
    """Free and used blocks are all blocks; a row's last partial block is written by that row alone."""
    used = {int(b) for row, count in enumerate(blocks.counts) for b in blocks.tables[row, :count]}
    assert sorted([*used, *blocks._free]) == list(range(blocks.num_blocks))
    assert (blocks.counts == -(-blocks.lens // BLOCK_SIZE)).all()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 20)),
        st.tuples(st.just("reorder"), st.integers(0, 2**16)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 2**16)),
        st.tuples(st.just("crop"), st.integers(1, 25)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**16), steps)
def test_any_history_leaves_the_same_contents(
    rows: int, prompt: int, seed: int, history: list[tuple[str, int]]
) -> None:
    random = np.random.default_rng(seed)
    plain, paged = DynamicCache(), PagedCache.adopt(DynamicCache(), rows, torch.device("cpu"))
    pads = random.integers(0, prompt, rows)
    append(paged, plain, np.arange(prompt)[None] >= pads[:, None], seed)
    for number, (action, value) in enumerate(history):
        rows = paged.batch_size
        if action == "append":
            append(paged, plain, np.ones((rows, value), bool), seed + number + 1)
        elif action == "reorder":
            order = torch.from_numpy(np.random.default_rng(value).integers(0, rows, rows))
            paged.reorder_cache(order)
            plain.reorder_cache(order)
        elif action == "repeat" and rows < 8:
            paged.batch_repeat_interleave(value)
            plain.batch_repeat_interleave(value)
        elif action == "select":
            chosen = torch.from_numpy(np.random.default_rng(value).integers(0, rows, max(1, rows - 1)))
            paged.batch_select_indices(chosen)
            plain.batch_select_indices(chosen)
        elif action == "crop" and value < plain.get_seq_length():
            paged.crop(-value)
            plain.crop(-value)
        check_equal(paged, plain)
        check_blocks(paged.paged.blocks)
    append(paged, plain, np.ones((paged.batch_size, 3), bool), seed)
    check_equal(paged, plain)


def test_beams_share_their_prompt_until_they_write() -> None:
    paged = PagedCache.adopt(DynamicCache(), 1, torch.device("cpu"))
    append(paged, DynamicCache(), np.ones((1, 2 * BLOCK_SIZE + 3), bool), 0)
    paged.batch_repeat_interleave(4)
    blocks = paged.paged.blocks
    assert len(np.unique(blocks.tables[:, :3])) == 3
    append(paged, DynamicCache(), np.ones((4, 1), bool), 1)
    assert len(np.unique(blocks.tables[:, :2])) == 2 and len(np.unique(blocks.tables[:, 2])) == 4


def test_release_gives_the_cache_that_the_model_would_have_had() -> None:
    config = MistralConfig(num_hidden_layers=LAYERS, sliding_window=6)
    cache, plain = DynamicCache(config=config), DynamicCache(config=config)
    paged = PagedCache.adopt(cache, 2, torch.device("cpu"))
    append(paged, plain, np.arange(10)[None] >= np.array([[0], [4]]), 0)
    append(paged, plain, np.ones((2, 1), bool), 1)
    paged.release()
    assert type(cache) is DynamicCache and not hasattr(cache, "paged")
    assert cache.get_seq_length() == plain.get_seq_length() == 11
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_memory_grows_with_the_tokens_and_not_with_the_padding() -> None:
    paged = PagedCache.adopt(DynamicCache(), 2, torch.device("cpu"))
    tokens = np.zeros((2, 50 * BLOCK_SIZE), bool)
    tokens[:, -1] = True
    append(paged, DynamicCache(), tokens, 0)
    assert paged.paged.blocks.num_blocks < 10


def test_reset_empties_the_cache() -> None:
    paged = PagedCache.adopt(DynamicCache(), 2, torch.device("cpu"))
    append(paged, DynamicCache(), np.ones((2, 5), bool), 0)
    assert paged.is_initialized and paged.is_croppable
    paged.reset()
    assert paged.get_seq_length() == 0 and len(paged.paged.blocks._free) == paged.paged.blocks.num_blocks


@pytest.mark.parametrize("positive", [2, 99])
def test_crop_to_a_length(positive: int) -> None:
    paged = PagedCache.adopt(DynamicCache(), 1, torch.device("cpu"))
    append(paged, DynamicCache(), np.ones((1, 5), bool), 0)
    paged.crop(positive)
    assert paged.get_seq_length() == min(positive, 5)
