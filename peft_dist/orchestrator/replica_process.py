"""How the service starts and ends replicas, without knowing what runs them."""

from __future__ import annotations

from typing import Protocol


class ReplicaProcess(Protocol):
    """A started replica: all processes of one launch."""

    async def wait(self) -> int | None:
        """Return code when it has ended; negative is the signal that killed it, None that nobody knows.

        Raises:
            OSError: it never started, or whatever ran it is gone.
        """
        ...

    async def stop(self, grace: float) -> None:
        """Wait ``grace`` seconds for it to end by itself, then terminate it, then kill it. Idempotent."""
        ...

    def kill(self) -> None:
        """End it at once, also when it does not listen. Nothing happens when it has ended."""
        ...


class ReplicaLauncher(Protocol):
    """Starts replicas; each launch is one ``ReplicaProcess``."""

    async def start(self, endpoint: str, replica_id: int, epoch: int) -> ReplicaProcess:
        """Start a replica that connects to ``endpoint`` and names itself by id and epoch.

        Raises OSError when it cannot be started, or lets ``wait`` of what it returns do so."""
        ...
