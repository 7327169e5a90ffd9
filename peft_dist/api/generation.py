"""All sequences that one HTTP request asks for, as one flow of text pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from peft_dist.api.detokenizer import Decoders
from peft_dist.api.errors import ApiError
from peft_dist.api.output_processor import Delta, SequenceOutput
from peft_dist.api.prompts import Prompt
from peft_dist.api.request_metrics import GenerationWatch
from peft_dist.core.errors import PeftDistError
from peft_dist.core.messages import SequenceProgress
from peft_dist.core.outputs import PositionLogprobs
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import EngineClient, RequestStream

_Item = tuple[int, SequenceProgress]
_Queue = asyncio.Queue[tuple[int, list[_Item] | None]]
# Pieces that go out together at most: a client that lags behind has little more than this in its socket's buffer.
MAX_BATCH = 64


@dataclass(slots=True)
class Choice:
    """One sequence of the answer; ``index`` is the prompt's number times n plus the sequence's."""

    index: int
    prompt: Prompt
    output: SequenceOutput
    started: bool = False
    finished: bool = False


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What became known of one choice. ``prompt_logprobs`` comes with the first piece when asked for."""

    choice: Choice
    delta: Delta
    is_first: bool
    prompt_logprobs: list[PositionLogprobs | None] | None


@dataclass(slots=True)
class Usage:
    """Tokens of all prompts and choices of an answer so far.

    ``queue_time``: Seconds from admission to the first step of the choice that waited longest; None before any ran.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_time: float | None = None

    def begun(self, seconds: float | None) -> None:
        """Another choice waited so long for its first step, as far as that is known."""
        if seconds is not None:
            self.queue_time = max(seconds, self.queue_time or 0.0)

    def as_dict(self) -> dict[str, Any]:
        """``usage`` as the OpenAI API writes it, and the time in the queue."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "queue_time": self.queue_time,
        }


