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


class StateFolder:
    """One server at a time: it is locked as long as this process lives, or until it is closed."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ConfigError: another server uses the folder, or it cannot be used.
        """
        self.path = path.absolute()
        if not hasattr(os, "pidfd_open"):
            raise ConfigError("--state-dir needs Linux 5.3 or newer: serve without it")
        if len(os.fsencode(self.path / _SOCKET)) > _LONGEST_SOCKET:
            raise ConfigError(f"state folder {self.path}: its path is too long for a Unix socket, give a shorter one")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(self.path)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"state folder {self.path} cannot be used ({error}): give --state-dir another") from error
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


def default_state_folder(port: int) -> Path | None:
    """Where a server of this port keeps its state if it is not told: below the user's runtime folder.

    None where there is no fixed port to know it by, or processes cannot be waited for that are not children.
    """
    if not port or not hasattr(os, "pidfd_open"):
        return None
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) / "peft-dist" if runtime else Path(tempfile.gettempdir()) / f"peft-dist-{os.getuid()}"
    return base / str(port)


def _check_private(folder: Path) -> None:
    """Whoever can enter could speak to the orchestrator, and have it take any process for a replica."""
    for path in (folder.parent, folder):
        found = path.stat()
        is_sticky = bool(found.st_mode & stat.S_ISVTX)
        if found.st_uid not in (os.getuid(), 0) or (found.st_mode & 0o022 and not is_sticky):
            raise ConfigError(f"state folder {folder}: others can write to {path}, give --state-dir one of yours alone")
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise ConfigError(f"state folder {folder}: it must be yours alone (chmod 700), or give --state-dir another")
