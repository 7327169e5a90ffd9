"""The whole system in one process: offline generation with many adapters."""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm.auto import tqdm

from peft_dist.api.offline_inputs import (
    Prompt,
    Prompts,
    align_adapter_names,
    align_params,
    check_adapter,
    check_adapters,
    check_options,
    check_params,
    check_template,
    split_conversations,
    split_prompts,
)
from peft_dist.api.output_processor import RequestOutputs
from peft_dist.api.structured import StructureChecks
from peft_dist.api.tokenizing import apply_template, encode, load_tokenizer
from peft_dist.api.turns import Turns, in_turn
from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.collector import frozen_heap
from peft_dist.core.config import EngineConfig, ModelInfo, check_pinned
from peft_dist.core.errors import ConfigError, EngineDeadError
from peft_dist.core.messages import (
    AbortRequest,
    AdapterResult,
    AddRequest,
    AnyCommand,
    LoadAdapter,
    PinAdapter,
    Progress,
    Ready,
    UnloadAdapter,
)
from peft_dist.core.outputs import RequestOutput
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.commands import make_request
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.events import RequestFailed, SequenceEvent
from peft_dist.orchestrator.records import Outgoing
from peft_dist.runner.adapter_source import check_exists, not_there_in_time, resolve_adapter
from peft_dist.runner.background import TimeLimitError, call_in_time
from peft_dist.runner.loader import resolve_device
from peft_dist.runner.replica import Replica, build_replica, release_memory

_REPLICA = 0
_UNBOUNDED = 2**62
# Nobody waits for the next token while prompts are read: so many at once keep a GPU's products at their best.
_MANY_TOKENS = 8192


