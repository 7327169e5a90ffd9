"""Whether all ranks of a replica are alive: rank 0 alone speaks to the orchestrator, and beats on if another stands."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)

# Of a rank's beats, in those that rank 0 gives: so that one that comes late is not missed.
_OFTEN = 2
_MISSED = 1.5


class Counters(Protocol):
    """What a ``torch.distributed.TCPStore`` does here: numbers that all ranks see."""

    def add(self, key: str, amount: int, /) -> int:
        """The number under this key, with so much added."""


class RankPulse:
    """Rank 0's view of the others: each counts up, and one that stands still is silent.

    Args:
        counters: Where they count, under ``key``.
        size: Ranks, this one included.
        limit: Seconds after which a rank that does not count is silent.
        clock: Seconds from any origin, never running backwards.
    """

    def __init__(
        self, counters: Counters, size: int, limit: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._counters = counters
        self._limit = limit
        self._clock = clock
        self._heard = {rank: (0, clock()) for rank in range(1, size)}
        self._silent: list[int] = []

    def is_whole(self) -> bool:
        """Whether every rank has counted lately. Who does not is logged, once."""
        now = self._clock()
        for rank, (number, _) in self._heard.items():
            found = self._counters.add(key(rank), 0)
            if found != number:
                self._heard[rank] = found, now
        silent = [rank for rank, (_, at) in self._heard.items() if now - at > self._limit]
        if silent != self._silent:
            self._silent = silent
            if silent:
                logger.error("rank %s gives no sign of life, so this replica gives none", ", ".join(map(str, silent)))
            else:
                logger.warning("all ranks give signs of life again")
        return not silent


def key(rank: int) -> str:
    """Of the number that a rank counts up."""
    return f"beats of rank {rank}"


def count_up(counters: Counters, rank: int, seconds: float) -> None:
    """Count every so often, in a thread of its own, until the process ends or rank 0's does."""

    def run() -> None:
        while True:
            try:
                counters.add(key(rank), 1)
            except RuntimeError:  # torch's DistError among them: rank 0 is gone, and the launcher ends this one.
                return
            time.sleep(seconds)

    threading.Thread(target=run, name="rank-pulse", daemon=True).start()


def feel(rank: int, size: int, seconds: float) -> Callable[[], bool]:
    """What tells rank 0 whether all are alive; on the others, which count from now on, it says yes.

    All ranks have to come by, after they met (``torch.distributed``).

    Args:
        seconds: Between two of the replica's signs of life.
    """
    from torch import distributed as dist

    host, store, told = os.environ.get("MASTER_ADDR", "127.0.0.1"), None, [0]
    if rank == 0:
        # At the address where the ranks meet, and at no other.
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        open_at = socket.create_server((host, 0), family=family)
        told = [open_at.getsockname()[1]]
        store = dist.TCPStore(host, told[0], is_master=True, wait_for_workers=False, master_listen_fd=open_at.detach())
    dist.broadcast_object_list(told, src=0)
    if store is None:
        count_up(dist.TCPStore(host, told[0], is_master=False), rank, seconds / _OFTEN)
        return lambda: True
    return RankPulse(store, size, _MISSED * seconds).is_whole
