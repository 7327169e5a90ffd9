"""How many threads torch's operators use in a thread of ours."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def use_one_thread() -> None:
    """Let torch's operators that are called in this thread run in it alone.

    Each thread that runs one in parallel gets a team of its own. With more team threads than processors, GNU OpenMP no
    longer lets them spin between two operators, and every small operator of the main thread waits for the kernel to
    wake its team: three times slower on two cores. ``torch.set_num_threads`` would change all threads to come.
    """
    runtime = _runtime()
    if runtime is not None:
        runtime.omp_set_num_threads(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """``use_one_thread`` while entered, for a thread that has a team otherwise.

    Work of many small operators gains nothing by a team, and where other programs want the same processors each of them
    waits until the system has let all threads of the team run.
    """
    runtime = _runtime()
    if runtime is None:
        yield
        return
    before = runtime.omp_get_max_threads()
    runtime.omp_set_num_threads(1)
    try:
        yield
    finally:
        runtime.omp_set_num_threads(before)


def _runtime() -> ctypes.CDLL | None:
    """What starts the teams; None where no operators run, or where another one starts them, which cannot be told."""
    # Where nobody has imported it yet, no operators run: replicas without a model do not wait for it.
    if "torch" not in sys.modules:
        return None
    import torch

    from peft_dist.kernels.cpu_build import BuildError, openmp_runtime

    # torch gives a thread its own number at the first look; ours has to come after.
    torch.get_num_threads()
    try:
        runtime = ctypes.CDLL(openmp_runtime())
        _ = runtime.omp_set_num_threads, runtime.omp_get_max_threads
    except (BuildError, OSError, AttributeError):
        return None
    return runtime
