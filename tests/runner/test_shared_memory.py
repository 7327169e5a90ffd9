"""Memory that goes from process to process, and what is left of it when one of them is killed."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_dist.runner.shared_memory import MemoryGoneError, SharedMemory, open_memory

# As ``SharedMemory`` lays it out, without torch.
OWNER = f"""
import mmap, os, sys
descriptor = os.memfd_create("peft-dist-kv")
os.ftruncate(descriptor, {mmap.PAGESIZE} + 5)
memory = mmap.mmap(descriptor, {mmap.PAGESIZE} + 5)
memory[:5], memory[{mmap.PAGESIZE}:] = b"token", b"abcde"
print(descriptor, flush=True)
sys.stdin.read()
"""


def open_files() -> set[int]:
    """Inodes of what this process has open: other tests' files come and go beside the one that is looked for."""
    inodes = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            inodes.add(descriptor.stat().st_ino)
    return inodes


def mapped_files() -> set[int]:
    """Inodes of the files that this process has mapped."""
    return {int(line.split()[4]) for line in Path("/proc/self/maps").read_text().splitlines()}


def test_another_process_can_be_killed_once_its_memory_is_open() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        descriptor = int(owner.stdout.readline())
        for wrong in [("other", 5), ("token", 6)]:
            with pytest.raises(MemoryGoneError, match="something else"):
                open_memory(owner.pid, descriptor, *wrong)
        contents = open_memory(owner.pid, descriptor, "token", 5)
        owner.kill()
    assert bytes(contents.numpy()) == b"abcde"
    with pytest.raises(MemoryGoneError, match="cannot be opened"):
        open_memory(owner.pid, descriptor, "token", 5)


def test_what_is_written_is_read_and_let_go_with_its_object() -> None:
    memory = SharedMemory(1 << 20)
    memory.contents.view(torch.int32).copy_(torch.arange(1 << 18))
    contents = open_memory(os.getpid(), memory.descriptor, memory.token, 1 << 20)
    assert torch.equal(contents, memory.contents)
    contents[0] = 9
    assert memory.contents[0] == 0, "the reader's own changes are its own"
    pid, descriptor, token = os.getpid(), memory.descriptor, memory.token
    file = os.fstat(descriptor).st_ino
    assert file in open_files() and file in mapped_files()
    del memory, contents
    gc.collect()
    assert file not in open_files() and file not in mapped_files()
    with pytest.raises(MemoryGoneError):
        open_memory(pid, descriptor, token, 1 << 20)
