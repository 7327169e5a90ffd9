"""The files of an adapter's folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from peft_dist.core.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


@contextmanager
def open_regular(path: Path, remedy: str) -> Iterator[tuple[FileIO, int]]:
    """An unbuffered file and its size in bytes.

    Raises:
        AdapterError: the file is missing, unreadable, or not a regular file (a pipe would block for ever).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise AdapterError(f"{path.name} is missing: {remedy}") from error
    except OSError as error:
        raise AdapterError(f"{path.name} cannot be opened ({error.strerror}): {remedy}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise AdapterError(f"{path.name} is not a regular file: {remedy}")
    with FileIO(descriptor) as file:
        try:
            yield file, status.st_size
        except OSError as error:
            raise AdapterError(f"{path.name} cannot be read ({error.strerror}): {remedy}") from error


def read_exactly(file: FileIO, buffer: memoryview, name: str) -> None:
    """Fill ``buffer``. Raises AdapterError when the file ends before."""
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])
        if not count:
            raise AdapterError(f"{name} ends {len(buffer) - filled} bytes early: copy or download it again")
        filled += count
