"""What is counted and timed while requests are answered. Nothing here is by adapter: histograms would multiply."""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peft_dist.api.token_metrics import TokenCounter, TokenHistogram
from peft_dist.core.adapter import AdapterSpec

FINISH_REASONS = ("stop", "length", "abort", "error")
CLIENT_CLOSED_REQUEST = 499
_COUNTED_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"})

# Upper bounds in seconds: from small models on fast devices to large ones on CPUs.
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_FIRST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_WHOLE_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


class RequestEnd(NamedTuple):
    """What an admitted HTTP request came to.

    Attributes:
        num_prompt_tokens, num_output_tokens: Of all its prompts; drawn for all its sequences.
        finish_reasons: How many sequences ended for each of ``FINISH_REASONS``, in the order of the first of each.
        first_token: Seconds from admission to the first token of any sequence; None before one was drawn.
        seconds: From admission to the end of the answer, or until its client left.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    finish_reasons: dict[str, int]
    first_token: float | None
    seconds: float


class RequestMetrics:
    """Counters and histograms of one server, in a registry of their own: several servers may share a process.

    Args:
        num_recent: Adapters whose order of use is remembered.
        clock: Seconds from any origin, never running backwards.
    """

    def __init__(self, num_recent: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        self._num_recent = num_recent
        self._recent: dict[str, None] = {}
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From admission to a sequence's first token.", _FIRST_BUCKETS
        )
        self.queue = self._histogram(
            "request_queue_seconds",
            "From a sequence's admission, less its way to its replica, to its first step.",
            _FIRST_BUCKETS,
        )
        # Of each token; the others are of each sequence.
        self.inter_token = TokenHistogram(
            "peft_dist:inter_token_latency_seconds", "Between two tokens of a sequence.", _TOKEN_BUCKETS
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From admission to the end of a sequence that was completed.", _WHOLE_BUCKETS
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self.generation_tokens = TokenCounter("peft_dist:generation_tokens", "Tokens that were drawn for clients.")
        self.registry.register(self.inter_token)
        self.registry.register(self.generation_tokens)
        self.admitted = self._counter(
            "sequences_admitted", "Sequences that were admitted; a request has n of each prompt."
        )
        self.finished = self._counter("sequences_finished", "Sequences that ended, by reason.", "finish_reason")
        for reason in FINISH_REASONS:
            self.finished.labels(reason)
        self.refused = self._counter(
            "request_errors", "Completions, chats, and texts and ids to translate, answered by an HTTP error.", "code"
        )

    def watch(self, adapter: AdapterSpec | None, on_end: Callable[[RequestEnd], None] | None = None) -> GenerationWatch:
        """For the sequences of one HTTP request, which begins now. ``on_end``: Hears once how it ended, if admitted."""
        return GenerationWatch(self, adapter, on_end)

    def use_adapter(self, content_hash: str) -> None:
        """Remember that an adapter was asked for just now."""
        self._recent.pop(content_hash, None)
        self._recent[content_hash] = None
        if len(self._recent) > self._num_recent:
            del self._recent[next(iter(self._recent))]

    def recent_adapters(self) -> list[str]:
        """Content hashes of the adapters that were asked for last, the latest at the end."""
        return list(self._recent)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"peft_dist:{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"peft_dist:{name}", text, labels, registry=self.registry)


class GenerationWatch:
    """Times the sequences of one HTTP request, numbered from 0. They count once they are admitted.

    Times are taken where tokens are handed to the client, so a client that reads too slowly shows in them.
    """

    def __init__(
        self, metrics: RequestMetrics, adapter: AdapterSpec | None, on_end: Callable[[RequestEnd], None] | None
    ) -> None:
        self._metrics = metrics
        self._adapter = adapter
        self._on_end = on_end
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._finish_reasons: Counts[str] = Counts()
        self._first: float | None = None
        self._is_admitted = False
        self._started = metrics.clock()
        self._last: dict[int, float | None] = {}
        self._queued: set[int] = set()

    def admitted(self, num_sequences: int, num_prompt_tokens: int) -> None:
        if self._adapter is not None:
            self._metrics.use_adapter(self._adapter.content_hash)
        self._is_admitted, self._num_prompt_tokens = True, num_prompt_tokens
        self._metrics.admitted.inc(num_sequences)
        self._metrics.prompt_tokens.inc(num_prompt_tokens)
        self._last = dict.fromkeys(range(num_sequences))
        self._queued = set(self._last)

    def queued(self, index: int, seconds: float | None) -> None:
        """A sequence waited so long for its first step, as far as that is known; it counts once."""
        if seconds is not None and index in self._queued:
            self._queued.discard(index)
            self._metrics.queue.observe(seconds)

    def progress(self, index: int, num_tokens: int, finish_reason: str | None) -> None:
        """New tokens of a sequence, or its end; what comes after the end is ignored."""
        if index not in self._last:
            return
        metrics, now = self._metrics, self._metrics.clock()
        if num_tokens:
            last = self._last[index]
            metrics.generation_tokens.inc(num_tokens)
            self._num_output_tokens += num_tokens
            if last is None:
                self._first = now if self._first is None else self._first
                metrics.first_token.observe(now - self._started)
            else:
                metrics.inter_token.observe((now - last) / num_tokens)
            self._last[index] = now
        if finish_reason is not None:
            del self._last[index]
            metrics.finished.labels(finish_reason).inc()
            self._finish_reasons[finish_reason] += 1
            if finish_reason in ("stop", "length"):
                metrics.whole.observe(now - self._started)

    def close(self, finish_reason: str) -> None:
        """Everything that has not ended ends for this reason."""
        for index in list(self._last):
            self.progress(index, 0, finish_reason)

    def end(self) -> None:
        """The answer is written, or nobody waits for it any more: what has not ended is aborted. Idempotent."""
        self.close("abort")
        tell, self._on_end = self._on_end, None
        if tell is None or not self._is_admitted:
            return
        first = None if self._first is None else self._first - self._started
        counts = self._num_prompt_tokens, self._num_output_tokens, dict(self._finish_reasons)
        tell(RequestEnd(*counts, first, self._metrics.clock() - self._started))


class ErrorCountMiddleware:
    """Counts requests with prompts that are answered by an error status; outermost, so that it sees every refusal.

    ``on_answer``: Hears of each of these requests: the scope, the status, and the seconds until it was answered.
    """

    def __init__(
        self, app: ASGIApp, metrics: RequestMetrics, on_answer: Callable[[Scope, int, float], None] | None = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in _COUNTED_PATHS:
            await self._app(scope, receive, send)
            return
        started = self._metrics.clock()
        status = 500  # What the server answers when nothing below it did.

        async def noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_status)
        finally:
            if status >= 400 and status != CLIENT_CLOSED_REQUEST:
                self._metrics.refused.labels(str(status)).inc()
            if self._on_answer is not None:
                self._on_answer(scope, status, self._metrics.clock() - started)
