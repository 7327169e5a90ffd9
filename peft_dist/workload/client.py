"""An open-loop client of OpenAI-compatible servers: requests go out at their times, whatever became of earlier ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from peft_dist.core.errors import PeftDistError
from peft_dist.workload.arrivals import Workload
from peft_dist.workload.processes import replay_in_processes
from peft_dist.workload.queueing import ServerQueue
from peft_dist.workload.records import Distribution, RequestRecord
from peft_dist.workload.sending import ClientOptions, connected


class LateClientError(PeftDistError):
    """The client missed its own schedule, so that what it measured is no open loop."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run brought: records in the order of the workload, and the server's own word on its queue.

    ``lags``: Seconds by which the client's heartbeat came late, a sample of its delays until the end of the run.
    ``was_warm``: Whether all was compiled and captured before; None: nobody knows.
    """

    records: tuple[RequestRecord, ...]
    lags: tuple[float, ...]
    queue: ServerQueue | None
    was_warm: bool | None = None

    def check_schedule(self, max_lateness: float) -> None:
        """Raise LateClientError when the P99 of how late requests were sent, or of the lags, is above the bound."""
        sent = Distribution.of(record.lateness for record in self.records)
        for what, found in (("requests were sent", sent), ("the client's own loop ran", Distribution.of(self.lags))):
            if found is not None and found.p99 > max_lateness:
                raise LateClientError(
                    f"the client fell behind: {what} {found.p99:.3f} s late (P99; the bound is {max_lateness} s). "
                    "Its figures are not reported: lower the rate, or give the client processors of its own"
                )


async def _nothing() -> None:
    """Before the first request."""


async def run(
    workload: Workload,
    options: ClientOptions,
    on_end: Callable[[RequestRecord], object] = lambda record: None,
    on_start: Callable[[], Awaitable[object]] = _nothing,
) -> Outcome:
    """Put a workload to a server.

    Args:
        workload: Requests and their times.
        options: The server, and how it is asked.
        on_end: Told of every request that has ended.
        on_start: Awaited once the server is warm and has answered the warm-up, before the clock starts.

    Raises:
        ConfigError: ``aiohttp`` is missing, or a request of the warm-up was not answered.
    """
    for adapter in workload.adapters:
        options.model(adapter)
    numbered = list(enumerate(workload.arrivals))
    async with connected(options) as client:
        was_warm = await client.is_warm()
        await client.warm_up(workload)
        await on_start()
        before = await client.metrics()
        if options.processes == 1:
            records, lags = await client.replay(numbered, time.perf_counter(), on_end)
        else:
            records, lags = await asyncio.to_thread(replay_in_processes, numbered, options, on_end)
        after = await client.metrics()
    records.sort(key=lambda record: record.index)
    return Outcome(tuple(records), tuple(lags), ServerQueue.between(before, after, records), was_warm)
