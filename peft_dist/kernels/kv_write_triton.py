"""Keys and values of a step into their places in the paged cache: one launch a layer, any GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peft_dist.kernels.triton_device import device_of
from peft_dist.kernels.types import AttentionMetadata, KVCache


@triton.jit
def _copy_row(
    source, source_head, target, target_head, num_heads, DIM: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr
):
    heads = tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (heads < num_heads) & (columns < DIM)
    row = tl.load(source + heads * source_head + columns, mask=inside)
    tl.store(target + heads * target_head + columns, row.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _write_kernel(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    block_size,
    num_heads,
    key_token,
    key_head,
    value_token,
    value_head,
    key_block,
    key_slot,
    key_cache_head,
    value_block,
    value_slot,
    value_cache_head,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    block = slot // block_size
    offset = slot % block_size
    _copy_row(
        key + token * key_token,
        key_head,
        key_cache + block * key_block + offset * key_slot,
        key_cache_head,
        num_heads,
        KEY_DIM,
        HEADS,
        KEY_COLUMNS,
    )
    _copy_row(
        value + token * value_token,
        value_head,
        value_cache + block * value_block + offset * value_slot,
        value_cache_head,
        num_heads,
        VALUE_DIM,
        HEADS,
        VALUE_COLUMNS,
    )


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: KVCache, meta: AttentionMetadata) -> None:
    """Triton back end of ``attention.write_kv``; skips tokens whose slot is -1.

    Key, value and caches may be views with any strides but the last dimension's.
    """
    for new, stored in ((key, cache.key), (value, cache.value)):
        if new.shape != (len(meta.slot_mapping_t), *stored.shape[2:]):
            raise ValueError(f"{list(new.shape)} keys or values do not fit {len(meta.slot_mapping_t)} slots of a "
                             f"{list(stored.shape)} cache")  # fmt: skip
        if stored.stride(3) != 1:
            raise ValueError(f"cache strides {stored.stride()}: the last must be 1")
    key, value = (t if t.stride(2) == 1 else t.contiguous() for t in (key, value))
    num_tokens, num_heads, key_dim = key.shape
    if not num_tokens:
        return
    with device_of(key):
        _write_kernel[(num_tokens,)](
            key,
            value,
            *cache,
            meta.slot_mapping_t,
            cache.key.shape[1],
            num_heads,
            *key.stride()[:2],
            *value.stride()[:2],
            *cache.key.stride()[:3],
            *cache.value.stride()[:3],
            KEY_DIM=key_dim,
            VALUE_DIM=value.shape[2],
            HEADS=triton.next_power_of_2(num_heads),
            KEY_COLUMNS=triton.next_power_of_2(key_dim),
            VALUE_COLUMNS=triton.next_power_of_2(value.shape[2]),
        )
