"""The body of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from peft_dist.api.protocol import Count, GenerationRequest, NumLogprobs
from peft_dist.api.strict import Strict


def _parse_content(value: object) -> str:
    """A string, or text parts joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "it must be a string or a list of text parts")
    return "\n".join(_parse_part(part, index) for index, part in enumerate(value))


def _parse_part(part: object, index: int) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise PydanticCustomError("content", "part {index} is not an object", {"index": index})
    if part.get("type") != "text":
        problem = "part {index} is not of type 'text', the only one served"
        raise PydanticCustomError("content", problem, {"index": index})
    if not isinstance(part.get("text"), str):
        raise PydanticCustomError("content", "part {index} has no string 'text'", {"index": index})
    text: str = part["text"]
    return text


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
    """One turn of a conversation; text parts arrive joined by newlines."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None


class ChatWriting(Strict):
    """How a conversation is written out."""

    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatCompletionRequest(GenerationRequest, ChatWriting):
    """A conversation to answer."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Count | None = Field(None, description="Goes before `max_tokens` when both are there.")
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
