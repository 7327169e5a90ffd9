"""Events that are written together are those that would be written one by one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from peft_dist.api.chat import ChatFormat
from peft_dist.api.chunks import ChunkWriter
from peft_dist.api.completions import CompletionFormat
from peft_dist.api.errors import ApiError
from peft_dist.api.generation import MAX_BATCH, Generation
from peft_dist.api.options import ServerOptions
from peft_dist.api.prompts import Prompt
from peft_dist.api.protocol_chat import ChatCompletionRequest
from peft_dist.api.protocol_completions import CompletionRequest
from peft_dist.api.state import ServerState
from peft_dist.api.unread import UnreadWatch
from peft_dist.core.messages import SequenceProgress
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.streams import Stream
from tests.api.http_support import BASE, TOKENIZER, ScriptedClient, encode

TEXT = 'hello "w" \\ <é>\n\t\u2028 😀 ok'
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "usage": {"stream_options": {"include_usage": True}},
    "running usage": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "token ids": {"return_token_ids": True},
    "stop": {"stop": ["ok"]},
    "two": {"n": 2},
}


class ReadyClient(ScriptedClient):
    """Everything is there before the first piece is asked for."""

    def __init__(self, progress: list[tuple[int, SequenceProgress]]) -> None:
        super().__init__()
        self.progress = progress

    def generate(self, request_id: str, prompt: list[int], params: SamplingParams, model: str | None) -> Any:
        stream = Stream(params.n, lambda: None, lambda change: None)
        for index, one in self.progress:
            stream.put(index, one)
        return stream


def drawn(n: int) -> list[tuple[int, SequenceProgress]]:
    """Each sequence draws TEXT, token by token in turn."""
    ids = encode(TEXT)
    ends = {len(ids) - 1: "length"}
    return [
        (i, SequenceProgress(f"r-{i}", [t], k, finish_reason=ends.get(k))) for k, t in enumerate(ids) for i in range(n)
    ]


def body_of(kind: str, fields: dict[str, Any]) -> Any:
    if kind == "chat":
        messages = [{"role": "user", "content": "hello"}]
        return ChatCompletionRequest.model_validate({"model": BASE, "messages": messages, "stream": True, **fields})
    return CompletionRequest.model_validate({"model": BASE, "prompt": "hello", "stream": True, **fields})


async def written(
    body: Any, progress: list[tuple[int, SequenceProgress]], limit: int | None
) -> tuple[bytes, list[int]]:
    """All events of an answer, and the sizes of the batches; ``limit`` None is what the writer allows."""
    client = ReadyClient(progress)
    state = ServerState(client, TOKENIZER, ServerOptions(), UnreadWatch(60.0))
    chosen = ChatFormat if isinstance(body, ChatCompletionRequest) else CompletionFormat
    params = body.sampling_params(100, None, None, None, {})
    watch = state.metrics.requests.watch(None)
    texts = state.tokenizer, state.decoders
    generation = await Generation.start(client, *texts, "r", [Prompt(encode("hello"))], [params], None, watch)
    writer = ChunkWriter({"id": 'x"{', "created": 1, "model": BASE}, body, generation, chosen(state, body))
    out, sizes = [writer.opening()], []
    async for batch in generation.batches(writer.max_batch if limit is None else limit):
        out.append(writer.events(batch))
        sizes.append(len(batch))
    return b"".join([*out, writer.closing()]), sizes


@pytest.mark.parametrize("kind", ["chat", "completions"])
@pytest.mark.parametrize("name", FIELDS)
def test_batches_change_no_byte(kind: str, name: str) -> None:
    body = body_of(kind, FIELDS[name])
    progress = drawn(body.num_choices)
    together, sizes = asyncio.run(written(body, progress, None))
    alone, ones = asyncio.run(written(body, progress, 1))
    assert together == alone
    assert set(ones) == {1}
    if name == "running usage":
        assert set(sizes) == {1}
    else:
        assert 1 < max(sizes) <= MAX_BATCH, "nothing, or too much, was written together"


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_what_is_written_around_the_text_is_what_the_encoder_writes(kind: str) -> None:
    """Byte for byte: clients may compare, and some read JSON by hand."""
    body = body_of(kind, FIELDS["usage"])
    events = asyncio.run(written(body, drawn(1), None))[0].decode().split("\n\n")[:-1]
    texts = []
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        assert event == "data: " + json.dumps(chunk, separators=(",", ":"), ensure_ascii=False)
        assert list(chunk) == ["id", "created", "model", "object", "choices", "usage"] and chunk["id"] == 'x"{'
        for choice in chunk["choices"]:
            texts.append(choice["delta"].get("content", "") if kind == "chat" else choice["text"])
    assert "".join(texts) == TEXT


def test_running_usage_counts_up_to_its_own_token() -> None:
    body = body_of("completions", FIELDS["running usage"])
    events = asyncio.run(written(body, drawn(1), None))[0].decode().split("\n\n")[:-2]
    counts = [json.loads(event.removeprefix("data: "))["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(set(counts)) and counts[0] == 1 and counts[-1] == len(encode(TEXT))


def test_tokens_before_a_failure_are_written() -> None:
    progress = drawn(1)[:3]
    failed = SequenceProgress("r-0", [], 3, finish_reason="error", error="logits are not finite")

    async def work() -> list[int]:
        client = ReadyClient([*progress, (0, failed)])
        state = ServerState(client, TOKENIZER, ServerOptions(), UnreadWatch(60.0))
        watch, texts = state.metrics.requests.watch(None), (state.tokenizer, state.decoders)
        params = SamplingParams(max_tokens=100)
        generation = await Generation.start(client, *texts, "r", [Prompt([1])], [params], None, watch)
        told: list[int] = []
        with pytest.raises(ApiError, match="not finite"):
            async for batch in generation.batches(MAX_BATCH):
                told += [token for piece in batch for token in piece.delta.token_ids]
        return told

    assert asyncio.run(work()) == encode(TEXT)[:3]
