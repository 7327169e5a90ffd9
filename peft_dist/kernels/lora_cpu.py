"""LoRA through the C kernels: one call for the layers that share an input.

Addresses are prepared once a plan and once a weights version.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from peft_dist.kernels import cpu_build
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan, rows_of_slots


class _LayerStruct(ctypes.Structure):
    _fields_ = (
        ("A", ctypes.c_void_p),
        ("B", ctypes.c_void_p),
        ("first_segment", ctypes.c_void_p),
        ("segment_start", ctypes.c_void_p),
        ("segment_rows", ctypes.c_void_p),
        ("scaling", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("num_slots", ctypes.c_int32),
        ("is_narrow", ctypes.c_int32),
    )


class _MemberStruct(ctypes.Structure):
    _fields_ = (
        ("layer", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_int64),
        ("work", ctypes.c_int64),
        ("t_first", ctypes.c_int64),
    )


class _PlanStruct(ctypes.Structure):
    _fields_ = (
        ("slots", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("num_runs", ctypes.c_int32),
        ("factor", ctypes.c_float),
    )


class _Prepared(NamedTuple):
    """A struct for the kernel, and what each call is checked against.

    Attributes:
        address: Of the struct.
        version: Of the weights it was made from.
        sizes: (in_features, out_features) of a layer, (rows, 0) of a plan.
        functions: A layer's kernels by the type of y; other types are torch's.
        kept: Keeps alive what the struct points to.
    """

    address: int
    version: int
    sizes: tuple[int, int]
    functions: Mapping[torch.dtype, _Functions | None]
    kept: Any


class _Functions(NamedTuple):
    add_lora: Any
    add_embedding_lora: Any


class _FunctionTable(dict[torch.dtype, _Functions | None]):
    """The kernels by type of the activations, built when they are first asked for; None where there are none."""

    def __missing__(self, dtype: torch.dtype) -> _Functions | None:
        library = cpu_build.library(dtype)
        self[dtype] = _bind(library) if library else None
        return self[dtype]


def _bind(library: ctypes.PyDLL) -> _Functions:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    count = ctypes.c_int
    library.pd_add_lora.argtypes = (pointer, size, pointer, count, pointer, count)
    library.pd_add_embedding_lora.argtypes = (pointer, ctypes.c_float, pointer, pointer, count)
    return _Functions(library.pd_add_lora, library.pd_add_embedding_lora)


_functions = _FunctionTable()


def _segments(weights: LoRALayerWeights) -> Sequence[np.ndarray]:
    """``first_segment``, ``segment_start`` and ``segment_rows`` of all slots; pages side by side are one segment."""
    tables = np.ascontiguousarray(weights.pages, np.int32), np.ascontiguousarray(weights.rank, np.int32)
    return _find_segments(weights.page_rows, *(table.tobytes() for table in tables))


@lru_cache(maxsize=64)
def _find_segments(page_rows: int, pages: bytes, rank: bytes) -> Sequence[np.ndarray]:
    """From the tables' bytes, because many layers have the same ones."""
    ranks = np.frombuffer(rank, np.int32)
    owners = np.flatnonzero(ranks)
    table = np.frombuffer(pages, np.int32).reshape(len(ranks), -1)
    rows = rows_of_slots(table, ranks, page_rows, owners)
    slots = np.repeat(owners, ranks[owners])
    is_first = np.ones(len(rows), bool)
    is_first[1:] = (rows[1:] != rows[:-1] + 1) | (slots[1:] != slots[:-1])
    first = np.flatnonzero(is_first)
    counts = np.bincount(slots[first] + 1, minlength=len(ranks) + 1)
    sizes = np.diff(first, append=len(rows))
    return [array.astype(np.int32) for array in (np.cumsum(counts), rows[first], sizes)]


def _prepare_layer(weights: LoRALayerWeights) -> _Prepared:
    arrays = [*_segments(weights), np.ascontiguousarray(weights.scaling, np.float32)]
    A, B = weights.A.contiguous(), weights.B.contiguous()
    sizes, dtype = (A.shape[1], B.shape[1]), A.dtype
    is_wide = dtype == torch.float32
    pointers = (A.data_ptr(), B.data_ptr(), *(array.ctypes.data for array in arrays))
    struct = _LayerStruct(*pointers, *sizes, len(weights.rank), not is_wide)
    # Adapters in float32 go with activations of any type, others with their own only.
    functions = _functions if is_wide else {dtype: _functions[dtype]}
    prepared = _Prepared(ctypes.addressof(struct), weights.version, sizes, functions, (struct, arrays, A, B))
    weights.scratch["c"] = prepared
    return prepared


def _prepare_plan(plan: LoRAPlan) -> _Prepared:
    arrays = [np.ascontiguousarray(a, np.int32) for a in (plan.slots, plan.starts)]
    struct = _PlanStruct(*(array.ctypes.data for array in arrays), len(plan.slots), plan.factor)
    prepared = _Prepared(ctypes.addressof(struct), 0, (plan.num_rows, 0), {}, (struct, arrays))
    plan.scratch["c"] = prepared
    return prepared


