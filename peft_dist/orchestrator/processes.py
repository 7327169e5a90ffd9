"""The replicas' processes, by replica."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping

from peft_dist.orchestrator.replica_process import ReplicaLauncher, ReplicaProcess


class Processes:
    """Starts and ends one process group for each replica; never two of one replica at the same time."""

    def __init__(self, launcher: ReplicaLauncher, endpoint: str, left: Mapping[int, ReplicaProcess]) -> None:
        """``left``: What runs already."""
        self._launcher = launcher
        self._endpoint = endpoint
        self._running = dict(left)

    def __contains__(self, replica_id: int) -> bool:
        """Whether a process of it was ever started here, or left."""
        return replica_id in self._running

    async def start(self, replica_id: int, epoch: int) -> None:
        """Raises OSError when it cannot be started."""
        self._running[replica_id] = await self._launcher.start(self._endpoint, replica_id, epoch)

    async def restart(self, replica_id: int, epoch: int) -> None:
        """Start a replica once its last process, which has been told to, has ended: both would not fit the device.

        Raises OSError when it cannot be started."""
        if (earlier := self._running.get(replica_id)) is not None:
            with contextlib.suppress(OSError):
                await earlier.wait()
        await self.start(replica_id, epoch)

    async def end(self, replica_id: int) -> str:
        """Wait until a replica has ended; returns how, in words."""
        try:
            code = await self._running[replica_id].wait()
        except OSError as error:
            return f"has no process: {error}"
        if code is None:
            return "has ended"
        if code == 1:
            # That of accelerate, too, for a worker that was killed.
            return "exited with status 1 (if it logged nothing, it was killed, perhaps for want of memory: see dmesg)"
        return f"exited with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"

    async def stop(self, replica_id: int, grace: float) -> None:
        """Let a replica end by itself within ``grace`` seconds, or make it end."""
        if (process := self._running.get(replica_id)) is not None:
            await process.stop(grace)

    def kill(self, replica_id: int) -> None:
        """End a replica that does not listen."""
        if (process := self._running.get(replica_id)) is not None:
            process.kill()

    async def stop_all(self, grace: float) -> None:
        await asyncio.gather(*(process.stop(grace) for process in self._running.values()))
