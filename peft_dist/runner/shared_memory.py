"""Host memory that another process of this host can read, and that no death can leave behind."""

from __future__ import annotations

import mmap
import os
import secrets
import weakref

import torch

# Before the contents, which are then aligned for every element type: a page.
_HEADER = mmap.PAGESIZE


class MemoryGoneError(Exception):
    """The memory cannot be opened (any more)."""


class SharedMemory:
    """Anonymous memory (a memfd): it has no name, so it goes with the last process that has it open, however that ends.

    Nor does it count against the size of /dev/shm. Others open it through the owner's entry in /proc.

    Attributes:
        token: Stands in the header. A process id, or a descriptor, may mean something else by the time it is used.
        contents: uint8 ``[num_bytes]``.
    """

    def __init__(self, num_bytes: int) -> None:
        """Raises OSError when there is no memory."""
        self.token = secrets.token_hex(16)
        self.descriptor = os.memfd_create("peft-dist-kv", os.MFD_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, _HEADER + num_bytes)
        memory = mmap.mmap(self.descriptor, _HEADER + num_bytes)
        memory[: len(self.token)] = self.token.encode()
        self.contents = torch.frombuffer(memory, dtype=torch.uint8, offset=_HEADER, count=num_bytes)


def open_memory(pid: int, descriptor: int, token: str, num_bytes: int) -> torch.Tensor:
    """The contents of another process's ``SharedMemory``: uint8 ``[num_bytes]``, good also when that process ends.

    Raises:
        MemoryGoneError: the process has ended, or has let it go, or is not on this host.
    """
    try:
        opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise MemoryGoneError(f"memory of process {pid} cannot be opened: {error.strerror}") from error
    try:
        found, contents = map_memory(opened, num_bytes)
    finally:
        os.close(opened)
    if not found.startswith(token.encode()):
        raise MemoryGoneError(f"descriptor {descriptor} of process {pid} is something else by now")
    return contents


def map_memory(descriptor: int, num_bytes: int) -> tuple[bytes, torch.Tensor]:
    """What begins with the token, and the contents, of a ``SharedMemory`` by its open file, which may be closed then.

    Raises:
        MemoryGoneError: it is none of this size.
    """
    if os.fstat(descriptor).st_size != _HEADER + num_bytes:
        raise MemoryGoneError(f"descriptor {descriptor} is something else by now")
    # Private, so that torch may take it for writable.
    memory = mmap.mmap(descriptor, _HEADER + num_bytes, access=mmap.ACCESS_COPY)
    return memory[:_HEADER], torch.frombuffer(memory, dtype=torch.uint8, offset=_HEADER, count=num_bytes)
