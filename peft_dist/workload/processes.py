"""A client in several processes, for more events a second than one can read."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from peft_dist.core.errors import PeftDistError
from peft_dist.workload.records import RequestRecord
from peft_dist.workload.sending import ClientOptions, Numbered, connected

# Seconds from the word to start to the start: every process has heard of it by then.
_NOTICE = 0.2


def replay_in_processes(
    requests: Numbered, options: ClientOptions, on_end: Callable[[RequestRecord], object]
) -> tuple[list[RequestRecord], list[float]]:
    """As ``Client.replay``; process p of n sends every n-th request from the p-th on. They share one clock.

    Raises PeftDistError when one of them dies.
    """
    context = multiprocessing.get_context("spawn")
    started = []
    try:
        for place in range(options.processes):
            ours, theirs = context.Pipe()
            part = list(requests[place :: options.processes])
            process = context.Process(target=_send, args=(theirs, part, options), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        pipes = [pipe for _, pipe in started]
        for pipe in pipes:
            pipe.recv()
        start = time.perf_counter() + _NOTICE
        for pipe in pipes:
            pipe.send(start)
        return _collect(pipes, on_end)
    except (EOFError, ConnectionError) as error:
        raise PeftDistError("a process of the client has died: its own words are above") from error
    finally:
        for process, pipe in started:
            pipe.close()
            process.terminate()
            process.join()


def _collect(
    pipes: list[Connection], on_end: Callable[[RequestRecord], object]
) -> tuple[list[RequestRecord], list[float]]:
    records: list[RequestRecord] = []
    lags: list[float] = []
    open_pipes = list(pipes)
    while open_pipes:
        for pipe in wait(open_pipes):
            assert isinstance(pipe, Connection)
            found = pipe.recv()
            if isinstance(found, RequestRecord):
                records.append(found)
                on_end(found)
            else:
                lags.extend(found)
                open_pipes.remove(pipe)
    return records, lags


def _send(pipe: Connection, requests: Numbered, options: ClientOptions) -> None:
    asyncio.run(_sending(pipe, requests, options))


async def _sending(pipe: Connection, requests: Numbered, options: ClientOptions) -> None:
    """What a process does: say that it is ready, hear when to start, send each record, and its lags at the end."""
    async with connected(options) as client:
        pipe.send("ready")
        _, lags = await client.replay(requests, pipe.recv(), pipe.send)
        pipe.send(lags)
