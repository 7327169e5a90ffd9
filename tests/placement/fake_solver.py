"""A solver process that misbehaves: ``python fake_solver.py KIND``."""

from __future__ import annotations

import signal
import sys

from peft_dist.placement.frames import Found, Warm, frame, views
from peft_dist.placement.planning import greedy_plan
from peft_dist.placement.solver_process import _next


def say(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def main(kind: str) -> None:
    if kind == "never warm":
        signal.pause()
    say(frame(Warm("no solver in this house" if kind == "cold" else None)))
    task = _next(sys.stdin.buffer)
    if task is None or kind == "dies":
        return
    if kind == "babbles":
        say(frame(Warm()))
    if kind == "mute":
        signal.pause()
    if kind == "hangs":
        say(frame(Found(task.number, False, greedy_plan(views.decode(task.view), "half way"))))
        signal.pause()
    if kind == "late":
        say(frame(Found(task.number - 1, True, greedy_plan(views.decode(task.view)))))


if __name__ == "__main__":
    main(sys.argv[1])