class LLM(Turns):
    """A base model and its adapters, for offline use.

    It is the server without sockets: the same orchestrator admits requests, the same engine runs them. Calls from
    several threads take turns; several ``LLM`` objects may live in one process.

    Args:
        model: Folder or hub id of the base model.
        adapters: Name to folder or hub id (``org/name@revision``) of each adapter.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's, on a CPU float32), a name or a ``torch.dtype``.
        tokenizer: A Hugging Face tokenizer to use instead of the model's own. A folder without a tokenizer
            works with token ids.
        allow_pickle: Read adapters saved as pickle (``.bin``), which can be made to run code.
        options: Any field of ``EngineConfig``. On a GPU ``max_num_batched_tokens`` is 8192 where none is given.

    Raises:
        ConfigError: the model cannot be loaded or an option is wrong.
        AdapterError: an adapter was refused.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        tokenizer: Any | None = None,
        allow_pickle: bool = False,
        **options: Any,
    ) -> None:
        check_options(options, [field.name for field in fields(EngineConfig)])
        check_adapters(adapters, check_exists)
        config = EngineConfig(model=str(model), device=device, dtype=str(dtype).removeprefix("torch."), **options)
        check_pinned(config, adapters or ())
        if "max_num_batched_tokens" not in options and resolve_device(device).type == "cuda":
            config = replace(config, max_num_batched_tokens=_MANY_TOKENS)
        self._allow_pickle = allow_pickle
        super().__init__()
        self._replica: Replica | None = build_replica(config)
        try:
            self._info = self._replica.model_info
            self._orchestrator = Orchestrator(OrchestratorOptions(config.max_num_seqs, _UNBOUNDED, config.seed))
            self._epoch = self._orchestrator.add_replica(_REPLICA, time.monotonic()).epoch
            self._observe(Ready(model=self._info, pid=0))
            self._ids = itertools.count()
            self.tokenizer: Any | None = tokenizer if tokenizer is not None else self._load_tokenizer(config)
            self._structures = StructureChecks(self.tokenizer, self._info.eos_token_ids)
            self._replica.runner.grammars = self._structures.grammars(self._info.vocab_size)
            for name, path in (adapters or {}).items():
                self._load_adapter(path, name, pin=name in config.pinned_adapters)
            self._replica.warm_up(progress=True)
        except BaseException:
            # Whatever it was, Ctrl-C included: nobody else can give the model's memory back.
            self.close()
            raise

    @property
    def model_info(self) -> ModelInfo:
        """What was measured of the model when it was loaded."""
        return self._info

    @property
    def adapters(self) -> list[AdapterSpec]:
        """The adapters that can be named now."""
        return self._orchestrator.adapters.specs()

    @in_turn
    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter_names: str | Sequence[str | None] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer every prompt, all together, each through its own adapter.

        Args:
            prompts: One prompt or a list of them; each a string, a list (or array, or tensor) of token ids, or a
                dict with ``prompt_token_ids`` (and perhaps ``prompt``).
            sampling_params: One for all, or one for each prompt.
            adapter_names: One for all, or one for each prompt: an adapter's name, or None, "__base__" or the
                model's own name for the base.

        Returns:
            One output for each prompt, in order. A sequence whose logits were not finite ends alone, with the
            finish reason "error" and the cause in ``error``.

        Raises:
            InvalidRequestError, UnknownModelError: a prompt cannot be served; nothing was run then.
        """
        requests = [self._tokenize(prompt) for prompt in split_prompts(prompts)]
        params = align_params(sampling_params, len(requests))
        names = align_adapter_names(adapter_names, len(requests))
        return self._run(requests, params, names, use_tqdm)

    @in_turn
    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter_names: str | Sequence[str | None] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_arguments: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of ``{"role", "content"}``) or a list of them; otherwise as ``generate``.

        Raises:
            ConfigError: the model has no tokenizer.
            InvalidRequestError, UnknownModelError: as in ``generate``, or the template is missing or refuses.
        """
        check_template(self.tokenizer, self._info.model, chat_template)
        arguments = {"add_generation_prompt": add_generation_prompt, **template_arguments}
        conversations = split_conversations(messages)
        texts = [apply_template(self.tokenizer, own, chat_template, arguments) for own in conversations]
        # The template writes the special tokens itself.
        requests = [Prompt(encode(self.tokenizer, text, "messages", special=False), text) for text in texts]
        params = align_params(sampling_params, len(requests))
        names = align_adapter_names(adapter_names, len(requests))
        return self._run(requests, params, names, use_tqdm)

    @in_turn
    def load_adapter(
        self, path: str | Path, name: str, *, replace: bool = False, pin: bool | None = None
    ) -> AdapterSpec:
        """Load an adapter from a folder or the hub under a name.

        Args:
            pin: Bring it to the device at once and keep it there until it is unloaded. None: if what it replaces is
                pinned; False unpins that.

        Raises:
            AdapterError: it was refused, was not there within ``adapter_load_timeout`` seconds (its download included),
                the name is taken, or pins would leave no room for another; the others are untouched.
        """
        spec = self._load_adapter(path, name, replace=replace, pin=pin)
        self._open.kernels.finish()
        return spec

    def _load_adapter(
        self, path: str | Path, name: str, *, replace: bool = False, pin: bool | None = None
    ) -> AdapterSpec:
        check_adapter(path, name)
        call_id, sent = self._orchestrator.load_adapter(
            name, str(path), replace=replace, allow_pickle=self._allow_pickle, pinned=pin
        )
        pinned = any(isinstance(out.command, LoadAdapter) and out.command.pinned for out in sent)
        spec = None
        try:
            found = self._inspect(str(path), name)
            self._open.register_adapter(found, allow_pickle=self._allow_pickle, pinned=pinned)
            spec = found
        finally:
            # Whatever happens, the orchestrator must hear the end of the load that it began.
            error = None if spec else "refused"
            self._observe(AdapterResult(call_id=call_id, spec=spec, error=error))
            self._orchestrator.drain_events()
        return spec

    @in_turn
    def unload_adapter(self, name: str) -> None:
        """Raises UnknownModelError when no adapter has this name."""
        self._send(self._orchestrator.unload_adapter(name))

    @in_turn
    def close(self) -> None:
        """Give back the model's memory. Using the object afterwards raises; closing again does nothing."""
        if self._replica is not None:
            replica, self._replica = self._replica, None
            replica.close()
            del replica
            release_memory()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _open(self) -> Replica:
        if self._replica is None:
            raise EngineDeadError("this LLM is closed: make a new one")
        return self._replica

    def _inspect(self, path: str, name: str) -> AdapterSpec:
        replica, allow_pickle = self._open, self._allow_pickle

        def find() -> AdapterSpec:
            folder = resolve_adapter(path, allow_pickle=allow_pickle)
            return replica.inspect_adapter(name, folder, allow_pickle=allow_pickle)

        try:
            return call_in_time("adapter-fetcher", find, replica.load_timeout)
        except TimeLimitError:
            raise not_there_in_time(name, path, replica.load_timeout) from None

    def _load_tokenizer(self, config: EngineConfig) -> Any | None:
        if self._info.tokenizer is None:
            return None
        return load_tokenizer(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)

    def _tokenize(self, prompt: Prompt) -> Prompt:
        if prompt.token_ids is not None:
            return prompt
        if self.tokenizer is None:
            raise ConfigError(f"{self._info.model} has no tokenizer: give prompts as lists of token ids")
        return Prompt(encode(self.tokenizer, prompt.text or "", "prompt", special=True), prompt.text)

    def _run(
        self, prompts: list[Prompt], params: list[SamplingParams], names: list[str | None], use_tqdm: bool
    ) -> list[RequestOutput]:
        check_params(params, self.tokenizer, self._structures)
        replica = self._open
        admitted: list[str] = []
        outputs: dict[str, RequestOutputs] = {}
        try:
            for prompt, own, name in zip(prompts, params, names, strict=True):
                request_id = str(next(self._ids))
                spec = self._orchestrator.adapters.resolve(name)
                new = NewRequest(request_id, prompt.token_ids or [], own, name)
                # Before anything is built from them, the ids must be the model's.
                commands = self._orchestrator.submit(new, time.monotonic())
                admitted.append(request_id)
                outputs[request_id] = RequestOutputs(
                    request_id, self.tokenizer, prompt.text, new.prompt_token_ids, own, spec.name if spec else None
                )
                self._send(commands)
            with (
                frozen_heap(),
                tqdm(total=len(outputs), disable=not use_tqdm, desc="prompts", unit="prompt") as bar,
            ):
                while self._orchestrator.num_unfinished:
                    progress = replica.engine.step(time.monotonic())
                    self._observe(Progress(sequences=progress, stats=replica.engine.stats()))
                    self._hand_out(outputs, bar)
                    if replica.engine.waits_for_load:
                        select.select([replica.fileno()], [], [])
        finally:
            # After an error or an interrupt nothing of this call goes on.
            for request_id in admitted:
                self._send(self._orchestrator.abort(request_id, time.monotonic()))
            self._orchestrator.drain_events()
        return [output.output() for output in outputs.values()]

    def _hand_out(self, outputs: dict[str, RequestOutputs], bar: tqdm[Any]) -> None:
        for event in self._orchestrator.drain_events():
            if isinstance(event, RequestFailed):
                raise event.error
            if not isinstance(event, SequenceEvent) or outputs[event.request_id].finished:
                continue
            output = outputs[event.request_id]
            if output.add(event.sequence_index, event.progress).must_abort:
                self._send(self._orchestrator.abort(event.request_id, time.monotonic(), event.sequence_index))
            if output.finished:
                bar.update()

    def _observe(self, report: Ready | Progress | AdapterResult) -> None:
        self._send(self._orchestrator.observe(_REPLICA, self._epoch, report, time.monotonic()))

    def _send(self, commands: list[Outgoing]) -> None:
        for outgoing in commands:
            self._obey(outgoing.command)

    def _obey(self, command: AnyCommand) -> None:
        """What a worker does with a command, without a worker between."""
        engine = self._open.engine
        if isinstance(command, AddRequest):
            engine.add_request(make_request(command, engine.adapters, time.monotonic()))
        elif isinstance(command, AbortRequest):
            engine.abort(command.request_ids)
        elif isinstance(command, PinAdapter):
            engine.pin_adapter(command.name, command.content_hash)
        elif isinstance(command, UnloadAdapter):
            engine.forget_adapter(command.content_hash)
