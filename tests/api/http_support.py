"""A scripted engine behind the real HTTP layer, on a real port: what the tests of the HTTP layer talk to."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peft_dist.api.options import ServerOptions
from peft_dist.api.server import build_app
from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import (
    AdapterError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    ReplicaStateError,
    UnknownModelError,
    UnknownReplicaError,
)
from peft_dist.core.messages import ReplicaDetail, ReplicaStats, SequenceProgress
from peft_dist.core.outputs import Logprob, PositionLogprobs
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.admission import check_prompt, check_token_parameters, resolve_max_tokens
from peft_dist.orchestrator.observation import MigrationView, ReplicaTotals, ReplicaView, RollingView

BASE = "tiny-base"
MAX_MODEL_LEN = 512
QUEUE_SECONDS = 0.03
PADDED_VOCAB = 300  # Beyond the tokenizer's last id, as real models have it.
SPECIALS = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w")]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'forbidden' %}{{ raise_exception('this word is not allowed') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{{ suffix_note or '' }}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": BASE, "prompt": "hello", "max_tokens": 4},
    CHAT: {"model": BASE, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
}
ANSWERS = {None: "hello wörld, naïve 😀 café", "sql": "SELECT 1", "json": '{"a": 1}'}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with a few merges, so that most characters beyond ASCII take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIALS, *alphabet, *(left + right for left, right in MERGES)]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair=None, special_tokens=[("<|bos|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=SPECIALS[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def spec(name: str) -> AdapterSpec:
    return AdapterSpec(name=name, content_hash=f"hash-{name}", path=f"/adapters/{name}", ranks={"q": 8}, num_bytes=64)


def answer_token(adapter: str | None, index: int, k: int, ends: bool) -> int:
    """Token k of sequence ``index``: the adapter's answer (after ``index`` further letters), then the end."""
    tokens = encode("abcdefgh"[:index] + ANSWERS.get(adapter, f"I am {adapter}"))
    if k < len(tokens):
        return tokens[k]
    return EOS if ends else tokens[k % len(tokens)]


def position_logprobs(token: int, top: int) -> PositionLogprobs:
    """The chosen token third best, behind the two ids that follow it."""
    ranked = [(token + 1) % 200, (token + 2) % 200, token, *((token + j) % 200 for j in range(3, 21))]
    entries = {token: Logprob(logprob=-3.0, rank=3)}
    return entries | {other: Logprob(logprob=-(i + 1.0), rank=i + 1) for i, other in enumerate(ranked[:top])}


class ScriptedStream:
    """What one request says; ``ScriptedClient`` decides what may go wrong on the way."""

    def __init__(
        self, client: ScriptedClient, request_id: str, prompt: list[int], params: SamplingParams, adapter: str | None
    ) -> None:
        self.aborted: set[int] = set()
        self.ended = False
        self._client = client
        self._args = (request_id, prompt, params, adapter)
        self._items = self._run()

    def __aiter__(self) -> ScriptedStream:
        return self

    async def __anext__(self) -> tuple[int, SequenceProgress]:
        return await self._items.__anext__()

    def take_ready(self, limit: int) -> list[tuple[int, SequenceProgress]]:
        return []

    async def aclose(self) -> None:
        if not self.ended:
            self.ended = True
            self._client.closed_early.set()
        await self._items.aclose()
        self._client.streams.pop(self._args[0], None)
        if not self._client.streams:
            self._client.idle.set()

    async def _run(self) -> AsyncGenerator[tuple[int, SequenceProgress], None]:
        running, k = set(range(self._args[2].n)), 0
        while running:
            await self._client.before_step(k)
            for index in sorted(running):
                progress = self._progress(index, k)
                if progress.finish_reason is not None:
                    running.discard(index)
                yield index, progress
            k += 1
        self.ended = True

    def _progress(self, index: int, k: int) -> SequenceProgress:
        request_id, prompt, params, adapter = self._args
        name = f"{request_id}-{index}"
        assert params.max_tokens is not None
        if index in self.aborted:
            return SequenceProgress(request_id=name, token_ids=[], first_index=k, finish_reason="abort")
        if self._client.fail_at == k:
            return SequenceProgress(
                request_id=name, token_ids=[], first_index=k, finish_reason="error", error="logits are not finite"
            )
        of_prompt = None
        if k == 0 and params.prompt_logprobs is not None:
            of_prompt = [position_logprobs(token, params.prompt_logprobs) for token in prompt[1:]]
        if params.max_tokens == 0:
            return SequenceProgress(
                request_id=name, token_ids=[], first_index=0, finish_reason="length", prompt_logprobs=of_prompt
            )
        token = answer_token(adapter, index, k, not params.ignore_eos and k >= params.min_tokens)
        reason, stop = ("length", None) if k + 1 == params.max_tokens else (None, None)
        if token == EOS and not params.ignore_eos:
            reason = "stop"
        elif token in params.stop_token_ids and k >= params.min_tokens:
            reason, stop = "stop", token
        logprobs = None if params.logprobs is None else [position_logprobs(token, params.logprobs)]
        cached = len(prompt) // 16 * 16 if self._client.prefix_hits else 0
        return SequenceProgress(
            request_id=name,
            token_ids=[token],
            first_index=k,
            logprobs=logprobs,
            prompt_logprobs=of_prompt,
            finish_reason=reason,
            stop_reason=stop,
            num_cached_tokens=cached,
            queue_seconds=QUEUE_SECONDS * (index + 1),
        )


