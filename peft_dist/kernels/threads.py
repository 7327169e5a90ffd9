"""How many threads torch's operators use in a thread of ours."""

from __future__ import annotations

import ctypes
import sys


def use_one_thread() -> None:
    """Let torch's operators that are called in this thread run in it alone.

    Each thread that runs one in parallel gets a team of its own. With more team threads than processors, GNU OpenMP no
    longer lets them spin between two operators, and every small operator of the main thread waits for the kernel to
    wake its team: three times slower on two cores. ``torch.set_num_threads`` would change all threads to come.
    """
    # Where nobody has imported it yet, no operators run: replicas without a model do not wait for it.
    if "torch" not in sys.modules:
        return
    import torch

    from peft_dist.kernels.cpu_build import BuildError, openmp_runtime

    # torch gives a thread its own number at the first look; ours has to come after.
    torch.get_num_threads()
    try:
        ctypes.CDLL(openmp_runtime()).omp_set_num_threads(1)
    except (BuildError, OSError, AttributeError):
        return  # Another runtime, which has no such teams or cannot be told.
