"""The tensors of an adapter's file: names and shapes first, bytes only once those are known to fit."""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import torch

from peft_dist.core.errors import AdapterError, UnfitAdapterError
from peft_dist.kernels.pinned import HostBuffer
from peft_dist.runner.adapter_files import PICKLE_NAME, SAFETENSORS_NAME, open_regular, read_exactly

MAX_HEADER_BYTES = 100_000_000
# A multiple of every type's size.
PIECE_BYTES = 1 << 20

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DAMAGED = "copy or download the file again"
# What torch.load raises on damaged or forbidden content, depending on where the damage is.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    OSError,
    struct.error,
)

Count = Annotated[int, msgspec.Meta(ge=0)]


class NotFiniteError(Exception):
    """A tensor holds NaN or an infinity."""


class WeightsFile(Protocol):
    """An open file of weights."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor, by name."""
        ...

    def read(self, pin_memory: bool = False) -> dict[str, torch.Tensor]:
        """All tensors, by name, each contiguous; float32, float16 or bfloat16. Raises AdapterError."""
        ...

    def all_finite(self) -> bool:
        """Whether no tensor read holds NaN or an infinity."""
        ...

    def stream(self, names: Iterable[str]) -> Iterator[memoryview]:
        """The bytes of the tensors read, each in row-major order, one after the other in as few views as they lie."""
        ...


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


@contextmanager
def open_weights(folder: Path, allow_pickle: bool) -> Iterator[WeightsFile]:
    """The folder's safetensors file, or with ``allow_pickle`` its ``.bin`` where there is no other.

    Raises:
        AdapterError: no such file, a pickle that is not allowed, a damaged file, or an unsupported type of numbers.
    """
    if (folder / SAFETENSORS_NAME).exists():
        with open_regular(folder / SAFETENSORS_NAME, _DAMAGED) as (file, size):
            yield SafetensorsFile(file, size)
    elif not (folder / PICKLE_NAME).exists():
        raise AdapterError(
            f"{SAFETENSORS_NAME} is missing: save the adapter with PEFT's save_pretrained (a repository that holds "
            f"only {PICKLE_NAME} needs --allow-pickle)"
        )
    elif not allow_pickle:
        raise AdapterError(
            f"{PICKLE_NAME} is a pickle, which can run code when it is read: convert it to {SAFETENSORS_NAME}, or "
            "allow pickles with --allow-pickle (allow_pickle=True) if you trust where it comes from"
        )
    else:
        yield PickleFile(folder / PICKLE_NAME)


