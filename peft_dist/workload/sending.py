"""Requests of a workload on their way to an OpenAI-compatible server, each at its time."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_dist.core.errors import ConfigError
from peft_dist.workload.arrivals import Arrival, Workload
from peft_dist.workload.prompts import Prompts
from peft_dist.workload.records import RequestRecord
from peft_dist.workload.streams import Stream

if TYPE_CHECKING:
    import aiohttp

Numbered = Sequence[tuple[int, Arrival]]
"""Requests with their places in the workload."""

_HEARTBEAT = 0.05
_WARM_UPS = 8  # At once.
_ASK_SECONDS = 0.2
_WARM_UP_TOKENS = 16, 4  # Of prompt and output.


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
        warm_within: Seconds for which a server that tells of it may still compile and capture before that; 0: it is not
            asked.
        timeout: Seconds for one request.
        max_lateness: Seconds, see ``Outcome.check_schedule``.
        processes: That send requests, each its share of them.
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
    warm_within: float = 300.0
    timeout: float = 3600.0
    max_lateness: float = 0.05
    processes: int = 1

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"the server {self.url!r} is no URL: write for example http://localhost:8000")
        for name, least in (("warm_up", 0), ("warm_within", 0.0), ("processes", 1)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name}={getattr(self, name)} of the client must be a number of {least} or more")
        # No number is above a NaN: nothing would be too late.
        for name in ("timeout", "max_lateness"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} of the client must be seconds above 0, not infinite")

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


@asynccontextmanager
async def connected(options: ClientOptions) -> AsyncIterator[Client]:
    """A client whose connections are closed at the end. Raises ConfigError when ``aiohttp`` is missing."""
    try:
        import aiohttp
    except ModuleNotFoundError as missing:
        raise ConfigError("the client needs aiohttp: pip install 'peft-dist[bench]'") from missing
    headers = {"Content-Type": "application/json"}
    if options.api_key:
        headers["Authorization"] = f"Bearer {options.api_key}"
    # A connection of its own for each request: a kept one may be closed by the server just when it is used again.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=options.timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        yield Client(session, options, (aiohttp.ClientError, OSError))


class Client:
    """Sends requests; see ``connected``."""

    def __init__(
        self, session: aiohttp.ClientSession, options: ClientOptions, failures: tuple[type[Exception], ...]
    ) -> None:
        self._session = session
        self._options = options
        self._start = time.perf_counter()
        self._failures = failures

    async def is_warm(self) -> bool | None:
        """Wait until all replicas that serve have compiled and captured what they do ahead (``/ready?warm=true``).

        Returns whether they had within ``warm_within``; None where the server does not tell.
        """
        end = time.perf_counter() + self._options.warm_within
        serving = (await self._ready()).get("serving") if self._options.warm_within else None
        if not isinstance(serving, int):
            return None
        # Another process's state: only asking tells.
        while "serving" not in await self._ready(warm="true", replicas=str(max(serving, 1))):
            if time.perf_counter() > end:
                return False
            await asyncio.sleep(_ASK_SECONDS)
        return True

    async def _ready(self, **query: str) -> dict[str, Any]:
        try:
            async with self._session.get(f"{self._options.root}/ready", params=query) as response:
                found = await response.json() if response.status == 200 else {}
        except self._failures:  # Not there, which the first request says better.
            return {}
        except ValueError:  # Another server's page.
            return {}
        return found if isinstance(found, dict) else {}

    async def warm_up(self, workload: Workload) -> None:
        """Ask every adapter for a few tokens. Raises ConfigError when one does not answer."""
        places = asyncio.Semaphore(_WARM_UPS)

        async def one(number: int, adapter: str | None) -> RequestRecord:
            arrival = Arrival(0.0, adapter, *_WARM_UP_TOKENS)
            async with places:
                return await self._request(-1 - number, arrival, self._body(-1 - number, arrival))

        rounds = enumerate(workload.adapters * self._options.warm_up)
        for record in await asyncio.gather(*(one(number, adapter) for number, adapter in rounds)):
            if record.error is not None:
                raise ConfigError(
                    f"{self._options.model(record.adapter)!r} does not answer: {record.error}. A server must be up at "
                    f"{self._options.url}, and serve every adapter of the workload under its name "
                    "(peft-dist workload write --adapter-name)"
                )

    async def replay(
        self, requests: Numbered, start: float, on_end: Callable[[RequestRecord], object]
    ) -> tuple[list[RequestRecord], list[float]]:
        """Send requests of a workload that starts at ``start`` of ``time.perf_counter``, each at its time.

        Returns once the last has ended: records, and by how many seconds this loop's heartbeat came late.
        """
        tasks = []
        self._start = start
        lags: list[float] = []
        heart = asyncio.create_task(self._beat(lags))
        try:
            async with asyncio.TaskGroup() as group:
                for index, arrival in requests:
                    body = self._body(index, arrival)
                    await asyncio.sleep(max(0.0, arrival.time - self._now()))
                    task = group.create_task(self._request(index, arrival, body))
                    task.add_done_callback(lambda done: None if done.cancelled() else on_end(done.result()))
                    tasks.append(task)
        finally:
            heart.cancel()
        return [task.result() for task in tasks], lags

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
