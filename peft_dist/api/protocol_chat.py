"""The body of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from peft_dist.api.content import joined_content
from peft_dist.api.protocol import Count, GenerationRequest, NumLogprobs
from peft_dist.api.protocol_tools import Tool, ToolCall, ToolChoice
from peft_dist.api.strict import Strict


def _parse_content(value: object) -> str:
    try:
        return joined_content(value)
    except ValueError as error:
        raise PydanticCustomError("content", "{problem}", {"problem": str(error)}) from error


Content = Annotated[
    str,
    BeforeValidator(_parse_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]


class ChatMessage(Strict):
    """One turn of a conversation; text parts arrive joined by newlines. ``tool`` tells what a call came to."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    content: Content | None = Field(None, validate_default=True)

    @field_validator("tool_calls")
    @classmethod
    def _calls(cls, calls: list[ToolCall] | None, info: ValidationInfo) -> list[ToolCall] | None:
        if calls and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("tool_calls", "only a message of the assistant has them")
        return calls

    @field_validator("tool_call_id")
    @classmethod
    def _called(cls, call_id: str | None, info: ValidationInfo) -> str | None:
        if call_id is not None and info.data.get("role", "tool") != "tool":
            raise PydanticCustomError("tool_call_id", "only a message of a tool has one")
        return call_id

    @field_validator("content")
    @classmethod
    def _said(cls, content: str | None, info: ValidationInfo) -> str | None:
        if content is None and not info.data.get("tool_calls"):
            raise PydanticCustomError("content", "it is missing: only a message with tool_calls goes without")
        return content


class ChatWriting(Strict):
    """How a conversation is written out."""

    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class ChatCompletionRequest(GenerationRequest, ChatWriting):
    """A conversation to answer."""

    messages: list[ChatMessage] = Field(min_length=1)
    tool_choice: ToolChoice = Field(None, description="Of `tools`, `auto` if not given.")
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Count | None = Field(None, description="Goes before `max_tokens` when both are there.")
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