class SafetensorsFile:
    """A safetensors file. Raises AdapterError when its header does not describe exactly the bytes that follow."""

    def __init__(self, file: FileIO, size: int) -> None:
        self._file = file
        self._entries, data_start = _read_header(file, size)
        self._data_start, self._num_bytes = data_start, size - data_start
        self._data = memoryview(b"")
        self._flat: dict[torch.dtype, torch.Tensor] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        _check_layout(self._entries, self._num_bytes)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, pin_memory: bool = False) -> dict[str, torch.Tensor]:
        buffer = HostBuffer(self._num_bytes)
        data = buffer.tensor
        self._data = memoryview(data.numpy())
        read_exactly(self._file, self._data, SAFETENSORS_NAME)
        if pin_memory:
            buffer.lock()
        for dtype in {_DTYPES[entry.dtype] for entry in self._entries.values()}:
            self._flat[dtype] = data[: self._num_bytes // dtype.itemsize * dtype.itemsize].view(dtype)
        self._tensors = {name: self._view(data, entry) for name, entry in self._entries.items()}
        return self._tensors

    def all_finite(self) -> bool:
        if len(self._flat) == 1:
            return is_finite(*self._flat.values())
        return all(is_finite(tensor) for tensor in self._tensors.values())

    def stream(self, names: Iterable[str]) -> Iterator[memoryview]:
        return (self._data[first:last] for first, last in self._ranges(names))

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._entries[name].dtype]

    def scan(self, names: Iterable[str]) -> Iterator[memoryview]:
        """What ``stream`` gives, read piece by piece and not kept; all tensors of the file must be of one type.

        Raises:
            NotFiniteError: there is NaN or an infinity among the bytes.
            AdapterError: the file cannot be read.
        """
        (dtype,) = {_DTYPES[entry.dtype] for entry in self._entries.values()}
        for first, last in self._ranges(names):
            self._file.seek(self._data_start + first)
            for start in range(first, last, PIECE_BYTES):
                piece = bytearray(min(PIECE_BYTES, last - start))
                read_exactly(self._file, memoryview(piece), SAFETENSORS_NAME)
                if not is_finite(torch.frombuffer(piece, dtype=dtype)):
                    raise NotFiniteError
                yield memoryview(piece)

    def read_one(self, name: str) -> torch.Tensor:
        """One tensor by itself. Raises AdapterError when the file cannot be read."""
        entry = self._entries[name]
        first, last = entry.data_offsets
        data = bytearray(last - first)
        self._file.seek(self._data_start + first)
        read_exactly(self._file, memoryview(data), SAFETENSORS_NAME)
        return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).view(entry.shape)

    @property
    def is_of_one_type(self) -> bool:
        return len({entry.dtype for entry in self._entries.values()}) == 1

    def _ranges(self, names: Iterable[str]) -> Iterator[tuple[int, int]]:
        """Where the bytes of these tensors are, those that stand one after the other as one."""
        first = last = 0
        for name in names:
            start, end = self._entries[name].data_offsets
            if start != last:
                if last > first:
                    yield first, last
                first = start
            last = end
        if last > first:
            yield first, last

    def _view(self, data: torch.Tensor, entry: _Entry) -> torch.Tensor:
        dtype, (start, end) = _DTYPES[entry.dtype], entry.data_offsets
        if start % dtype.itemsize:
            return data[start:end].clone().view(dtype).view(entry.shape)
        flat, offset = self._flat[dtype], start // dtype.itemsize
        if len(entry.shape) == 2:
            return flat.as_strided(entry.shape, (entry.shape[1], 1), offset)
        return flat[offset : end // dtype.itemsize].view(entry.shape)


class PickleFile:
    """A file written by torch.save, read without running code it may hold."""

    def __init__(self, path: Path) -> None:
        with open_regular(path, _DAMAGED):
            self._tensors = _unpickle(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, pin_memory: bool = False) -> dict[str, torch.Tensor]:
        self._tensors = {name: tensor.contiguous() for name, tensor in self._tensors.items()}
        if pin_memory:
            self._tensors = in_one_buffer(self._tensors, pin_memory=True)
        return self._tensors

    def all_finite(self) -> bool:
        return all(is_finite(tensor) for tensor in self._tensors.values())

    def stream(self, names: Iterable[str]) -> Iterator[memoryview]:
        return (memoryview(self._tensors[name].view(-1).view(torch.uint8).numpy()) for name in names)


def in_one_buffer(tensors: Mapping[str, torch.Tensor], *, pin_memory: bool) -> dict[str, torch.Tensor]:
    """Copies, in memory that is locked for GPUs where ``pin_memory`` says so."""
    starts, end = {}, 0
    for name, tensor in tensors.items():
        starts[name], end = end, end + -(-tensor.nbytes // 8) * 8
    buffer = HostBuffer(end)
    copies = {}
    for name, tensor in tensors.items():
        part = buffer.tensor[starts[name] : starts[name] + tensor.nbytes]
        copies[name] = part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    if pin_memory:
        buffer.lock()
    return copies


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite, in one pass without a temporary."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite()) and bool(high.isfinite())


def _read_header(file: FileIO, size: int) -> tuple[dict[str, _Entry], int]:
    prefix = bytearray(8)
    read_exactly(file, memoryview(prefix), SAFETENSORS_NAME)
    length = struct.unpack("<Q", prefix)[0]
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise AdapterError(f"{SAFETENSORS_NAME} claims a header of {length} bytes in a file of {size}: {_DAMAGED}")
    text = bytearray(length)
    read_exactly(file, memoryview(text), SAFETENSORS_NAME)
    try:
        header = msgspec.json.decode(text, type=dict[str, Any])
        header.pop("__metadata__", None)
        return msgspec.convert(header, dict[str, _Entry]), 8 + length
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise AdapterError(f"{SAFETENSORS_NAME} has a damaged header ({error}): {_DAMAGED}") from error


def _check_layout(entries: Mapping[str, _Entry], num_bytes: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in _DTYPES:
            raise _unsupported_type(name, entry.dtype)
        start, stop = entry.data_offsets
        if start != end or stop - start != math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize:
            raise AdapterError(f"{SAFETENSORS_NAME}: the bytes of {name} are not where its shape says: {_DAMAGED}")
        end = stop
    if end != num_bytes:
        raise AdapterError(f"{SAFETENSORS_NAME} holds {num_bytes} bytes of tensors, its header says {end}: {_DAMAGED}")


def _unsupported_type(name: str, dtype: str) -> UnfitAdapterError:
    return UnfitAdapterError(
        f"tensor {name} has type {dtype}, which is not supported: save the adapter as float32, bfloat16 or float16"
    )


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNPICKLING_ERRORS as error:
        raise AdapterError(f"{path.name} cannot be read ({error}): {_DAMAGED}") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise AdapterError(f"{path.name} holds more than named tensors: save the adapter with PEFT's save_pretrained")
    for name, tensor in content.items():
        if tensor.layout is not torch.strided:
            raise UnfitAdapterError(f"tensor {name} is sparse: save the adapter with PEFT's save_pretrained")
        if tensor.dtype not in _DTYPES.values():
            raise _unsupported_type(name, str(tensor.dtype).removeprefix("torch."))
    return content
