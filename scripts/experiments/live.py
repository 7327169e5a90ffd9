"""A load put to a live server, and what its metrics tell of the run."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from experiments.measured import Measured, Work, measure
from peft_dist.core.errors import ConfigError
from peft_dist.workload import client
from peft_dist.workload.arrivals import Workload
from peft_dist.workload.prompts import Prompts
from peft_dist.workload.sending import ClientOptions

# Seconds between two looks at who waits and who runs.
LOOK = 0.5
TIMEOUT = 30.0
# Of the client, by default; see Server.
MAX_LATENESS = 0.05
# Of a question: refused, cut off, too slow, no HTTP, no text.
_FAILURES = (OSError, http.client.HTTPException, ValueError)
_LINE = re.compile(r"^(peft_dist:\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Server:
    """One to measure.

    Attributes:
        url: Without a path.
        end_id: Prompts are token ids below it; they must be in the vocabulary.
        max_lateness: Seconds by which the client may be late (P99); a later one's figures are not told.
    """

    url: str
    end_id: int = 30_000
    max_lateness: float = MAX_LATENESS

    @property
    def prompts(self) -> Prompts:
        """Ids that are special tokens in most vocabularies, which come first, are left out."""
        return Prompts(first_id=min(100, self.end_id // 2), end_id=self.end_id)


def adapters_of(url: str) -> list[str]:
    """Names of a server's adapters, in the order of their numbers where they have any. Raises ConfigError."""
    return sorted((one["id"] for one in _models(url) if one.get("parent")), key=_natural)


def base_of(url: str) -> dict[str, Any]:
    """What a server tells of the model beside its adapters. Raises ConfigError."""
    found = next((one for one in _models(url) if not one.get("parent")), None)
    if found is None:
        raise ConfigError(f"the server {url} tells of no model without a parent: is it one of adapters alone?")
    return found


def _models(url: str) -> list[dict[str, Any]]:
    try:
        return [{"id": one["id"], **one} for one in json.loads(_read(f"{_root(url)}/v1/models"))["data"]]
    except (*_FAILURES, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the server {url} does not tell its models: {error!r}") from error


def version_of(url: str) -> str | None:
    """Of a server; None where it does not tell it, which no other server must."""
    try:
        return str(json.loads(_read(f"{_root(url)}/version"))["version"])
    except (*_FAILURES, KeyError, TypeError):
        return None


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def replicas_of(url: str) -> int:
    """Replicas of a server, as its health page tells; 1 where it tells of none. Raises ConfigError."""
    try:
        return max(1, len(json.loads(_read(f"{_root(url)}/health")).get("replicas", ())))
    except (*_FAILURES, TypeError, AttributeError) as error:
        raise ConfigError(f"the server {url} does not tell how it is: {error!r}") from error


def _root(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def run(workload: Workload, server: Server) -> Measured:
    """Put a workload to a server, and measure.

    Raises:
        LateClientError: the client fell behind its own schedule; what it measured is not told.
        ConfigError: the server does not answer, or goes on capturing steps.
    """
    return asyncio.run(
        _run(workload, ClientOptions(server.url, prompts=server.prompts, max_lateness=server.max_lateness))
    )


async def _run(workload: Workload, options: ClientOptions) -> Measured:
    looks = Looks(options.root)
    before: dict[Key, float] = {}
    watchers: list[asyncio.Task[None]] = []

    async def begin() -> None:
        """What the server did to become warm, and its answers to the warm-up, are no part of the run."""
        before.update(await _metrics(options.root))
        watchers.append(asyncio.create_task(looks.watch()))

    try:
        outcome = await client.run(workload, options, on_start=begin)
    finally:
        for watcher in watchers:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
    outcome.check_schedule(options.max_lateness)
    if outcome.was_warm is False:
        # What is captured while requests wait for it is no part of an experiment.
        raise ConfigError(
            f"{options.root} still captured steps after {options.warm_within:g} s: is it asked by others?"
        )
    after = await _metrics(options.root)
    found = measure(outcome.records, work(before, after, looks))
    if found.queueing_delay is None and outcome.queue is not None and outcome.queue.requests:
        tokens = max(sum(record.output_tokens for record in outcome.records), 1)
        return _with_queueing(found, outcome.queue.seconds / tokens)
    return found


def _with_queueing(found: Measured, seconds: float) -> Measured:
    """The server told of all requests together only: seconds waited by all of them over all tokens."""
    return replace(found, queueing_delay=seconds)


Key = tuple[str, frozenset[tuple[str, str]]]
Series = Mapping[Key, float]


async def _metrics(root: str) -> Series:
    return read(await asyncio.to_thread(fetch, f"{root}/metrics"))


def read(text: str) -> Series:
    """Ours of a page of metrics, by name and labels."""
    return {
        (name, frozenset(_LABEL.findall(labels or ""))): float(value) for name, labels, value in _LINE.findall(text)
    }


def _read(url: str) -> bytes:
    """Raises one of ``_FAILURES``."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        return bytes(answer.read())


def fetch(url: str) -> str:
    """A page of metrics; empty where the server has none.

    Raises ConfigError where it could not be read: counts of a run would begin at the server's start.
    """
    try:
        return str(_read(url), "utf-8")
    except urllib.error.HTTPError:
        return ""
    except _FAILURES as error:
        raise ConfigError(f"{url} cannot be read: {error!r}") from error


class Looks:
    """Who waits and who runs, by replica, summed over looks at equal distances: their shares are shares of time."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.waiting: defaultdict[str, float] = defaultdict(float)
        self.running: defaultdict[str, float] = defaultdict(float)

    async def watch(self) -> None:
        """Look until cancelled."""
        while True:
            # One look less among many changes no share.
            with suppress(ConfigError):
                self.note(await _metrics(self._root))
            await asyncio.sleep(LOOK)

    def note(self, found: Series) -> None:
        """Add one look."""
        sums = {"peft_dist:requests_waiting": self.waiting, "peft_dist:requests_running": self.running}
        for (name, labels), value in found.items():
            if name in sums:
                sums[name][dict(labels).get("replica", "0")] += value

    @property
    def shares(self) -> tuple[float, ...]:
        """Time waited over time in the server, by replica."""
        replicas = sorted(self.waiting.keys() | self.running.keys(), key=int)
        totals = [(self.waiting[one], self.waiting[one] + self.running[one]) for one in replicas]
        return tuple(waiting / total if total else 0.0 for waiting, total in totals)


def work(before: Series, after: Series, looks: Looks) -> Work:
    """What two readings of the metrics tell of the time between them."""

    def grown(name: str, **labels: str) -> list[float]:
        """By how much each series of a name grew, of those that have these labels."""
        wanted = set(labels.items())
        return [
            value - before.get((one, own), 0.0)
            for (one, own), value in after.items()
            if one == f"peft_dist:{name}_total" and wanted <= own
        ]

    return Work(
        switch_seconds=max(grown("switch_seconds"), default=0.0),
        plan_seconds=sum(grown("migration_plan_seconds")),
        queueing=looks.shares,
        switches=round(sum(grown("switches"))),
        loads=round(sum(grown("adapter_loads"))),
        moved_with_kv=round(sum(grown("migration_moves", way="kv"))),
        recomputed=round(sum(grown("migration_moves", way="recompute"))),
    )
