"""The glue between a model's matrix multiplications as Triton kernels, one pass over memory each.

Grids follow from shapes alone and nothing waits for the device, so that a CUDA graph can hold them. What each
function computes is said in ``glue.Glue``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from peft_dist.kernels.glue import Activation, Norm
from peft_dist.kernels.triton_device import device_of
from peft_dist.kernels.types import KVCache

# Columns of one program of the gate; with four warps each thread reads 16 bytes of a 16-bit row at a time.
_GATE_COLUMNS = 1024
# Up to this many rows a program takes one head: more programs hide the latency of a decode step's few bytes.
_FEW_ROWS = 64
_HEADS = 8


@triton.jit
def _norm_kernel(
    x,
    residual,
    part,
    weight,
    out,
    total,
    x_stride,
    residual_stride,
    part_stride,
    columns,
    eps,
    ADD: tl.constexpr,
    PART: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. With ADD, ``total`` gets the rounded sum, and the norm is of that."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    # Asked for first: it does not depend on the row, which another kernel may just have written.
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if PART:
        values += tl.load(part + row * part_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * columns + column, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / columns + eps)
    values = values * scale
    if ROUNDS:
        values = values.to(out.dtype.element_ty).to(tl.float32)
    if ADDS_ONE:
        factor += 1.0
    tl.store(out + row * columns + column, (values * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(
    gate, up, gate_part, up_part, out, gate_stride, up_stride, part_stride, columns,
    SILU: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if PARTS:
        x += tl.load(gate_part + row * part_stride + column, mask=inside, other=0.0).to(tl.float32)
        factor += tl.load(up_part + row * part_stride + column, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        active = x * tl.sigmoid(x)
    else:
        # x / 2 * (1 + tanh(u)) with tanh(u) = 2 * sigmoid(2 * u) - 1 and u = sqrt(2 / pi) * (x + 0.044715 * x ** 3)
        active = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    tl.store(out + row * columns + column, (active * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn_heads(
    source,
    part,
    target,
    cos,
    sin,
    weight,
    source_stride,
    target_stride,
    first_head,
    num_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """Heads of one token, from rows of ``source`` to rows of ``target``: norm, then rotation of the first WIDTH.

    With PARTS the heads in ``part``, one behind the other, are added first.
    """
    heads = (first_head + tl.arange(0, HEADS))[:, None]
    half = tl.arange(0, HALF)[None, :]
    in_half = half < WIDTH // 2
    inside = (heads < num_heads) & in_half
    read = source + heads * source_stride
    write = target + heads * target_stride
    a = tl.load(read + half, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(read + WIDTH // 2 + half, mask=inside, other=0.0).to(tl.float32)
    rest = tl.arange(0, REST)[None, :]
    in_rest = (heads < num_heads) & (rest < HEAD_DIM - WIDTH)
    if WIDTH < HEAD_DIM:
        c = tl.load(read + WIDTH + rest, mask=in_rest, other=0.0).to(tl.float32)
    if PARTS:
        more = part + heads * HEAD_DIM
        a += tl.load(more + half, mask=inside, other=0.0).to(tl.float32)
        b += tl.load(more + WIDTH // 2 + half, mask=inside, other=0.0).to(tl.float32)
        if WIDTH < HEAD_DIM:
            c += tl.load(more + WIDTH + rest, mask=in_rest, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
        if WIDTH < HEAD_DIM:
            squares += tl.sum(c * c, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        one = 1.0 if ADDS_ONE else 0.0
        a *= scale * (tl.load(weight + half, mask=in_half, other=0.0).to(tl.float32) + one)
        b *= scale * (tl.load(weight + WIDTH // 2 + half, mask=in_half, other=0.0).to(tl.float32) + one)
        if WIDTH < HEAD_DIM:
            c *= scale * (tl.load(weight + WIDTH + rest, mask=rest < HEAD_DIM - WIDTH, other=0.0).to(tl.float32) + one)
    cos_a = tl.load(cos + half, mask=in_half, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + half, mask=in_half, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + WIDTH // 2 + half, mask=in_half, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + WIDTH // 2 + half, mask=in_half, other=0.0).to(tl.float32)
    tl.store(write + half, (a * cos_a - b * sin_a).to(target.dtype.element_ty), mask=inside)
    tl.store(write + WIDTH // 2 + half, (b * cos_b + a * sin_b).to(target.dtype.element_ty), mask=inside)
    if WIDTH < HEAD_DIM:
        tl.store(write + WIDTH + rest, c.to(target.dtype.element_ty), mask=in_rest)


@triton.jit
def _rotary_kernel(
    query,
    key,
    value,
    query_part,
    key_part,
    value_part,
    cos,
    sin,
    query_weight,
    key_weight,
    slots,
    out,
    key_cache,
    value_cache,
    query_stride,
    query_head,
    key_stride,
    key_head,
    value_stride,
    value_head,
    part_stride,
    cos_stride,
    sin_stride,
    key_cache_block,
    key_cache_slot,
    key_cache_head,
    value_cache_block,
    value_cache_slot,
    value_cache_head,
    block_size,
    query_eps,
    key_eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    VALUE: tl.constexpr,
):
    """Program (token, group of heads): those of the query first, then the keys', then the values'."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    query_groups = tl.cdiv(NUM_HEADS, HEADS)
    key_groups = tl.cdiv(NUM_KV_HEADS, HEADS)
    if group < query_groups:
        _turn_heads(
            query + token * query_stride, query_part + token * part_stride, out + token * NUM_HEADS * HEAD_DIM,
            cos + token * cos_stride, sin + token * sin_stride, query_weight, query_head, HEAD_DIM, group * HEADS,
            NUM_HEADS, query_eps, HEAD_DIM, WIDTH, NORM, ADDS_ONE, PARTS, HEADS, HALF, REST,
        )  # fmt: skip
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            block = slot // block_size
            offset = slot % block_size
            if group < query_groups + key_groups:
                _turn_heads(
                    key + token * key_stride, key_part + token * part_stride,
                    key_cache + block * key_cache_block + offset * key_cache_slot,
                    cos + token * cos_stride, sin + token * sin_stride, key_weight, key_head, key_cache_head,
                    (group - query_groups) * HEADS, NUM_KV_HEADS, key_eps,
                    HEAD_DIM, WIDTH, NORM, ADDS_ONE, PARTS, HEADS, HALF, REST,
                )  # fmt: skip
            else:
                heads = ((group - query_groups - key_groups) * HEADS + tl.arange(0, HEADS))[:, None]
                column = tl.arange(0, VALUE)[None, :]
                inside = (heads < NUM_KV_HEADS) & (column < VALUE_DIM)
                target = value_cache + block * value_cache_block + offset * value_cache_slot
                values = tl.load(value + token * value_stride + heads * value_head + column, mask=inside)
                if PARTS:
                    more = tl.load(value_part + token * part_stride + heads * VALUE_DIM + column, mask=inside)
                    values = values.to(tl.float32) + more.to(tl.float32)
                tl.store(target + heads * value_cache_head + column, values.to(target.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """See ``glue.Glue``."""
    return _launch_norm(x, x, norm, None, adds=False)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, norm: Norm, part: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``glue.Glue``."""
    return _launch_norm(x, residual, norm, part, adds=True)


def _launch_norm(
    x: torch.Tensor, residual: torch.Tensor, norm: Norm, part: torch.Tensor | None, adds: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    out = x.new_empty(rows, columns)
    total = x.new_empty(rows, columns) if adds else out
    block = triton.next_power_of_2(columns)
    if rows:
        with device_of(x):
            _norm_kernel[(rows,)](
                x, residual, x if part is None else part, norm.weight, out, total, x.stride(0), residual.stride(0),
                0 if part is None else part.stride(0), columns, norm.eps, ADD=adds, PART=part is not None,
                ADDS_ONE=norm.adds_one, ROUNDS=norm.rounds, BLOCK=block,
                num_warps=min(max(block // 512, 1), 16),
            )  # fmt: skip
    return out, total


def gated(
    gate: torch.Tensor, up: torch.Tensor, activation: Activation, parts: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """See ``glue.Glue``."""
    of_gate, of_up = parts or (gate, up)
    rows, columns = gate.shape
    out = gate.new_empty(rows, columns)
    block = min(_GATE_COLUMNS, triton.next_power_of_2(columns))
    if rows:
        with device_of(gate):
            _gate_kernel[(rows, triton.cdiv(columns, block))](
                gate, up, of_gate, of_up, out, gate.stride(0), up.stride(0), of_gate.stride(0), columns,
                SILU=activation == "silu", PARTS=parts is not None, BLOCK=block,
            )  # fmt: skip
    return out


def rotary_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
    query_norm: Norm | None = None,
    key_norm: Norm | None = None,
    parts: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """See ``glue.Glue``."""
    rows, num_heads, head_dim = query.shape
    num_kv_heads, value_dim, width = key.shape[1], value.shape[2], cos.shape[1]
    out = query.new_empty(rows, num_heads, head_dim)
    heads = 1 if rows <= _FEW_ROWS else min(_HEADS, triton.next_power_of_2(max(num_heads, num_kv_heads)))
    grid = (rows, triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads))
    # Weights and eps are not read where there is no norm.
    of_query, of_key = query_norm or Norm(cos, 0.0), key_norm or Norm(cos, 0.0)
    added = parts or (query, key, value)
    strides: tuple[Any, ...] = (
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], added[0].stride(0), cos.stride(0), sin.stride(0),
        *cache.key.stride()[:3], *cache.value.stride()[:3],
    )  # fmt: skip
    if rows:
        with device_of(query):
            _rotary_kernel[grid](
                query, key, value, *added, cos, sin, of_query.weight, of_key.weight, slot_mapping, out,
                cache.key, cache.value, *strides, cache.key.shape[1], of_query.eps, of_key.eps,
                NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, VALUE_DIM=value_dim, WIDTH=width,
                NORM=query_norm is not None, ADDS_ONE=of_query.adds_one, PARTS=parts is not None, HEADS=heads,
                HALF=triton.next_power_of_2(width // 2), REST=triton.next_power_of_2(max(head_dim - width, 1)),
                VALUE=triton.next_power_of_2(value_dim), num_warps=1 if heads == 1 else 4,
            )  # fmt: skip
    return out
