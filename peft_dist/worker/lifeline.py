"""Noticing that another process has ended, however it did."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable


def watch_standard_input(ended: Callable[[], None]) -> None:
    """Call back, from a thread, when standard input ends, whose other end only one process holds."""
    _watch(_read_to_the_end, sys.__stdin__.fileno() if sys.__stdin__ else 0, ended)


def watch_process(pid: int, ended: Callable[[], None]) -> None:
    """Call back, from a thread, when a process of this host, which need not be a child, has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        ended()
        return
    _watch(_wait_for_process, descriptor, ended)


def drop_broken_output() -> None:
    """Let what is printed go nowhere where nobody reads it any more: whoever prints would fail."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _watch(wait: Callable[[int], None], descriptor: int, ended: Callable[[], None]) -> None:
    def follow() -> None:
        wait(descriptor)
        ended()

    threading.Thread(target=follow, name="lifeline", daemon=True).start()


def _read_to_the_end(descriptor: int) -> None:
    while os.read(descriptor, 4096):
        pass


def _wait_for_process(pidfd: int) -> None:
    select.select([pidfd], [], [])
    os.close(pidfd)
