"""Options of the HTTP layer, built once at the entry point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_dist.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the HTTP server behaves; keys are kept out of ``repr`` so that they never reach a log.

    Attributes:
        api_keys: Any of them opens ``/v1``; empty leaves it open to everyone.
        admin_key: Opens loading and unloading of adapters (and the rest of ``/v1``); without it these two
            answer only to clients on this machine.
        adapter_dir: The only folder from which adapters are loaded over HTTP; None sets no bound.
        allow_hub_load: Let ``/v1/load_lora_adapter`` fetch from the Hugging Face Hub.
        allow_pickle: Let adapters loaded over HTTP be pickle files, which run code when they are read.
        served_names: Further names of the base model.
        chat_template: Jinja source used in place of the tokenizer's own chat template.
        tool_call_parser: How the model writes calls of tools: one of ``tool_readers.READERS``, or "auto", as its chat
            template shows.
        response_role: The role that answers of ``/v1/chat/completions`` carry.
        sampling_defaults: Fields of ``SamplingParams`` for requests that leave them out, in place of OpenAI's.
        cors_origins: Whose pages may ask this server from a browser, such as "https://chat.example"; "*": any page's.
        max_body_bytes: Largest request body in bytes.
        metrics_max_adapters: Adapters that have series of their own in ``/metrics``; the rest is summed.
        log_requests: Write a line to the log at the end of each request with a prompt, without a word of it.
        unread_timeout: Seconds for which a client may read nothing of its answer, or send nothing of its body; then its
            connection is cut.
        tokenize_in_thread_chars: Prompts from this many characters on are tokenised outside the event loop.

    Raises:
        ConfigError: a key is empty, ``adapter_dir`` is not a folder, or a limit is too small.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_key: str | None = field(default=None, repr=False)
    adapter_dir: Path | None = None
    allow_hub_load: bool = False
    allow_pickle: bool = False
    served_names: tuple[str, ...] = ()
    chat_template: str | None = None
    tool_call_parser: str = "auto"
    response_role: str = "assistant"
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    metrics_max_adapters: int = 100
    log_requests: bool = False
    unread_timeout: float = 60.0
    tokenize_in_thread_chars: int = 16_384

    def __post_init__(self) -> None:
        if not all(self.api_keys) or self.admin_key == "":
            raise ConfigError("an API key or admin key is empty: leave the option out, or give a key")
        if self.adapter_dir is not None and not Path(self.adapter_dir).is_dir():
            raise ConfigError(f"adapter_dir={str(self.adapter_dir)!r} is not a folder: create it first")
        if self.max_body_bytes < 1:
            raise ConfigError(f"max_body_bytes={self.max_body_bytes} is too small: give at least 1")
        if self.metrics_max_adapters < 0:
            raise ConfigError(f"metrics_max_adapters={self.metrics_max_adapters} must be 0 (all are summed) or more")
