"""Device memory that another process can map, and that no death can leave behind or take away.

The driver's virtual memory management (CUDA's, by ctypes): an allocation lives until its last handle, mapping and open
file, in whatever process, is gone. Memory that is shared by CUDA IPC in the older way (``cudaIpcGetMemHandle``, which
is what torch passes between processes) is its owner's, and reading it after the owner's end is undefined. None of it is
torch's: neither its memory pools nor its segments, expandable or not, have anything to do with it.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from functools import cache
from typing import Any

import torch

from peft_dist.runner.shared_memory import MemoryGoneError

# Names of <cuda.h>.
_PINNED, _ON_DEVICE, _POSIX_FILE_DESCRIPTOR, _READ_WRITE = 1, 1, 1, 3
_SUPPORTS_VIRTUAL_MEMORY, _SUPPORTS_FILE_DESCRIPTORS = 102, 103


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows_only", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class _Driver:
    """Calls of libcuda, which raise MemoryGoneError with the driver's word for what failed."""

    def __init__(self) -> None:
        """Raises OSError where there is no driver."""
        self._library = ctypes.CDLL("libcuda.so.1")

    def __call__(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            word = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(word))
            raise MemoryGoneError(f"{name}: {(word.value or str(status).encode()).decode()}")


@cache
def _driver() -> _Driver:
    return _Driver()


def find_obstacle(device: torch.device) -> str | None:
    """Why memory of a device cannot be shared so; None where a first attempt has gone well."""
    if device.type != "cuda":
        return f"{device} is no GPU"
    try:
        for attribute in (_SUPPORTS_VIRTUAL_MEMORY, _SUPPORTS_FILE_DESCRIPTORS):
            found = ctypes.c_int()
            _driver()("cuDeviceGetAttribute", ctypes.byref(found), attribute, _index(device))
            if not found.value:
                return f"the driver does not offer it for {device} (attribute {attribute})"
        memory = DeviceMemory(1, device)
        opened = DeviceMemory(1, device, memory.descriptor)
        for each in (opened, memory):
            each.close()
    except (MemoryGoneError, OSError, AttributeError) as error:
        return str(error)
    return None


class DeviceMemory:
    """Device memory with an open file by which other processes can map it too.

    Attributes:
        num_bytes: That can be used.
        descriptor: Of the open file; -1 where the memory is another process's.
    """

    def __init__(self, num_bytes: int, device: torch.device, descriptor: int | None = None) -> None:
        """New memory or, with a descriptor, another process's, mapped for this device; it may be closed then.

        Raises:
            MemoryGoneError: there is no room, or this device cannot reach that memory.
        """
        self.num_bytes, self.descriptor = num_bytes, -1
        with torch.cuda.device(device):
            # Has torch make its context this thread's, which the driver's calls go by.
            torch.cuda.mem_get_info()
            self._make(device, descriptor)

    def _make(self, device: torch.device, descriptor: int | None) -> None:
        call = _driver()
        place = _Location(_ON_DEVICE, _index(device))
        properties = _Properties(_PINNED, _POSIX_FILE_DESCRIPTOR, place)
        granularity = ctypes.c_size_t()
        call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(properties), 0)
        size = ctypes.c_size_t(-(-self.num_bytes // granularity.value) * granularity.value)
        handle, self._address = ctypes.c_uint64(), ctypes.c_uint64()
        if descriptor is None:
            call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(properties), ctypes.c_uint64(0))
        else:
            call(
                "cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(descriptor),
                _POSIX_FILE_DESCRIPTOR,
            )  # fmt: skip
        try:
            if descriptor is None:
                exported = ctypes.c_int()
                call(
                    "cuMemExportToShareableHandle", ctypes.byref(exported), handle, _POSIX_FILE_DESCRIPTOR,
                    ctypes.c_uint64(0),
                )  # fmt: skip
                self.descriptor = exported.value
                os.set_inheritable(self.descriptor, False)
            self._map(handle, size, place)
        except MemoryGoneError:
            _close_file(self.descriptor)
            raise
        finally:
            # What is mapped, or has a file, stays.
            call("cuMemRelease", handle)
        self._finalizer = weakref.finalize(self, _release, self._address, size, self.descriptor)
        self._finalizer.atexit = False

    def put(self, offset: int, piece: torch.Tensor) -> None:
        """Queue a copy of a contiguous tensor of this process's device on its current stream."""
        self._copy(self._address.value + offset, piece.data_ptr(), piece)

    def get(self, offset: int, piece: torch.Tensor) -> None:
        """Queue a copy into a contiguous tensor of this process's device on its current stream."""
        self._copy(piece.data_ptr(), self._address.value + offset, piece)

    def close(self) -> None:
        """Let go; nothing that is queued may use it any more. May wait for the device."""
        self._finalizer()

    def _copy(self, target: int, source: int, piece: torch.Tensor) -> None:
        assert piece.is_contiguous(), "copies know no strides"
        stream = ctypes.c_void_p(torch.cuda.current_stream(piece.device).cuda_stream)
        addresses = ctypes.c_uint64(target), ctypes.c_uint64(source)
        _driver()("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(piece.nbytes), stream)

    def _map(self, handle: ctypes.c_uint64, size: ctypes.c_size_t, place: _Location) -> None:
        call, nothing = _driver(), ctypes.c_uint64(0)
        call("cuMemAddressReserve", ctypes.byref(self._address), size, ctypes.c_size_t(0), nothing, nothing)
        try:
            call("cuMemMap", self._address, size, ctypes.c_size_t(0), handle, nothing)
            try:
                access = _Access(place, _READ_WRITE)
                call("cuMemSetAccess", self._address, size, ctypes.byref(access), ctypes.c_size_t(1))
            except MemoryGoneError:
                call("cuMemUnmap", self._address, size)
                raise
        except MemoryGoneError:
            call("cuMemAddressFree", self._address, size)
            raise


def _release(address: ctypes.c_uint64, size: ctypes.c_size_t, descriptor: int) -> None:
    _close_file(descriptor)
    _driver()("cuMemUnmap", address, size)
    _driver()("cuMemAddressFree", address, size)


def _close_file(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)


def _index(device: torch.device) -> int:
    """The driver counts devices as torch does: those that this process may see."""
    return torch.cuda.current_device() if device.index is None else device.index
