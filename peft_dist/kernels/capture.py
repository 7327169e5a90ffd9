"""Work on a GPU that is recorded once and replayed: Python launches one thing instead of some hundred kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a function on fixed memory once, and returns what runs it again on what lies there then."""


class CudaCapture:
    """``Capture`` by CUDA graphs that share one pool of memory: no two of them run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Kernels are compiled, libraries take their workspace.
            run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on loading adapters meanwhile, with calls that a capture of everything would not survive.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay
