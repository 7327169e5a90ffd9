"""An open-loop client of OpenAI-compatible servers: requests go out at their times, whatever became of earlier ones."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_dist.core.errors import ConfigError, PeftDistError
from peft_dist.workload.arrivals import Arrival, Workload
from peft_dist.workload.prompts import Prompts
from peft_dist.workload.queueing import ServerQueue
from peft_dist.workload.records import Distribution, RequestRecord
from peft_dist.workload.streams import Stream

if TYPE_CHECKING:
    import aiohttp

_HEARTBEAT = 0.05
_WARM_UPS = 8  # At once.
_WARM_UP_TOKENS = 16, 4  # Of prompt and output.


class LateClientError(PeftDistError):
    """The client missed its own schedule, so that what it measured is no open loop."""


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How the requests of a workload are put to a server.

    Attributes:
        url: Of the server, without ``/v1``.
        base_model: What requests without an adapter ask for.
        api_key: Sent as ``Authorization: Bearer``.
        prompts: Makes the prompts.
        temperature: 1 as in the artifact.
        ignore_eos: Have answers be as long as the workload says; not every server knows the field.
        running_usage: Ask for ``usage`` in every event, which tells tokens without a text.
        extra: Further fields of every request.
        warm_up: Rounds of one short request to each adapter before the clock starts.
        timeout: Seconds for one request.
        max_lateness: Seconds, see ``check_schedule``.
    """

    url: str
    base_model: str | None = None
    api_key: str | None = None
    prompts: Prompts = field(default_factory=Prompts)
    temperature: float = 1.0
    ignore_eos: bool = True
    running_usage: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    warm_up: int = 1
    timeout: float = 3600.0
    max_lateness: float = 0.05

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"the server {self.url!r} is no URL: write for example http://localhost:8000")
        if self.warm_up < 0 or self.timeout <= 0 or self.max_lateness <= 0:
            raise ConfigError("the warm-up must be 0 rounds or more; the timeout and the lateness must be above 0 s")

    @property
    def root(self) -> str:
        """The server's address without a path."""
        return self.url.rstrip("/").removesuffix("/v1")

    def model(self, adapter: str | None) -> str:
        """The name to ask for. Raises ConfigError when the workload asks for a base model that has none."""
        if adapter is not None:
            return adapter
        if self.base_model is None:
            raise ConfigError("the workload has requests for the base model: name it with --base-model")
        return self.base_model


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run brought: records in the order of the workload, and the server's own word on its queue.

    ``lags``: Seconds by which the client's heartbeat came late, a sample of its delays until the end of the run.
    """

    records: tuple[RequestRecord, ...]
    lags: tuple[float, ...]
    queue: ServerQueue | None

    def check_schedule(self, max_lateness: float) -> None:
        """Raise LateClientError when the P99 of how late requests were sent, or of the lags, is above the bound."""
        sent = Distribution.of(record.lateness for record in self.records)
        for what, found in (("requests were sent", sent), ("the client's own loop ran", Distribution.of(self.lags))):
            if found is not None and found.p99 > max_lateness:
                raise LateClientError(
                    f"the client fell behind: {what} {found.p99:.3f} s late (P99; the bound is {max_lateness} s). "
                    "Its figures are not reported: lower the rate, or give the client processors of its own"
                )


async def run(
    workload: Workload, options: ClientOptions, on_end: Callable[[RequestRecord], None] = lambda record: None
) -> Outcome:
    """Put a workload to a server.

    Args:
        workload: Requests and their times.
        options: The server, and how it is asked.
        on_end: Told of every request that has ended.

    Raises:
        ConfigError: ``aiohttp`` is missing, or a request of the warm-up was not answered.
    """
    try:
        import aiohttp
    except ModuleNotFoundError as missing:
        raise ConfigError("the client needs aiohttp: pip install 'peft-dist[bench]'") from missing
    for adapter in workload.adapters:
        options.model(adapter)
    headers = {"Content-Type": "application/json"}
    if options.api_key:
        headers["Authorization"] = f"Bearer {options.api_key}"
    # A connection of its own for each request: a kept one may be closed by the server just when it is used again.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=options.timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        client = _Client(session, options)
        await client.warm_up(workload)
        before = await client.metrics()
        records, lags = await client.replay(workload, on_end)
        return Outcome(records, lags, ServerQueue.between(before, await client.metrics(), records))


class _Client:
    def __init__(self, session: aiohttp.ClientSession, options: ClientOptions) -> None:
        import aiohttp

        self._session = session
        self._options = options
        self._start = time.perf_counter()
        self._failures = (aiohttp.ClientError, OSError)

    async def warm_up(self, workload: Workload) -> None:
        places = asyncio.Semaphore(_WARM_UPS)

        async def one(number: int, adapter: str | None) -> RequestRecord:
            arrival = Arrival(0.0, adapter, *_WARM_UP_TOKENS)
            async with places:
                return await self._request(-1 - number, arrival, self._body(-1 - number, arrival))

        rounds = enumerate(workload.adapters * self._options.warm_up)
        for record in await asyncio.gather(*(one(number, adapter) for number, adapter in rounds)):
            if record.error is not None:
                raise ConfigError(f"{self._options.model(record.adapter)!r} does not answer: {record.error}")

    async def replay(
        self, workload: Workload, on_end: Callable[[RequestRecord], None]
    ) -> tuple[tuple[RequestRecord, ...], tuple[float, ...]]:
        """Send every request at its time; records come back once the last has ended."""
        tasks = []
        self._start = time.perf_counter()
        lags: list[float] = []
        heart = asyncio.create_task(self._beat(lags))
        try:
            async with asyncio.TaskGroup() as group:
                for index, arrival in enumerate(workload.arrivals):
                    body = self._body(index, arrival)
                    await asyncio.sleep(max(0.0, arrival.time - self._now()))
                    task = group.create_task(self._request(index, arrival, body))
                    task.add_done_callback(lambda done: None if done.cancelled() else on_end(done.result()))
                    tasks.append(task)
        finally:
            heart.cancel()
        return tuple(task.result() for task in tasks), tuple(lags)

    async def metrics(self) -> str:
        """The server's metrics; empty where it has none."""
        try:
            async with self._session.get(f"{self._options.root}/metrics") as response:
                return await response.text() if response.status == 200 else ""
        except self._failures:
            return ""

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _beat(self, lags: list[float]) -> None:
        while True:
            due = self._now() + _HEARTBEAT
            await asyncio.sleep(_HEARTBEAT)
            lags.append(max(0.0, self._now() - due))

    def _body(self, index: int, arrival: Arrival) -> bytes:
        options = self._options
        usage = {"include_usage": True, **({"continuous_usage_stats": True} if options.running_usage else {})}
        body: dict[str, Any] = {
            "model": options.model(arrival.adapter),
            "prompt": options.prompts.make(index, arrival.prompt_tokens),
            "max_tokens": arrival.output_tokens,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": usage,
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps({**body, **options.extra}).encode()

    async def _request(self, index: int, arrival: Arrival, body: bytes) -> RequestRecord:
        stream = Stream()
        sent = self._now()
        try:
            async with self._session.post(f"{self._options.root}/v1/completions", data=body) as response:
                if response.status == 200:
                    async for data in response.content.iter_any():
                        stream.feed(data, self._now())
                    stream.end()
                else:
                    stream.error = f"HTTP {response.status}: {(await response.text())[:300]}"
        except TimeoutError:
            stream.error = f"no end after {self._options.timeout} s"
        except self._failures as error:
            stream.error = f"{type(error).__name__}: {error}"
        times, told = stream.times, stream.output_tokens
        return RequestRecord(
            index=index,
            adapter=arrival.adapter,
            scheduled=arrival.time,
            sent=sent,
            first_token=times[0] if times else None,
            finished=self._now(),
            prompt_tokens=arrival.prompt_tokens if stream.prompt_tokens is None else stream.prompt_tokens,
            output_tokens=len(times) if told is None else told,
            itl=tuple(np.diff(times).tolist()),
            queueing=stream.queueing,
            error=stream.error,
        )
