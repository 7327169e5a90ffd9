"""Memory that goes from process to process, and what is left of it when one of them is killed."""

from __future__ import annotations

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
    before = len(list(Path("/proc/self/fd").iterdir()))
    memory = SharedMemory(1 << 20)
    memory.contents.view(torch.int32).copy_(torch.arange(1 << 18))
    contents = open_memory(os.getpid(), memory.descriptor, memory.token, 1 << 20)
    assert torch.equal(contents, memory.contents)
    contents[0] = 9
    assert memory.contents[0] == 0, "the reader's own changes are its own"
    pid, descriptor, token = os.getpid(), memory.descriptor, memory.token
    del memory, contents
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(MemoryGoneError):
        open_memory(pid, descriptor, token, 1 << 20)
