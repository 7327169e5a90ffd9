"""Workers that a server of an earlier life started: recorded, found again, waited for and ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from peft_dist.worker.state_folder import StateFolder
from peft_dist.worker.status import told_status

logger = logging.getLogger(__name__)
_RECORD = "process.json"
_TERMINATE_SECONDS = 5.0
Launch = dict[str, Any]
"""All that a launch was told, of types that JSON knows."""


class _Record(msgspec.Struct):
    """Of the process that leads a launch. ``started``: As in ``started_at``, so that another of its number is seen."""

    pid: int
    started: str
    launch: Launch


def started_at(pid: int) -> str | None:
    """When a process of this host began, unlike any other of its number; None when there is none."""
    try:
        # Its name, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, ticks = fields[0], fields[19]
    return None if state in "ZX" else f"{boot} {ticks}"


def record(folder: Path, pid: int, launch: Launch) -> None:
    """Note in the folder of a launch which process it became."""
    content = msgspec.json.encode(_Record(pid, started_at(pid) or "", launch))
    part = folder / f".{_RECORD}"
    part.write_bytes(content)
    part.replace(folder / _RECORD)


class Survivor:
    """A launch that is no child of this process: the same as ``LaunchedReplica`` otherwise."""

    def __init__(self, pid: int, pidfd: int, folder: Path) -> None:
        """``pidfd``: Of the process ``pid``, which leads its group; closed at its end."""
        self.pid = pid
        self._pidfd = pidfd
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[int | None] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._ended)

    async def wait(self) -> int | None:
        """What its worker told as exit status when it has ended, None if nothing."""
        return await asyncio.shield(self._end)

    async def stop(self, grace: float) -> None:
        """Wait ``grace`` seconds for its end, then terminate it, then kill it."""
        for seconds, number in ((grace, signal.SIGTERM), (_TERMINATE_SECONDS, signal.SIGKILL)):
            await asyncio.wait([self._end], timeout=seconds)
            if self._end.done():
                return
            self._signal(number)
        await self.wait()

    def kill(self) -> None:
        """End it at once, also when it is stopped. Nothing happens when it has ended."""
        if not self._end.done():
            self._signal(signal.SIGKILL)

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # What the launcher left behind when it was killed itself.
        self._signal(signal.SIGKILL)
        status = told_status(self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._end.set_result(status)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


async def find_survivors(state: StateFolder, launches: Mapping[int, Launch]) -> dict[int, Survivor]:
    """The replicas of an earlier life that run as they would be launched now; all others are ended.

    ``launches``: How each replica that is wanted would be.
    """
    kept, ending = {}, []
    for replica_id in state.replicas():
        found, launch = _find(state.of_replica(replica_id))
        if found is None:
            state.forget(replica_id)
            continue
        reason = _misfit(launch, launches.get(replica_id))
        if reason is None:
            kept[replica_id] = found
            continue
        logger.warning("replica %d of the last life is ended, not adopted: %s", replica_id, reason)
        ending.append(found.stop(0.0))
    await asyncio.gather(*ending)
    return kept


def _find(folder: Path) -> tuple[Survivor | None, Launch]:
    try:
        found = msgspec.json.decode((folder / _RECORD).read_bytes(), type=_Record)
        pidfd = os.pidfd_open(found.pid)
    except (OSError, msgspec.MsgspecError):
        return None, {}
    # After it was opened: from now on this number is of no other process.
    if started_at(found.pid) != found.started:
        os.close(pidfd)
        return None, {}
    return Survivor(found.pid, pidfd, folder), found.launch


def _misfit(was: Launch, wanted: Launch | None) -> str | None:
    """Why a launch is not what is wanted; None where it is."""
    if wanted is None:
        return "fewer replicas are asked for now"
    before, now = dict(_flat(was)), dict(_flat(wanted))
    different = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if not different:
        return None
    return ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in different)


def _flat(launch: Launch, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in launch.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
