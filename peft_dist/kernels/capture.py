"""Work on a GPU that is recorded once and replayed: Python launches one thing instead of some hundred kernels."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable

import torch

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a function on fixed memory once, and returns what runs it again on what lies there then."""


class NotCapturableError(RuntimeError):
    """What was to be recorded would be wrong in the next replay, or cannot be recorded at all."""


class CudaCapture:
    """``Capture`` by CUDA graphs that share one pool of memory: no two of them run at the same time.

    After an error the device has done all that was queued, the current stream is what it was, and more can be captured.

    Args:
        beside: Streams that a function forks work to and joins again, which an error may come between.

    Raises:
        NotCapturableError: (the first call) the function waits for the device. Later ones are of the same model, while
            other threads may be at work, whose waiting would be taken for the function's.
        torch.OutOfMemoryError: there is no memory to run it or to record it.
    """

    def __init__(self, device: torch.device, beside: Iterable[torch.cuda.Stream] = ()) -> None:
        self._beside = tuple(beside)
        # Before what runs beside it (``PartsBeside``), behind what comes first (``ShrinkBeside``).
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._is_checked = False
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream()
        if not self._graphs:
            # One that no graph has any more cannot be used again.
            self._pool = torch.cuda.graph_pool_handle()
        try:
            return self._record(run, current)
        except RuntimeError as error:
            # What was queued writes to memory that the next step uses, and nobody waits for it; and where the end of a
            # capture fails too, its stream stays the current one.
            torch.cuda.set_stream(current)
            torch.cuda.synchronize(current.device)
            # The driver's own, of what it keeps of a graph.
            if "out of memory" in str(error) and not isinstance(error, torch.OutOfMemoryError):
                raise torch.OutOfMemoryError(str(error)) from error
            raise

    def _record(self, run: Callable[[], None], current: torch.cuda.Stream) -> Callable[[], None]:
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
            try:
                run()
            except RuntimeError:
                self._join()
                raise
        self._graphs.add(graph)
        replay: Callable[[], None] = graph.replay
        return replay

    def _join(self) -> None:
        """End the forks that an error left open: to end a capture with one fails, and cripples the allocator."""
        for stream in self._beside:
            with torch.cuda.stream(stream):
                is_forked = torch.cuda.is_current_stream_capturing()
            if is_forked:
                self._stream.wait_stream(stream)


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
