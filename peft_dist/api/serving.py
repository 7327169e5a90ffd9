"""The way of a request that both completions and chat go: admit, then stream or collect, then let go."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import Request
from starlette.responses import Response

from peft_dist.api import request_log
from peft_dist.api.answer_format import AnswerFormat
from peft_dist.api.body import release
from peft_dist.api.chunks import ChunkWriter
from peft_dist.api.errors import ApiError, json_response
from peft_dist.api.generation import MAX_BATCH, Generation
from peft_dist.api.prompts import Prompt
from peft_dist.api.protocol import GenerationRequest
from peft_dist.api.request_metrics import CLIENT_CLOSED_REQUEST
from peft_dist.api.state import ServerState
from peft_dist.api.streaming import ClientGoneError, EventStream, SendEvents, until_disconnect
from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import InvalidRequestError
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.admission import resolve_max_tokens


def check_combinations(body: GenerationRequest) -> None:
    """Raises InvalidRequestError for fields that do not go together."""
    if not body.stream and body.stream_options is not None and body.stream_options.asks:
        raise InvalidRequestError("stream_options needs stream=true: leave it out, or stream", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequestError("prompt_logprobs is not streamed: leave out one of the two", "prompt_logprobs")


def fit_max_tokens(
    prompt: Prompt, params: SamplingParams, model: ModelInfo, names: Mapping[str, str]
) -> SamplingParams:
    """``params`` with ``max_tokens`` set to what the model's length leaves when it is None.

    ``names`` maps "prompt" and "max_tokens" to what they are called in the body.

    Raises:
        ApiError: 400 ``context_length_exceeded``.
    """
    try:
        return resolve_max_tokens(len(prompt.token_ids), params, model)
    except InvalidRequestError as error:
        param = names.get(error.param or "", error.param)
        raise ApiError(400, str(error), param=param, code="context_length_exceeded") from error


async def serve_generation(
    state: ServerState,
    http: Request,
    body: GenerationRequest,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    names: Mapping[str, str],
    kind: str,
    answer_format: AnswerFormat,
) -> Response:
    """Run a validated request and answer it as its body asks, as a stream or whole."""
    request_id = f"{kind}-{uuid.uuid4().hex}"
    target = state.target(body.model)
    on_end = request_log.of(http, request_id, body.model) if state.options.log_requests else None
    watch = state.metrics.requests.watch(state.client.resolve(target), on_end)
    try:
        generation = await Generation.start(
            state.client, state.tokenizer, state.decoders, request_id, prompts, params, target, watch
        )
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), names.get(error.param or "", error.param)) from error
    release(http.scope)
    head = {"id": request_id, "created": int(time.time()), "model": body.model}
    headers = {"X-Request-Id": request_id}
    if body.stream:
        return EventStream(partial(_stream, head, body, generation, answer_format), generation.aclose, headers)
    try:
        await until_disconnect(http.receive, _collect(generation, answer_format))
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        await generation.aclose()
    answer = {**answer_format.answer(generation), "usage": generation.usage.as_dict()}
    return json_response({**head, "object": answer_format.object_name, **answer}, headers=headers)


async def _collect(generation: Generation, answer_format: AnswerFormat) -> None:
    async with aclosing(generation.batches(MAX_BATCH)) as batches:
        async for batch in batches:
            for piece in batch:
                answer_format.take(piece)


async def _stream(
    head: Mapping[str, Any],
    body: GenerationRequest,
    generation: Generation,
    answer_format: AnswerFormat,
    send: SendEvents,
) -> None:
    writer = ChunkWriter(head, body, generation, answer_format)
    if opening := writer.opening():
        await send(opening)
    async with aclosing(generation.batches(writer.max_batch)) as batches:
        async for batch in batches:
            if events := writer.events(batch):
                await send(events)
    if closing := writer.closing():
        await send(closing)
