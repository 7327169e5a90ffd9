"""Requests of a fault scenario as SSE streams of ``peft-dist serve`` around a real model."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec

from tests.e2e.fault_scenario import Case
from tests.e2e.test_restart import end_group
from tests.e2e.test_serve import Server, children

BASE = "base"
SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos", "logprobs")
SAMPLING += ("presence_penalty", "frequency_penalty", "repetition_penalty")
HERE = ("--device", "cpu", "--threads", "1")


class ModelServer(Server):
    """The command, with adapters; the processes of its replicas are found by their state folder."""

    def __init__(self, folder: Path, model: Path, adapters: dict[str, str | Path], *options: str) -> None:
        self._state = folder / "state"
        more = ["--served-model-name", BASE, "--state-dir", str(self._state), *HERE, *options]
        for name, path in adapters.items():
            more += ["--adapter", f"{name}={path}"]
        self._start(folder, model, more, {**os.environ, "HF_HUB_OFFLINE": "1"})

    def launches(self) -> dict[int, int]:
        """Process ids of the launches of this server's own replicas."""
        found = {}
        for path in self._state.glob("replica-*/process.json"):
            try:
                found[int(path.parent.name[8:])] = msgspec.json.decode(path.read_bytes())["pid"]
            except FileNotFoundError:
                continue
        return found

    def worker(self, replica_id: int) -> int:
        """Process id of the one rank of a replica."""
        [rank] = children(self.launches()[replica_id])
        return rank

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.launches().values():
            end_group(pid)


@contextmanager
def serving(folder: Path, model: Path, adapters: dict[str, str | Path], *options: str) -> Iterator[ModelServer]:
    server = ModelServer(folder, model, adapters, *options)
    try:
        server.until(server.port_file.exists)
        yield server
    finally:
        server.end()


class Clients:
    """Clients of a server, which all ask at once."""

    def __init__(self, server: ModelServer, http: httpx.AsyncClient) -> None:
        self._server, self._http = server, http

    async def ask(self, case: Case) -> None:
        """Stream it. No token is missing, doubled or another one: its text, scores and usage are those it has alone."""
        case.tokens, case.num_scores = [], 0
        text, usages, reasons = "", [], []
        async with self._http.stream("POST", "/v1/completions", json=_body(case)) as response:
            assert response.status_code == 200, await response.aread()
            lines = [line async for line in self._noted(response.aiter_lines(), case)]
        assert lines[-1] == "[DONE]"
        for event in map(json.loads, lines[:-1]):
            for choice in event["choices"]:
                text += choice["text"]
                reasons.append(choice["finish_reason"])
                case.num_scores += len((choice["logprobs"] or {}).get("token_logprobs", ()))
            usages.append(event["usage"])
        case.check()
        assert text == case.text
        assert set(reasons[:-1]) <= {None} and reasons[-1] == "length"
        number, prompt = len(case.expected), len(case.prompt)
        told = {"prompt_tokens": prompt, "completion_tokens": number, "total_tokens": prompt + number}
        assert set(usages[:-1]) == {None} and told.items() <= usages[-1].items()

    async def _noted(self, lines: AsyncIterator[str], case: Case) -> AsyncIterator[str]:
        """Data of the events; the tokens in them are counted as they come, and told from others at their place."""
        async for line in lines:
            if not line:
                continue
            data = line.removeprefix("data: ")
            if data != "[DONE]":
                event = json.loads(data)
                assert "error" not in event, event
                new = [token for choice in event["choices"] for token in choice["token_ids"]]
                first = len(case.tokens)
                assert new == case.expected[first : first + len(new)], (case.params, case.adapter, first)
                case.tokens += new
                case.num_tokens += len(new)
            yield data

    async def change_adapters(self, spare: str | Path, case: Case, until: asyncio.Event) -> int:
        """Load an adapter under ever new names, stream a case of it, unload it; returns how often."""
        for count in itertools.count():
            if until.is_set():
                return count
            name = f"spare{count}"
            await self._change("load_lora_adapter", {"lora_name": name, "lora_path": str(spare)})
            await self.ask(replace(case, adapter=name, tokens=[], num_tokens=0))
            await self._change("unload_lora_adapter", {"lora_name": name})
        raise AssertionError("it counts for ever")

    async def _change(self, route: str, body: dict[str, Any]) -> None:
        answer = await self._http.post(f"/v1/{route}", json=body)
        assert answer.status_code == 200, answer.text

    async def gauges(self, *names: str) -> list[dict[int, int]]:
        """By replica, as itself told them last."""
        metrics = (await self._http.get("/metrics")).text
        found = [re.findall(rf'^peft_dist:{name}{{replica="(\d+)"}} (\S+)$', metrics, re.MULTILINE) for name in names]
        return [{int(replica): int(float(value)) for replica, value in values} for values in found]

    async def are_ready(self, number: int) -> bool:
        """Whether so many replicas serve."""
        return (await self._http.get("/ready", params={"replicas": number})).status_code == 200

    async def num_held(self) -> int:
        """Requests that the replicas say they have, all together."""
        return sum(sum(held.values()) for held in await self.gauges("requests_running", "requests_waiting"))

    async def are_empty(self) -> bool:
        """Whether no replica has a request, or a block of one."""
        free, blocks = await self.gauges("kv_blocks_free", "kv_blocks")
        return free == blocks and await self.num_held() == 0


def _body(case: Case) -> dict[str, Any]:
    params = {name: value for name in SAMPLING if (value := getattr(case.params, name)) is not None}
    asked = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    return {"model": case.adapter or BASE, "prompt": case.prompt, **params, **asked}


@asynccontextmanager
async def clients_of(server: ModelServer) -> AsyncIterator[Clients]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=300) as http:
        yield Clients(server, http)


class Streams:
    """Requests that are asked all at once, and looked after until they have ended."""

    def __init__(self, clients: Clients, cases: Sequence[Case], again: bool = False) -> None:
        """``again``: Each of them is asked again and again until they are to end."""
        self._clients, self._cases, self._again = clients, cases, again
        self._before = self._total()
        self._tasks = [asyncio.create_task(self._ask(case)) for case in cases]

    @property
    def num_open(self) -> int:
        return sum(not task.done() for task in self._tasks)

    @property
    def num_drawn(self) -> int:
        """Tokens that have come."""
        return self._total() - self._before

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Wait for it; raises what went wrong with a stream. Other processes tell it only when asked."""
        while not await condition():
            await self._look(0.05)

    async def until_drawn(self, number: int) -> None:
        while self.num_drawn < number:
            assert self.num_open, f"they ended with {self.num_drawn} tokens"
            await self._look(0.05)

    async def wait(self, seconds: float) -> None:
        """Look at them for so long."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (left := end - loop.time()) > 0:
            assert self.num_open, "they ended too soon"
            await self._look(left)

    def ask_no_more(self) -> None:
        self._again = False

    async def end(self) -> None:
        self.ask_no_more()
        await asyncio.gather(*self._tasks)

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, case: Case) -> None:
        await self._clients.ask(case)
        while self._again:
            await self._clients.ask(case)

    async def _look(self, seconds: float) -> None:
        running = [task for task in self._tasks if not task.done()]
        if running:
            await asyncio.wait(running, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(seconds)
        for task in self._tasks:
            if task.done():
                task.result()

    def _total(self) -> int:
        return sum(case.num_tokens for case in self._cases)
