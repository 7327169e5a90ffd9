"""Has a process end with the one that started it, also while it is stopped: then no lifeline tells it anything.

As a program (``python -I tether.py COMMAND...``) it becomes the command, which ends so. It imports nothing of ours, for
it stands before each launch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# PR_SET_PDEATHSIG of <linux/prctl.h>.
_SET_PARENT_DEATH_SIGNAL = 1


def end_with_parent() -> None:
    """Have the system kill this process when the thread that started it has ended; also what it becomes by ``exec``."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