class ScriptedRolling:
    """A rolling restart that is where a test says."""

    def __init__(self) -> None:
        self.shown = RollingView()

    def begin(self) -> RollingView:
        if self.shown.is_running:
            raise ReplicaStateError("a rolling restart is under way, at replica 0: wait for its end")
        self.shown = RollingView("running", "draining", 0, left=(1,))
        return self.shown

    def cancel(self) -> RollingView:
        if not self.shown.is_running:
            raise ReplicaStateError("no rolling restart is under way: there is nothing to stop")
        self.shown = RollingView("stopped", None, 0, left=(1,), error="somebody asked for it")
        return self.shown

    def view(self) -> RollingView:
        return self.shown


class ScriptedClient:
    """An ``EngineClient`` whose tokens are known beforehand.

    Attributes:
        hang_at, fail_at, die_at: The step at which every stream waits (for ``release``), fails, or loses its replica.
        hanging, closed_early: Set when a stream waits; when one was closed before its end.
        idle: Set while no stream is open.
        requests: Ids, parameters and model of every admitted request, in order.
        aborts: Numbers of the sequences that were aborted by themselves.
        detail, resident: What its only replica tells of itself, and content hashes of the adapters on its device.
    """

    def __init__(self) -> None:
        self.model = ModelInfo(
            model="org/tiny-base",
            served_model_name=BASE,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=PADDED_VOCAB,
            eos_token_ids=(EOS,),
            num_blocks=1000,
            num_host_blocks=0,
            block_size=16,
            device="cpu",
            dtype="float32",
            depth=0,
            attention_backend="torch",
            lora_backend="torch",
            max_loras=8,
        )
        self.loaded = {name: spec(name) for name in ("sql", "json")}
        self.detail = ReplicaDetail()
        self.resident: list[str] = []
        self.health_error: str | None = None
        self.full = False
        self.most = 300
        self.prefix_hits = False
        self.hang_at: int | None = None
        self.fail_at: int | None = None
        self.die_at: int | None = None
        self.hanging = threading.Event()
        self.closed_early = threading.Event()
        self.idle = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._released: asyncio.Event | None = None
        self.streams: dict[str, ScriptedStream] = {}
        self.requests: list[tuple[list[int], SamplingParams, str | None]] = []
        self.aborts: list[int | None] = []
        self.load_calls: list[dict[str, Any]] = []
        self.pinned: set[str] = set()
        self.drains: list[bool] = []
        self.replica_state, self.drained_to = "ready", "drained"
        self.kept: list[str] = []
        self.rolling = ScriptedRolling()
        self.migrated: MigrationView | None = None

    @property
    def is_healthy(self) -> bool:
        return self.health_error is None

    def adapters(self) -> list[AdapterSpec]:
        return list(self.loaded.values())

    def pinned_adapters(self) -> frozenset[str]:
        return frozenset(self.pinned)

    def resolve(self, name: str | None) -> AdapterSpec | None:
        if name in (None, BASE):
            return None
        adapter = name.removeprefix(f"{BASE}:")
        if adapter not in self.loaded:
            raise UnknownModelError(f"The model {name!r} does not exist.")
        return self.loaded[adapter]

    def check_room(self, num_sequences: int, param: str) -> None:
        if num_sequences > self.most:
            raise InvalidRequestError(f"{param} asks for {num_sequences} sequences", param)

    def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, model: str | None
    ) -> ScriptedStream:
        adapter = self.resolve(model)
        check_prompt(prompt_token_ids, self.model)
        check_token_parameters(params, self.model)
        params = resolve_max_tokens(len(prompt_token_ids), params, self.model)
        # What the messages between the processes cannot carry must not get this far.
        msgspec.msgpack.encode(params)
        if self.full and self.requests:
            raise QueueFullError("The queue is full.", retry_after=2.4)
        if self.health_error is not None:
            raise EngineDeadError(self.health_error)
        self.requests.append((prompt_token_ids, params, model))
        stream = ScriptedStream(self, request_id, prompt_token_ids, params, adapter.name if adapter else None)
        self.streams[request_id] = stream
        self.idle.clear()
        return stream

    def abort(self, request_id: str, sequence_index: int | None = None) -> None:
        self.aborts.append(sequence_index)
        stream = self.streams.get(request_id)
        if stream is not None:
            everything = range(128) if sequence_index is None else [sequence_index]
            stream.aborted.update(everything)

    async def before_step(self, k: int) -> None:
        await asyncio.sleep(0)
        if self.die_at == k:
            raise EngineDeadError("the replica died")
        if self.hang_at == k:
            self._loop, self._released = asyncio.get_running_loop(), self._released or asyncio.Event()
            self.hanging.set()
            await self._released.wait()
        if self.health_error is not None:
            raise EngineDeadError(self.health_error)

    def release(self) -> None:
        """Let the streams that wait go on; called from another thread."""
        assert self._loop is not None and self._released is not None
        self.hang_at = None
        self._loop.call_soon_threadsafe(self._released.set)

    async def load_adapter(self, name: str, path: str, **options: Any) -> AdapterSpec:
        self.load_calls.append({"name": name, "path": path, **options})
        if path == "broken":
            raise AdapterError("adapter_model.safetensors is truncated: copy it again")
        if self.health_error is not None:
            raise EngineDeadError(self.health_error)
        self.loaded[name] = spec(name)
        if options["pinned"]:
            self.pinned.add(name)
        return self.loaded[name]

    async def unload_adapter(self, name: str) -> None:
        if self.loaded.pop(name, None) is None:
            raise UnknownModelError(f"The adapter {name!r} is not loaded.")

    async def drain_replica(self, replica_id: int, *, restart: bool = False) -> None:
        if replica_id != 0:
            raise UnknownReplicaError(f"There is no replica {replica_id}: there are 0.")
        self.drains.append(restart)
        if self.drained_to == "draining":
            self.replica_state = "draining"
            await asyncio.Event().wait()
        self.replica_state = self.drained_to

    def resume_replica(self, replica_id: int) -> None:
        if not self.drains:
            raise ReplicaStateError(f"replica {replica_id} is ready, not draining")
        self.drains.clear()
        self.replica_state = "ready"

    async def drain_kept(self, replica_id: int) -> None:
        self.kept.append(self.replica_state)

    def stats(self) -> ReplicaStats:
        return ReplicaStats(
            num_running=len(self.streams),
            num_waiting=2,
            num_free_blocks=250,
            num_blocks=1000,
            resident_adapters=self.resident,
        )

    num_unread = 0

    def migration(self) -> MigrationView | None:
        return self.migrated

    def replicas(self) -> list[ReplicaView]:
        state = self.replica_state if self.is_healthy else "dead"
        totals = ReplicaTotals.of(self.stats(), self.detail)
        view = ReplicaView(0, state, self.model, self.stats(), self.detail, totals)
        return [] if state == "left" else [view]

    async def stop(self) -> None:
        self.health_error = "stopped"


class _NotifyingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: threading.Event) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready.set()


@contextmanager
def serving(
    client: ScriptedClient,
    options: ServerOptions | None = None,
    *,
    tokenizer: Any | None = TOKENIZER,
    wrap: Callable[[Any], Any] = lambda app: app,
) -> Iterator[str]:
    """The address of a server that lives as long as the block."""
    app = wrap(build_app(client, tokenizer, options))
    config = uvicorn.Config(app, log_level="warning", lifespan="off", proxy_headers=False)
    ready = threading.Event()
    server = _NotifyingServer(config, ready)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert ready.wait(60), "the server did not start"
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error that a response carries; fails unless it has this status and OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"] and body["error"]["type"]
    error: dict[str, Any] = body["error"]
    return error
