"""How many threads torch's operators use in a thread of ours."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def use_one_thread() -> None:
    """Let torch's operators that are called in this thread run in it alone.

    Each thread that runs one in parallel gets a team of its own. With more team threads than processors, GNU OpenMP no
    longer lets them spin between two operators, and every small operator of the main thread waits for the kernel to
    wake its team: three times slower on two cores. ``torch.set_num_threads`` would change all threads to come.
    """
    _use_threads(1, 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """``use_one_thread`` while entered, for a thread that has a team otherwise.

    Work of many small operators gains nothing by a team, and where other programs want the same processors each of them
    waits until the system has let all threads of the team run.
    """
    before = _use_threads(1, 1)
    try:
        yield
    finally:
        _use_threads(*before)


def _use_threads(operators: int | None, products: int | None) -> tuple[int | None, int | None]:
    """What torch's own loops, and its library of products, use in this thread from now on; and what they used before.

    None is left as it is: where no operators run, or where they cannot be told.
    """
    # Where nobody has imported it yet, no operators run: replicas without a model do not wait for it.
    if "torch" not in sys.modules:
        return None, None
    import torch

    from peft_dist.kernels.cpu_build import BuildError, openmp_runtime

    # torch gives a thread its own number at the first look; ours has to come after.
    before: int | None = torch.get_num_threads()
    try:
        if operators is not None:
            ctypes.CDLL(openmp_runtime()).omp_set_num_threads(operators)
    except (BuildError, OSError, AttributeError):
        before = None  # Another runtime, which has no such teams or cannot be told.
    return before, _use_for_products(products)


def _use_for_products(threads: int | None) -> int | None:
    """As ``_use_threads``, of MKL: once ``torch.set_num_threads`` was called, it goes by the number given there."""
    import torch

    try:
        tell = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
    # 0, which is what threads begin with: as all do.
    return None if threads is None else int(tell(threads))
