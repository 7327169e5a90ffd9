"""Processes that end with whoever started them, however that ends, and with all that they started themselves.

A GPU's memory is free again only when the last of an engine's processes has ended, and torchrun gives its ranks
sessions of their own, which no signal to a group reaches. So a keeper stands between, to which orphans below it fall.
As a program (``python -I kept_process.py DESCRIPTOR COMMAND...``) this is the keeper.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

# PR_SET_CHILD_SUBREAPER of <linux/prctl.h>.
_ADOPT_ORPHANS = 36
# The keeper itself may be killed.
_TETHER = Path(__file__).parents[2] / "peft_dist" / "worker" / "tether.py"


class KeptProcess:
    """A command under way in a session of its own.

    Attributes:
        stdout: What it and its descendants write, until the last of them has ended.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        lifeline, self._lifeline = os.pipe()
        keeper = [sys.executable, "-I", __file__, str(lifeline), *command]
        try:
            self._process = subprocess.Popen(
                keeper, stdout=subprocess.PIPE, text=True, start_new_session=True, env=env, pass_fds=[lifeline]
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(lifeline)
        self._lock = threading.Lock()
        self._is_told = False
        assert self._process.stdout is not None
        self.stdout: TextIO = self._process.stdout

    @property
    def returncode(self) -> int | None:
        """Of the command; None while it runs, 1 where ``end`` came first."""
        return self._process.poll()

    def wait(self) -> int:
        """Its status; what it left behind has ended too."""
        code = self._process.wait()
        self._let_go()
        return code

    def end(self) -> None:
        """Kill it and its descendants, and wait until they have ended. For any thread, more than once too."""
        self._let_go()
        self._process.wait()

    def _let_go(self) -> None:
        with self._lock:
            if not self._is_told:
                self._is_told = True
                os.close(self._lifeline)


def descendants(ancestor: int) -> list[int]:
    """Processes below this one, whatever their sessions."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # It may have ended meanwhile.
        with contextlib.suppress(OSError):
            # The name in parentheses may hold anything.
            parent = int(stat.read_bytes().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = children.get(ancestor, [])
    for process in found:
        found += children.get(process, [])
    return found


def end_descendants() -> None:
    """Kill all processes below this one, which adopts their orphans, and wait for them."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for process in descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            os.waitpid(-1, 0)


def keep(lifeline: int, command: Sequence[str]) -> int:
    """Run a command until it ends, or until nobody holds the other end of ``lifeline``; its status."""
    ctypes.CDLL(None).prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)
    child = subprocess.Popen([sys.executable, "-I", str(_TETHER), *command])

    is_over = threading.Event()

    def watch() -> None:
        os.read(lifeline, 1)
        is_over.set()
        end_descendants()
        os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = child.wait()
    if is_over.is_set():
        # Whoever collected it first, this is no end of its own.
        watcher.join()
    end_descendants()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2:]))
