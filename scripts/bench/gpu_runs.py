"""Runs of GPU benchmarks: each a process of its own, one after another on each GPU; lines are kept as they come."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from bench.gpu_workload import read_lines
from bench.kept_process import KeptProcess

# Not worth a start with fewer seconds left.
LEAST_SECONDS = 30


@dataclass
class Runs:
    """What is run and how.

    Attributes:
        commands: A script of this folder and its arguments, by name; ahead of these "torchrun N" for N ranks.
        vllm_python, vllm_path: Of ``peer_vllm.py``: its Python, and a folder of packages that has vLLM.
        more: Arguments of all scripts; ``ours`` of those of our engine alone.
        devices: GPUs, as CUDA_VISIBLE_DEVICES has them, each of which takes the next run when it is free; empty: one
            run after another, with whatever is visible.
    """

    commands: Mapping[str, Sequence[str]]
    vllm_python: str | None = None
    vllm_path: Path | None = None
    more: Sequence[str] = ()
    ours: Sequence[str] = ()
    devices: Sequence[str] = ()
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: list[KeptProcess] = field(default_factory=list)
    _is_over: bool = False

    def run_all(self, names: Iterable[str], budget: float | None, lines: TextIO) -> list[str]:
        """Those that failed or were not reached within so many seconds; measurements are written to ``lines``."""
        waiting, left, start = deque(names), list[str](), time.monotonic()

        def work(device: str | None) -> None:
            while waiting:
                try:
                    name = waiting.popleft()
                except IndexError:
                    return
                seconds = budget - (time.monotonic() - start) if budget else None
                if seconds is not None and seconds < LEAST_SECONDS:
                    left.append(name)
                elif self._execute(name, seconds, device, lines):
                    self._write(lines, {"part": "done", "run": name})
                else:
                    left.append(name)

        lanes: Sequence[str | None] = self.devices or [None]
        self._is_over = False
        with ThreadPoolExecutor(len(lanes)) as pool:
            try:
                for _ in pool.map(work, lanes):
                    pass
            finally:
                # Nothing is left to end, but where this was interrupted: the threads would go on with all runs.
                waiting.clear()
                with self._lock:
                    self._is_over = True
                    for process in self._running:
                        process.end()
        return left

    def _execute(self, name: str, seconds: float | None, device: str | None, lines: TextIO) -> bool:
        """Run one; its lines are written at once. Whether it ended well and in time."""
        command = self.command(name)
        with self._lock:
            on = "" if device is None else f" on GPU {device}"
            if self._is_over:
                return False
            print(f"== {name}{on}: {' '.join(command[1:])}", flush=True)
            # An engine's own processes hold the device, and have to end with it, also where this one is killed.
            process = KeptProcess(command, self._environment(name, device))
            self._running.append(process)
        alarm = threading.Timer(seconds or threading.TIMEOUT_MAX, process.end)
        alarm.daemon = True
        alarm.start()
        began = time.monotonic()
        try:
            for text in process.stdout:
                with self._lock:
                    print(text if device is None else f"{name}: {text}", end="", flush=True)
                for line in read_lines(text):
                    self._write(lines, {**line, "run": name, **({} if device is None else {"gpu": device})})
            return process.wait() == 0
        finally:
            alarm.cancel()
            process.end()
            with self._lock:
                self._running.remove(process)
                print(f"== {name}: ended after {time.monotonic() - began:.0f} s ({process.returncode})", flush=True)

    def command(self, name: str) -> list[str]:
        """What is executed."""
        words = list(self.commands[name])
        python = sys.executable
        if words[0] == "torchrun":
            _, ranks, *words = words
            start = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        else:
            if words[0] == "peer_vllm.py" and self.vllm_python:
                python = self.vllm_python
            start = [python]
        script, *arguments = words
        if self.devices:
            # Others may read the same adapters meanwhile.
            arguments = [argument for argument in arguments if argument != "--discard"]
        ours = () if script.startswith("peer") else self.ours
        return [*start, str(Path(__file__).parent / script), *arguments, *self.more, *ours]

    def _environment(self, name: str, device: str | None) -> dict[str, str]:
        """vLLM may live in a folder of packages rather than in a Python of its own."""
        found = dict(os.environ)
        if device is not None:
            found["CUDA_VISIBLE_DEVICES"] = device
        if self.commands[name][0] == "peer_vllm.py" and self.vllm_path:
            found["PYTHONPATH"] = os.pathsep.join([str(self.vllm_path), *filter(None, [found.get("PYTHONPATH")])])
        return found

    def _write(self, lines: TextIO, line: Mapping[str, object]) -> None:
        with self._lock:
            lines.write(json.dumps(line) + "\n")
            lines.flush()
