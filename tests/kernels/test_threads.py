"""Threads that load adapters start no teams of their own, and change nobody else's number."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from peft_dist.kernels.threads import one_thread, use_one_thread


def tasks() -> set[str]:
    """Threads of this process; those of other tests may end at any moment."""
    return {task.name for task in Path("/proc/self/task").iterdir()}


def operate() -> None:
    """What a team would be for: torch's own loops, and the products of a library that counts its threads itself."""
    torch.zeros(1000, 1000).add_(1)
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)
    torch.ones(4000, 1000) @ torch.ones(1000)


def test_a_thread_on_one_thread_starts_no_team() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    found: dict[str, int] = {}
    began: set[str] = set()

    def work() -> None:
        use_one_thread()
        found["threads"] = torch.get_num_threads()
        before_work = tasks()
        operate()
        began.update(tasks() - before_work)

    try:
        torch.zeros(1000, 1000).add_(1)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert found["threads"] == 1
    assert not began


def test_one_thread_for_a_while() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    alone: set[str] = set()
    together: set[str] = set()

    def work() -> None:
        at_first = tasks()
        with one_thread():
            operate()
            with one_thread():
                pass
            operate()
            alone.update(tasks() - at_first)
        operate()
        together.update(tasks() - at_first)

    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert not alone and together
