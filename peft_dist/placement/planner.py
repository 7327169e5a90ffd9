"""Plans without holding up the loop: one warm solver process, killed when it does not keep its limit."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from peft_dist.core.errors import ConfigError
from peft_dist.placement.frames import HEADER, Found, Task, encoded, founds, frame, warms
from peft_dist.placement.improvement import MAX_FLOWS
from peft_dist.placement.planning import greedy_plan
from peft_dist.placement.types import ClusterView, MigrationPlan, PlanError

T = TypeVar("T")
PAUSE = 1e-4
COMMAND = (sys.executable, "-m", "peft_dist.placement.solver_process")


class SolverError(Exception):
    """The solver process ended, or said something that is no answer."""


class Planner:
    """Makes plans in a process of its own: the greedy plan, then better ones until the limit.

    The process sends each better plan as it finds it. At ``limit`` it is killed if it has not ended, and the best plan
    that arrived is the answer; a new process is started at once and warms up meanwhile. Without a warm process the
    greedy plan is made in a thread of this one, as far as it gets within the limit. One plan is made at a time; others
    wait.

    Args:
        limit: Seconds from the call of ``plan`` to its answer by the solver.
        max_flows: Size of one program, in flows.
        command: What to start as the solver.
    """

    def __init__(self, limit: float = 0.2, *, max_flows: int = MAX_FLOWS, command: Sequence[str] = COMMAND) -> None:
        if not limit > 0:
            raise ConfigError(f"limit={limit} of the planner must be above 0 seconds")
        self.limit = limit
        self.num_restarts = 0
        self._max_flows = max_flows
        self._command = command
        self._busy = asyncio.Lock()
        self._starting: asyncio.Task[Process] | None = None
        self._number = 0

    async def __aenter__(self) -> Planner:
        self._restart()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def warm(self) -> None:
        """Wait for the solver process. Raises SolverError when it cannot run, with the reason."""
        await asyncio.shield(self._start())

    @property
    def pid(self) -> int | None:
        """Of the solver process; None while there is no warm one."""
        starting = self._starting
        if starting is None or not starting.done() or starting.cancelled() or starting.exception() is not None:
            return None
        return starting.result().pid

    async def plan(self, view: ClusterView) -> MigrationPlan:
        """The best plan found within the limit. Raises PlanError for a view that contradicts itself."""
        async with self._busy:
            starting = self._start()
            if not starting.done():
                return await self._greedy(view, "the solver is starting")
            failed = starting.exception()
            if failed is not None:
                self._restart()
                return await self._greedy(view, str(failed))
            return await self._ask(starting.result(), view)

    async def close(self) -> None:
        """End the process."""
        if self._starting is None:
            return
        starting, self._starting = self._starting, None
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, SolverError, OSError):
            await _end(await starting)

    async def _ask(self, process: Process, view: ClusterView) -> MigrationPlan:
        self._number += 1
        best: Found | None = None
        status = "killed at its limit"
        done = False
        try:
            async with asyncio.timeout(self.limit):
                await _write(process, frame(Task(self._number, self.limit, encoded(view), self._max_flows)))
                while best is None or not best.last:
                    best = await _found(process, self._number)
            done = True
        except TimeoutError:
            pass
        except SolverError as error:
            status = str(error)
        finally:
            # Also when the caller gave up: a process with a task half done is of no use for the next one.
            if not done:
                self.num_restarts += 1
                await _end(process)
                self._restart()
        if best is None:
            return await self._greedy(view, status)
        if best.error is not None or best.plan is None:
            raise PlanError(best.error or "the solver answered without a plan")
        return best.plan if done else msgspec.structs.replace(best.plan, status=status)

    async def _greedy(self, view: ClusterView, status: str) -> MigrationPlan:
        end = time.monotonic() + self.limit

        def seconds_left() -> float:
            # A thread that never pauses lets the event loop run only every 5 ms.
            time.sleep(PAUSE)
            return end - time.monotonic()

        return await asyncio.to_thread(greedy_plan, view, status, seconds_left)

    def _start(self) -> asyncio.Task[Process]:
        return self._starting or self._restart()

    def _restart(self) -> asyncio.Task[Process]:
        self._starting = asyncio.create_task(_launch(self._command))
        # Whoever asks for the next plan, or for warmth, hears of a failure.
        self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._starting


async def _launch(command: Sequence[str]) -> Process:
    """A process that is warm. Raises SolverError when it cannot be."""
    try:
        # A session of its own: an interrupt from the keyboard is the orchestrator's to answer.
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, start_new_session=True)
    except OSError as error:
        raise SolverError(f"the solver {command[0]} cannot be started: {error}") from error
    try:
        warm = _decoded(warms, await _frame(process))
    except BaseException:
        await _end(process)
        raise
    if warm.error is not None:
        await _end(process)
        raise SolverError(warm.error)
    return process


async def _end(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _write(process: Process, data: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(data)
        await process.stdin.drain()
    except (BrokenPipeError, ConnectionResetError) as error:
        raise SolverError("the solver has ended") from error


async def _found(process: Process, number: int) -> Found:
    found = _decoded(founds, await _frame(process))
    if found.number != number:
        raise SolverError(f"the solver answered task {found.number} instead of {number}")
    return found


def _decoded(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise SolverError(f"the solver said something that is no answer: {error}") from error


async def _frame(process: Process) -> bytes:
    assert process.stdout is not None
    try:
        (size,) = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
        return await process.stdout.readexactly(size)
    except asyncio.IncompleteReadError as error:
        raise SolverError("the solver has ended") from error
