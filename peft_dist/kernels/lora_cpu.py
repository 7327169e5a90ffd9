"""LoRA through the C kernels: one call for a layer; addresses are prepared once a plan and once a weights version."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from peft_dist.kernels import cpu_build
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan


class _LayerStruct(ctypes.Structure):
    _fields_ = (
        ("A", ctypes.c_void_p),
        ("B", ctypes.c_void_p),
        ("row_start", ctypes.c_void_p),
        ("rank", ctypes.c_void_p),
        ("scaling", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("num_slots", ctypes.c_int32),
        ("is_narrow", ctypes.c_int32),
    )


class _PlanStruct(ctypes.Structure):
    _fields_ = (("slots", ctypes.c_void_p), ("starts", ctypes.c_void_p), ("num_runs", ctypes.c_int32))


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
    library.pd_add_lora.argtypes = (pointer, size, pointer, size, pointer, pointer, ctypes.c_int)
    of_embedding = (pointer, size, pointer, ctypes.c_float, pointer, pointer, ctypes.c_int)
    library.pd_add_embedding_lora.argtypes = of_embedding
    return _Functions(library.pd_add_lora, library.pd_add_embedding_lora)


_functions = _FunctionTable()


def _prepare_layer(weights: LoRALayerWeights) -> _Prepared:
    arrays = [np.ascontiguousarray(a, np.int32) for a in (weights.row_start, weights.rank)]
    arrays.append(np.ascontiguousarray(weights.scaling, np.float32))
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
    struct = _PlanStruct(*(array.ctypes.data for array in arrays), len(plan.slots))
    prepared = _Prepared(ctypes.addressof(struct), 0, (plan.num_rows, 0), {}, (struct, arrays))
    plan.scratch["c"] = prepared
    return prepared


def _row_stride(tensor: torch.Tensor, rows: int, columns: int) -> int:
    """Checked, because the kernel trusts its sizes: a wrong plan must not reach outside of a tensor."""
    if tensor.shape != (rows, columns):
        raise ValueError(f"LoRA: the plan and the layer's weights need {[rows, columns]}, not {list(tensor.shape)}")
    if tensor.is_contiguous():
        return columns
    stride: tuple[int, ...] = tensor.stride()
    if stride[1] != 1:
        raise ValueError(f"LoRA: rows must have unit stride, not {stride}")
    return stride[0]


def _select(y: torch.Tensor, weights: LoRALayerWeights) -> tuple[_Prepared, _Functions | None]:
    layer = weights.scratch.get("c")
    if layer is None or layer.version != weights.version:  # type: ignore[attr-defined]
        layer = _prepare_layer(weights)
    functions = layer.functions  # type: ignore[attr-defined]
    dtype = y.dtype
    if not y.is_cpu or (functions is not _functions and dtype not in functions):
        return layer, None  # type: ignore[return-value]
    return layer, functions[dtype]  # type: ignore[return-value]


def add_lora_(y: torch.Tensor, x: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan) -> bool:
    """C back end of ``lora.add_lora_``; False when there is no kernel for this call and nothing was done."""
    layer, functions = _select(y, weights)
    if functions is None or x.dtype != y.dtype:
        return False
    runs: Any = plan.scratch.get("c") or _prepare_plan(plan)
    rows, (inputs, outputs) = runs.sizes[0], layer.sizes
    if not x.is_contiguous() and x.stride()[-1] != 1:
        x = x.contiguous()
    y_stride, x_stride = _row_stride(y, rows, outputs), _row_stride(x, rows, inputs)
    threads = torch.get_num_threads()
    if functions.add_lora(y.data_ptr(), y_stride, x.data_ptr(), x_stride, layer.address, runs.address, threads):
        raise MemoryError("no memory for the rank intermediate of a LoRA layer")
    return True


def add_embedding_lora_(
    y: torch.Tensor, ids: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan, factor: float
) -> bool:
    """C back end of ``lora.add_embedding_lora_``; ids lie within the embedding."""
    layer, functions = _select(y, weights)
    if functions is None:
        return False
    runs: Any = plan.scratch.get("c") or _prepare_plan(plan)
    ids = ids.to(torch.int64).contiguous()
    if ids.shape != (runs.sizes[0],):
        raise ValueError(f"LoRA: the plan has {runs.sizes[0]} rows, ids {list(ids.shape)}")
    y_stride, threads = _row_stride(y, runs.sizes[0], layer.sizes[1]), torch.get_num_threads()
    pointers = (layer.address, runs.address)
    if functions.add_embedding_lora(y.data_ptr(), y_stride, ids.data_ptr(), factor, *pointers, threads):
        raise MemoryError("no memory for the rank intermediate of a LoRA layer")
    return True
