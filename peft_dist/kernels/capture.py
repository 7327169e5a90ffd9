"""Work on a GPU that is recorded once and replayed: Python launches one thing instead of some hundred kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a function on fixed memory once, and returns what runs it again on what lies there then."""


class NotCapturableError(RuntimeError):
    """What was to be recorded would be wrong in the next replay, or cannot be recorded at all."""


class CudaCapture:
    """``Capture`` by CUDA graphs that share one pool of memory: no two of them run at the same time.

    Raises:
        NotCapturableError: (the first call) the function waits for the device. Later ones are of the same model, while
            other threads may be at work, whose waiting would be taken for the function's.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # Before what runs beside it (``PartsBeside``), behind what comes first (``ShrinkBeside``).
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._is_checked = False

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Kernels are compiled, libraries take their workspace.
            run()
            if not self._is_checked:
                refuse_waiting(run)
                self._is_checked = True
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on loading adapters meanwhile, with calls that a capture of everything would not survive.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay


def refuse_waiting(run: Callable[[], None]) -> None:
    """Run it; a capture that fails because it waits for the device cripples the allocator.

    By warnings, because errors would reach all other threads.

    Raises:
        NotCapturableError: it waits for the device.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [warning for warning in found if "synchronizing CUDA operation" in str(warning.message)]
    if waits:
        raise NotCapturableError(f"the model waits for the device ({waits[0].filename}:{waits[0].lineno})")
