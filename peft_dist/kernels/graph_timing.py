"""Times what is queued on the present GPU, launched as captured steps launch it: without the host."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

Timer = Callable[[Callable[[], None]], float]
"""Milliseconds of what a function queues."""


def graph_milliseconds(run: Callable[[], None], rounds: int = 10) -> float:
    """Median time of replaying what ``run`` queues, in a CUDA graph as a captured step has it (``CudaCapture``)."""
    stream = torch.cuda.Stream(priority=-1)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    for mark in marks:
        mark.record()
        if mark is not marks[-1]:
            graph.replay()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) for a, b in pairwise(marks)]))