class Generation:
    """Running requests of one or more prompts. Whoever starts one calls ``aclose`` in a ``finally``."""

    def __init__(
        self, client: EngineClient, request_id: str, prompts: Sequence[Prompt], n: int, watch: GenerationWatch
    ) -> None:
        self.request_id = request_id
        self.choices: list[Choice] = []
        self.usage = Usage(sum(len(prompt.token_ids) for prompt in prompts))
        self._client = client
        self._n = n
        self._watch = watch
        self._streams: list[RequestStream] = []
        self._num_left = 0

    @classmethod
    async def start(
        cls,
        client: EngineClient,
        tokenizer: Any | None,
        decoders: Decoders | None,
        request_id: str,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        model: str | None,
        watch: GenerationWatch,
    ) -> Generation:
        """Admit every prompt, or none. ``params`` has one entry for each prompt, all with the same ``n``.

        Raises:
            UnknownModelError, InvalidRequestError, QueueFullError, EngineDeadError: a prompt was not admitted.
        """
        generation = cls(client, request_id, prompts, params[0].n, watch)
        admitted = False
        try:
            if len(prompts) > 1:
                # Before the first one takes a place that others could have until the last one finds none.
                client.check_room(len(prompts) * params[0].n, "prompt")
            for number, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
                stream = client.generate(f"{request_id}-{number}", prompt.token_ids, own, model)
                generation._streams.append(stream)
                generation._add_choices(tokenizer, decoders, prompt, own)
            admitted = True
            watch.admitted(len(generation.choices), generation.usage.prompt_tokens)
        finally:
            if not admitted:
                await generation.aclose()
        return generation

    def _add_choices(
        self, tokenizer: Any | None, decoders: Decoders | None, prompt: Prompt, params: SamplingParams
    ) -> None:
        for i in range(self._n):
            output = SequenceOutput(tokenizer, prompt.token_ids, params, i, decoders)
            self.choices.append(Choice(len(self.choices), prompt, output))
        self._num_left = len(self.choices)

    async def aclose(self) -> None:
        """Abort what still runs. Idempotent."""
        self._watch.end()
        for stream in self._streams:
            await stream.aclose()

    def batches(self, limit: int) -> Batches:
        """Pieces of all choices as they come, those that are there already together, until every choice has ended.

        Args:
            limit: Pieces of one batch at most.
        """
        return Batches(self, limit)

    def _count_ends(self, batch: Sequence[Piece]) -> bool:
        """Whether every choice has ended with this batch."""
        for piece in batch:
            if piece.delta.finish_reason is not None:
                self._num_left -= piece.choice.finished
        return not self._num_left

    def _batch(self, number: int, items: Sequence[_Item]) -> tuple[list[Piece], PeftDistError | None]:
        """Pieces of one prompt's choices, and what ended them before the last item: they were drawn all the same."""
        batch: list[Piece] = []
        for index, progress in items:
            choice = self.choices[number * self._n + index]
            if choice.finished:
                continue
            try:
                batch.append(self._piece(choice, number, index, progress))
            except PeftDistError as error:
                return batch, error
        return batch, None

    def _piece(self, choice: Choice, number: int, index: int, progress: SequenceProgress) -> Piece:
        if progress.error is not None:
            raise ApiError(500, f"the model failed on this request: {progress.error}", code="generation_failed")
        is_first, choice.started = not choice.started, True
        if is_first:
            self.usage.begun(progress.queue_seconds)
            self.usage.cached_tokens += progress.num_cached_tokens if index == 0 else 0
        delta = choice.output.add(progress)
        self.usage.completion_tokens += len(delta.token_ids)
        choice.finished = delta.finish_reason is not None
        if progress.queue_seconds is not None:
            self._watch.queued(choice.index, progress.queue_seconds)
        self._watch.progress(choice.index, len(delta.token_ids), delta.finish_reason)
        if choice.output.must_abort:
            self._client.abort(f"{self.request_id}-{number}", index)
        positions = [None, *(progress.prompt_logprobs or [])] if is_first else None
        return Piece(choice, delta, is_first, positions)

    async def _progress(self) -> AsyncGenerator[tuple[int, list[_Item]], None]:
        """(number of the prompt, progress of its sequences) of several streams."""
        queue: _Queue = asyncio.Queue()
        # Whoever reads slowly leaves the rest in the streams.
        room = asyncio.Semaphore(MAX_BATCH)
        pumps = [asyncio.create_task(_pump(*each, queue, room)) for each in enumerate(self._streams)]
        running = len(pumps)
        try:
            while running:
                number, items = await queue.get()
                if items is None:
                    await pumps[number]  # Raises what ended it.
                    running -= 1
                else:
                    room.release()
                    yield number, items
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


class Batches:
    """The iterator that ``Generation.batches`` returns; to be closed. Not a generator, for each token passes here.

    Raises:
        ApiError: 500, a sequence failed.
        EngineDeadError: the replica died, or the server stops.
    """

    def __init__(self, generation: Generation, limit: int) -> None:
        self._generation = generation
        self._more = limit - 1
        # The usual one alone, or what brings several together.
        self._stream = generation._streams[0]
        self._flow = generation._progress() if len(generation._streams) > 1 else None
        self._error: PeftDistError | None = None
        self._is_over = False

    def __aiter__(self) -> Batches:
        return self

    async def __anext__(self) -> list[Piece]:
        generation = self._generation
        try:
            while self._error is None and not self._is_over:
                if self._flow is None:
                    number, items = 0, [await self._stream.__anext__(), *self._stream.take_ready(self._more)]
                else:
                    number, items = await self._flow.__anext__()
                batch, self._error = generation._batch(number, items)
                self._is_over = generation._count_ends(batch)
                if batch:
                    return batch
            if self._error is not None:
                raise self._error
        except PeftDistError:
            generation._watch.close("error")
            raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Read no further."""
        if self._flow is not None:
            await self._flow.aclose()


async def _pump(number: int, stream: RequestStream, queue: _Queue, room: asyncio.Semaphore) -> None:
    """Hand on a stream's items, each once there is room for it, then None."""
    try:
        async for item in stream:
            queue.put_nowait((number, [item]))
            await room.acquire()
    finally:
        queue.put_nowait((number, None))
