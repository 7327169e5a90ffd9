"""What every route of one server shares."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from peft_dist.api.detokenizer import Decoders
from peft_dist.api.metrics import ServerMetrics
from peft_dist.api.options import ServerOptions
from peft_dist.api.prompts import PromptReader
from peft_dist.api.structured import StructureChecks
from peft_dist.api.token_bytes import TokenBytes
from peft_dist.api.tokenizing import template_source
from peft_dist.api.tool_readers import reader_for
from peft_dist.api.unread import UnreadWatch
from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import EngineDeadError
from peft_dist.orchestrator.client import EngineClient


class ServerState:
    """The engine client, the tokenizer (None for a model without one) and the options of one application."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Any | None,
        options: ServerOptions,
        unread: UnreadWatch,
        not_served: Sequence[str] = (),
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.options = options
        self._not_served = not_served
        self.metrics = ServerMetrics(client, options.metrics_max_adapters, unread)
        self.prompts = PromptReader(tokenizer, options)
        self.structures = StructureChecks(tokenizer, client.model.eos_token_ids)
        self.tool_reader = _tool_reader(tokenizer, options)
        self.texts = TokenBytes(tokenizer)
        self.decoders = None if tokenizer is None else Decoders(tokenizer)
        self.started = int(time.time())

    @property
    def model(self) -> ModelInfo:
        """What the replica told of the base model."""
        return self.client.model

    def not_served(self) -> list[str]:
        """Names of adapters that were refused at the start, and have not been loaded since."""
        served = {spec.name for spec in self.client.adapters()}
        return sorted(name for name in set(self._not_served) if name not in served)

    def check_alive(self) -> None:
        """Raises EngineDeadError when nothing can be generated now."""
        if not self.client.is_healthy:
            raise EngineDeadError(self.client.health_error or "the engine is not running")

    def target(self, name: str) -> str:
        """``name`` as the engine client knows it: further names of the base become its own.

        Raises:
            UnknownModelError: neither the base nor an adapter has this name.
        """
        for alias in self.options.served_names:
            if name == alias or name.startswith(f"{alias}:"):
                name = self.model.served_model_name + name.removeprefix(alias)
                break
        self.client.resolve(name)
        return name


def _tool_reader(tokenizer: Any | None, options: ServerOptions) -> str | None:
    """Who reads calls of tools that the model writes of itself; None: nobody knows how it does."""
    if options.tool_call_parser != "auto":
        return options.tool_call_parser
    return None if tokenizer is None else reader_for(template_source(tokenizer, options.chat_template, with_tools=True))
