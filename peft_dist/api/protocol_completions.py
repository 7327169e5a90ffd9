"""The body of ``/v1/completions``."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from peft_dist.api.protocol import GenerationRequest, NumLogprobs

DEFAULT_MAX_TOKENS = 16


def is_token_ids(value: object) -> bool:
    """Whether this is a list of integers, an empty one included; booleans are none."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def _parse_prompt(value: object) -> list[str | list[int]]:
    """A string, a list of ids, or a list of either, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("prompt", "it must be a string, a list of token ids, or a list of either")
    if not value:
        raise PydanticCustomError("prompt", "it must hold at least one token")
    if is_token_ids(value):
        return [value]
    for index, item in enumerate(value):
        if not isinstance(item, str) and not is_token_ids(item):
            problem = "element {index} is neither a string nor a list of token ids"
            raise PydanticCustomError("prompt", problem, {"index": index})
    return value


Prompts = Annotated[
    list[str | list[int]],
    BeforeValidator(_parse_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class CompletionRequest(GenerationRequest):
    """Prompts to continue."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