@lru_cache(maxsize=1024)
def _row_stride(shape: torch.Size, stride: tuple[int, ...], rows: int, columns: int) -> int:
    """Checked, because the kernel trusts its sizes: a wrong plan must not reach outside of a tensor."""
    if shape[-1] != columns or shape.numel() != rows * columns:
        raise ValueError(f"LoRA: the plan and the layer's weights need {[rows, columns]}, not {list(shape)}")
    if stride[-1] != 1 or not _rows_are_even(shape, stride):
        raise ValueError(f"LoRA: rows must have unit stride and one distance, not strides {stride} of {list(shape)}")
    return stride[-2]


def _rows_are_even(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether the rows of all leading dimensions lie in one distance of each other."""
    return all(shape[i] == 1 or stride[i] == stride[i + 1] * shape[i + 1] for i in range(len(shape) - 2))


def _layer_of(weights: LoRALayerWeights) -> _Prepared:
    layer: Any = weights.scratch.get("c")
    return layer if layer is not None and layer.version == weights.version else _prepare_layer(weights)


def _functions_for(y: torch.Tensor, layer: _Prepared) -> _Functions | None:
    functions, dtype = layer.functions, y.dtype
    if not y.is_cpu or (functions is not _functions and dtype not in functions):
        return None
    return functions[dtype]


class _Group(NamedTuple):
    """Layers that one call serves, ready but for the addresses of their outputs.

    Attributes:
        versions: Of the weights, to tell whether they are still the same.
    """

    weights: Sequence[LoRALayerWeights]
    versions: list[int]
    layers: list[_Prepared]
    members: ctypes.Array[_MemberStruct]
    is_alike: bool


def _group_of(weights: Sequence[LoRALayerWeights]) -> _Group:
    group: Any = weights[0].scratch.get("c_group")
    if group is not None and len(group.weights) == len(weights):
        for before, version, now in zip(group.weights, group.versions, weights, strict=True):
            if before is not now or version != now.version:
                break
        else:
            return cast(_Group, group)
    layers = [_layer_of(w) for w in weights]
    members = (_MemberStruct * len(layers))()
    for member, layer in zip(members, layers, strict=True):
        member.layer = layer.address
        if layer.sizes[0] != layers[0].sizes[0]:
            raise ValueError(f"LoRA: layers of one call read one input, not {[layer.sizes[0] for layer in layers]}")
    is_alike = len({w.A.dtype for w in weights}) == 1
    group = _Group(list(weights), [w.version for w in weights], layers, members, is_alike)
    weights[0].scratch["c_group"] = group
    return group


def add_lora_group_(
    ys: Sequence[torch.Tensor], x: torch.Tensor, weights: Sequence[LoRALayerWeights], plan: LoRAPlan
) -> bool:
    """C back end of ``lora.add_lora_group_``; False when there is no kernel for this call and nothing was done."""
    group = _group_of(weights)
    layers = group.layers
    functions = _functions_for(x, layers[0])
    if functions is None or not group.is_alike or any(y.dtype != x.dtype for y in ys):
        return False
    runs: Any = plan.scratch.get("c") or _prepare_plan(plan)
    rows = runs.sizes[0]
    if not x.is_contiguous() and not (x.stride()[-1] == 1 and _rows_are_even(x.shape, x.stride())):
        x = x.contiguous()
    x_stride = _row_stride(x.shape, x.stride(), rows, layers[0].sizes[0])
    members = group.members
    for i, y in enumerate(ys):
        member = members[i]
        member.y, member.y_stride = y.data_ptr(), _row_stride(y.shape, y.stride(), rows, layers[i].sizes[1])
    if functions.add_lora(x.data_ptr(), x_stride, members, len(layers), runs.address, torch.get_num_threads()):
        raise MemoryError("no memory for the rank intermediate of a LoRA layer")
    return True


def add_embedding_lora_(
    y: torch.Tensor, ids: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan, factor: float
) -> bool:
    """C back end of ``lora.add_embedding_lora_``; ids lie within the embedding."""
    layer = _layer_of(weights)
    functions = _functions_for(y, layer)
    if functions is None:
        return False
    runs: Any = plan.scratch.get("c") or _prepare_plan(plan)
    ids = ids.to(torch.int64).contiguous()
    if ids.shape != (runs.sizes[0],):
        raise ValueError(f"LoRA: the plan has {runs.sizes[0]} rows, ids {list(ids.shape)}")
    y_stride = _row_stride(y.shape, y.stride(), runs.sizes[0], layer.sizes[1])
    member = _MemberStruct(layer.address, y.data_ptr(), y_stride)
    pointers = (ctypes.addressof(member), runs.address)
    if functions.add_embedding_lora(ids.data_ptr(), factor, *pointers, torch.get_num_threads()):
        raise MemoryError("no memory for the rank intermediate of a LoRA layer")
    return True
