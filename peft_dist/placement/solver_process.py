"""The solver's own process: ``python -m peft_dist.placement.solver_process``.

Tasks come in and plans go out until the input ends. It may be killed at any moment: what it has sent by then is all
that counts.
"""

from __future__ import annotations

import os
import sys
import time
from typing import BinaryIO

import msgspec

from peft_dist.placement.frames import HEADER, Found, Task, Warm, frame, tasks, views
from peft_dist.placement.improvement import Solve
from peft_dist.placement.planning import plans
from peft_dist.placement.program import Program
from peft_dist.placement.types import PlanError

# What remains of the time for the last plan to be made and sent.
RESERVE = 0.1


def main() -> int:
    """Serve tasks from standard input. Returns the exit status."""
    out = _claim_output()
    try:
        from peft_dist.placement.solving import solve

        solve(_smallest(), 1.0, 0.0)
    except ImportError as error:
        _send(out, Warm(f"the solver needs scipy ({error}): install it with pip install scipy"))
        return 1
    _send(out, Warm())
    while (task := _next(sys.stdin.buffer)) is not None:
        _answer(out, task, solve)
    return 0


def _answer(out: BinaryIO, task: Task, solve: Solve) -> None:
    end = time.monotonic() + (1 - RESERVE) * task.seconds
    best = None
    try:
        for plan in plans(views.decode(task.view), solve, lambda: end - time.monotonic(), task.max_flows):
            if best is None or plan.objective < best.objective:
                _send(out, Found(task.number, False, plan))
            best = plan
    except (PlanError, msgspec.ValidationError) as error:
        _send(out, Found(task.number, True, error=str(error)))
        return
    _send(out, Found(task.number, True, best))


def _claim_output() -> BinaryIO:
    """Standard output for frames alone: whatever libraries print goes to standard error."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out


def _smallest() -> Program:
    """A program with which the libraries load what they load at the first use."""
    program = Program()
    program.column(1.0, 0, 2, True)
    program.row([(0, 1.0)], 1, 2)
    return program


def _next(source: BinaryIO) -> Task | None:
    header = source.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    return tasks.decode(source.read(size))


def _send(out: BinaryIO, message: Found | Warm) -> None:
    out.write(frame(message))
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
