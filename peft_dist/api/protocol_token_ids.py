"""The bodies of ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from peft_dist.api.protocol import Count
from peft_dist.api.protocol_chat import ChatCompletionRequest, ChatMessage, ChatWriting
from peft_dist.api.protocol_completions import CompletionRequest
from peft_dist.api.strict import Strict

_OF_ANSWERS = CompletionRequest.model_fields.keys() | ChatCompletionRequest.model_fields.keys()
Model = Annotated[str | None, Field(description="The base model (as null), an adapter, or `base:adapter`.")]


class TokenizeRequest(ChatWriting):
    """A text, or a conversation, to turn into token ids."""

    model: Model = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    return_token_strs: bool | None = None

    @property
    def unknown(self) -> dict[str, Any]:
        """Further fields. Those that only say how to answer are none: whole bodies may be sent to have them counted."""
        return {name: value for name, value in (self.model_extra or {}).items() if name not in _OF_ANSWERS}


class DetokenizeRequest(Strict):
    """Token ids to turn into a text."""

    model: Model = None
    tokens: list[Count]
