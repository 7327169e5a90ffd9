"""Cases for kernels that run in Triton's interpreter on a CPU and for real on a GPU, with the same test bodies."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from peft_dist.kernels.types import AttentionMetadata, KVCache

DEVICES = (
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
    ),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
)


def on_device(meta: AttentionMetadata, device: str) -> AttentionMetadata:
    """The same batch, its tensors on the device; nothing derived from it yet."""
    names = ("query_start_loc_t", "context_lens_t", "block_tables_t", "slot_mapping_t")
    return dataclasses.replace(meta, scratch={}, **{name: getattr(meta, name).to(device) for name in names})


def interleaved(cache: KVCache) -> KVCache:
    """The same contents as two views of one tensor in which each block's keys and values are neighbours."""
    assert cache.key.shape == cache.value.shape
    return KVCache(*torch.stack(list(cache), dim=1).unbind(1))
