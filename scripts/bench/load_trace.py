"""What the engine's thread does for adapters that come and go, call by call."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft_dist.core.adapter import AdapterSpec
from peft_dist.runner.replica import Replica


@dataclass
class Trace:
    """What loads cost the engine's thread. Times in seconds.

    Attributes:
        registrations: Wall time of each registration.
        calls: Wall time of each call that begins, publishes or drops loads.
        off_processor: Of those, the time in which the thread had given up the processor by itself.
        idle: Time waited for a load while no request could run.
        blocked: Time waited for a load while one could.
    """

    registrations: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    off_processor: float = 0.0
    idle: float = 0.0
    blocked: float = 0.0
    file_opens: int = 0

    def watch(self, replica: Replica) -> None:
        for name in ("start_load", "take_loaded", "drop_adapter"):
            setattr(replica.executor, name, self._timed(getattr(replica.executor, name)))
        thread = threading.get_ident()

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and threading.get_ident() == thread and "adapter_" in str(arguments[0]):
                self.file_opens += 1

        sys.addaudithook(audit)

    def register(self, replica: Replica, spec: AdapterSpec) -> None:
        start = time.perf_counter()
        replica.register_adapter(spec)
        self.registrations.append(time.perf_counter() - start)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
            start, cpu = time.perf_counter(), time.thread_time()
            result = call(*arguments)
            elapsed, cpu = time.perf_counter() - start, time.thread_time() - cpu
            if resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw > switches:
                self.off_processor += max(0.0, elapsed - cpu)
            if result or arguments:  # Not the many times that nothing has ended.
                self.calls.append(elapsed)
            return result

        return timed
