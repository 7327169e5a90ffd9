"""LoRA through the C kernels: one call for a layer; addresses are prepared once a plan and once a weights version."""

from __future__ import annotations

import ctypes
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
    """``address`` of a struct; ``kept`` keeps alive what it points to; ``sizes`` are checked against each call."""

    address: int
    version: int
    sizes: tuple[int, int]
    kept: Any


_functions: dict[torch.dtype, Any] = {}


def function_for(dtype: torch.dtype) -> Any:
    """The compiled entry for activations of this type, built if need be; None when there is none."""
    if dtype not in _functions:
        library = cpu_build.library(dtype)
        _functions[dtype] = _bind(library) if library else None
    return _functions[dtype]


def _bind(library: ctypes.PyDLL) -> Any:
    function = library.pd_add_lora
    pointer, stride = ctypes.c_void_p, ctypes.c_int64
    of_tensors = (pointer, stride, pointer, stride, pointer)
    function.argtypes = (*of_tensors, ctypes.c_float, pointer, pointer, ctypes.c_int)
    return function


def takes(y: torch.Tensor, weights: LoRALayerWeights) -> bool:
    """Whether the C kernels can add these adapters to y: on CPU, adapters in float32 or of y's own type."""
    pool_dtype = weights.A.dtype
    return y.is_cpu and (pool_dtype == torch.float32 or pool_dtype == y.dtype)


def _layer(weights: LoRALayerWeights) -> _Prepared:
    prepared = weights.scratch.get("c")
    if prepared is None or prepared.version != weights.version:  # type: ignore[attr-defined]
        arrays = [np.ascontiguousarray(weights.row_start, np.int32), np.ascontiguousarray(weights.rank, np.int32)]
        arrays.append(np.ascontiguousarray(weights.scaling, np.float32))
        A, B = weights.A.contiguous(), weights.B.contiguous()
        struct = _LayerStruct(
            *(A.data_ptr(), B.data_ptr(), *(array.ctypes.data for array in arrays), A.shape[1], B.shape[1]),
            *(len(weights.rank), A.dtype != torch.float32),
        )
        sizes = (A.shape[1], B.shape[1])
        prepared = _Prepared(ctypes.addressof(struct), weights.version, sizes, (struct, arrays, A, B))
        weights.scratch["c"] = prepared
    return prepared  # type: ignore[return-value]


def _plan(plan: LoRAPlan) -> _Prepared:
    prepared = plan.scratch.get("c")
    if prepared is None:
        arrays = [np.ascontiguousarray(plan.slots, np.int32), np.ascontiguousarray(plan.starts, np.int32)]
        struct = _PlanStruct(arrays[0].ctypes.data, arrays[1].ctypes.data, len(plan.slots))
        prepared = _Prepared(ctypes.addressof(struct), 0, (plan.num_rows, 0), (struct, arrays))
        plan.scratch["c"] = prepared
    return prepared  # type: ignore[return-value]


def _check_output(y: torch.Tensor, layer: _Prepared, plan: _Prepared) -> None:
    """The kernel trusts its sizes: a wrong plan must not write outside of y."""
    if y.shape != (plan.sizes[0], layer.sizes[1]) or y.stride(1) != 1:
        raise _misfit(y, layer, plan)


def _misfit(tensor: torch.Tensor, layer: _Prepared, plan: _Prepared) -> ValueError:
    return ValueError(
        f"a LoRA plan of {plan.sizes[0]} rows and a layer {layer.sizes[0]} -> {layer.sizes[1]} do not fit a tensor "
        f"{list(tensor.shape)} with strides {tensor.stride()}"
    )


def add_lora_(function: Any, y: torch.Tensor, x: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan) -> None:
    """C back end of ``lora.add_lora_``; ``function`` is ``function_for(y.dtype)``, x has y's dtype."""
    layer, runs = _layer(weights), _plan(plan)
    if x.stride(1) != 1:
        x = x.contiguous()
    _check_output(y, layer, runs)
    if x.shape != (runs.sizes[0], layer.sizes[0]):
        raise _misfit(x, layer, runs)
    failed = function(
        *(y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), None, 1.0, layer.address, runs.address),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the rank intermediate of a LoRA layer")


def add_embedding_lora_(
    function: Any, y: torch.Tensor, ids: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan, factor: float
) -> None:
    """C back end of ``lora.add_embedding_lora_``. ids are int64 ``[R]`` within the embedding."""
    layer, runs = _layer(weights), _plan(plan)
    ids = ids.to(torch.int64).contiguous()
    _check_output(y, layer, runs)
    if ids.shape != (runs.sizes[0],):
        raise _misfit(ids, layer, runs)
    failed = function(
        *(y.data_ptr(), y.stride(0), None, 0, ids.data_ptr(), factor, layer.address, runs.address),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the rank intermediate of a LoRA layer")
