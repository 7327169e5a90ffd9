"""A folder in which a server leaves what its next life needs to find the workers again."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from peft_dist.core.errors import ConfigError

# sizeof(sun_path) of <linux/un.h>, less the byte that ends it.
_LONGEST_SOCKET = 107
_SOCKET = "orchestrator"


class UnusableFolderError(ConfigError):
    """State cannot be kept there."""


class StateFolder:
    """One server at a time: it is locked as long as this process lives, or until it is closed."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UnusableFolderError: nothing can be kept there.
            ConfigError: another server uses the folder.
        """
        self.path = path.absolute()
        if not hasattr(os, "pidfd_open"):
            raise UnusableFolderError("workers outlive a server on Linux 5.3 or newer only: leave out --state-dir")
        if len(os.fsencode(self.path / _SOCKET)) > _LONGEST_SOCKET:
            raise UnusableFolderError(f"state folder {self.path}: too long for the path of a Unix socket")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(self.path)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UnusableFolderError(
                f"state folder {self.path} cannot be used ({error}): give --state-dir another"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._lock, 32).decode(errors="replace").strip()
            os.close(self._lock)
            raise ConfigError(
                f"state folder {self.path} is in use by another server (process {owner}): stop that one, or give "
                "--state-dir another folder"
            ) from error
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())

    @property
    def socket(self) -> Path:
        """Where the workers reach the orchestrator."""
        return self.path / _SOCKET

    def of_replica(self, replica_id: int) -> Path:
        """Where the launch of a replica keeps its files."""
        return self.path / f"replica-{replica_id}"

    def replicas(self) -> list[int]:
        """Those of which there are files."""
        names = (path.name.removeprefix("replica-") for path in self.path.glob("replica-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def forget(self, replica_id: int) -> None:
        """Remove the files of a replica."""
        shutil.rmtree(self.of_replica(replica_id), ignore_errors=True)

    def close(self) -> None:
        """Let another server have it."""
        os.close(self._lock)


def default_path(port: int) -> Path | None:
    """Where a server of this port keeps its state if it is not told: below the user's runtime folder.

    None where there is no fixed port to know it by.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) / "peft-dist" if runtime else Path(tempfile.gettempdir()) / f"peft-dist-{os.getuid()}"
    return base / str(port) if port else None


def _check_private(folder: Path) -> None:
    """Whoever can enter could speak to the orchestrator, and have it take any process for a replica."""
    own, parent = folder.stat(), folder.parent.stat()
    # Others could put another folder in its place, unless each may move but his own there.
    is_open = bool(parent.st_mode & 0o022) and not parent.st_mode & stat.S_ISVTX
    if own.st_uid != os.getuid() or own.st_mode & 0o077 or is_open or parent.st_uid not in (os.getuid(), 0):
        raise UnusableFolderError(
            f"state folder {folder}: others can enter or replace it, give one that is yours alone (chmod 700)"
        )
