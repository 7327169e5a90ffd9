"""Weights with an adapter folded in, computed from the base and never by adding to what was merged before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch

# Elements of a weight that are computed at a time on a CPU: 2 MiB of float32 stay in its caches.
_CHUNK = 1 << 19


class MergeItem(NamedTuple):
    """One weight to merge: ``out = base + scaling * B @ A``.

    Attributes:
        out, base: ``[rows, columns]``, float32, bfloat16 or float16, of one dtype and device; may be one tensor, but
            must not overlap otherwise.
        A: ``[r, columns]``, float32, bfloat16 or float16, on any device.
        B: ``[rows, r]``, likewise.

    For a weight that is stored ``[in, out]`` (Conv1D, embeddings) columns and rows change places: ``A`` is then the
    transpose of PEFT's B and ``B`` that of its A.
    """

    out: torch.Tensor
    base: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    scaling: float


def merge_into_(
    out: torch.Tensor, base: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """``out = base + scaling * B @ A``: products and sums in float32, each element rounded once.

    Args: see ``MergeItem``.

    Returns:
        out itself.

    Raises:
        ValueError: the shapes or dtypes do not fit; nothing has changed.
    """
    merge_group_([MergeItem(out, base, A, B, scaling)])
    return out


def merge_group_(items: Sequence[MergeItem]) -> None:
    """``merge_into_`` for many weights; on a GPU in one launch for all of one shape, rank and dtype.

    On a GPU the work is put onto the current stream, and A and B that lie elsewhere are moved there first.

    Raises:
        ValueError: an item does not fit; nothing has changed.
    """
    for item in items:
        _check(item)
    alone: list[MergeItem] = []
    grouped: list[MergeItem] = []
    for item in items:
        (grouped if _can_group(item) else alone).append(item)
    if grouped:
        from peft_dist.kernels import merge_triton

        merge_triton.merge_group_(grouped)
    for item in alone:
        _merge(item)


def _merge(item: MergeItem) -> None:
    out, base = item.out, item.base
    A, B = (tensor.to(out.device, torch.float32) for tensor in (item.A, item.B))
    step = max(1, _CHUNK // out.shape[1])
    for first in range(0, len(out), step):
        rows = slice(first, first + step)
        if out.dtype == torch.float32:
            torch.addmm(base[rows], B[rows], A, alpha=item.scaling, out=out[rows])
        else:
            out[rows].copy_(base[rows].float().addmm_(B[rows], A, alpha=item.scaling))


def _check(item: MergeItem) -> None:
    out, base, A, B = item.out, item.base, item.A, item.B
    if out.shape != base.shape or out.dtype != base.dtype or out.device != base.device:
        raise ValueError(f"merge: {list(out.shape)} of {out.dtype} cannot take {list(base.shape)} of {base.dtype}")
    if out.dim() != 2 or A.dim() != 2 or B.dim() != 2 or (len(B), A.shape[1]) != out.shape or len(A) != B.shape[1]:
        raise ValueError(f"merge: a weight {list(out.shape)} does not fit B {list(B.shape)} and A {list(A.shape)}")
    for tensor in (out, A, B):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"merge: weights are float32, bfloat16 or float16, not {tensor.dtype}")


def _can_group(item: MergeItem) -> bool:
    return item.out.is_cuda and item.out.stride(1) == item.base.stride(1) == 1 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
