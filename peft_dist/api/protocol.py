"""Request fields that completions and chat share. Types are strict: a boolean is no integer, "1" no number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from peft_dist.api.protocol_structured import Asked, StructuredFields
from peft_dist.api.strict import Strict
from peft_dist.core.sampling_params import MAX_LOGPROBS, MAX_N, SamplingParams

_MAX_INT = 2**31 - 1
# Passed on to SamplingParams under the same name when the request brings them.
_SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


def _parse_stop(value: object) -> object:
    if value is None or isinstance(value, str):
        return None if value is None else [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise PydanticCustomError("stop", "it must be a string or a list of strings")
    return value


def _parse_logit_bias(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "it must be an object from token ids to numbers")
    bias = {}
    for key, amount in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12):
            raise PydanticCustomError("logit_bias", "its keys must be token ids")
        bias[int(key)] = amount
    return bias


Stop = Annotated[
    list[str] | None,
    BeforeValidator(_parse_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
]
LogitBias = Annotated[
    dict[int, float] | None,
    BeforeValidator(_parse_logit_bias),
    WithJsonSchema({"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}),
]


def _whole(value: object) -> object:
    # JSON has one kind of number, and some languages write all of them with a point.
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole = Annotated[int, BeforeValidator(_whole)]
Int = Annotated[_Whole, Field(le=_MAX_INT)]
Count = Annotated[_Whole, Field(ge=0, le=_MAX_INT)]
NumLogprobs = Annotated[_Whole, Field(ge=0, le=MAX_LOGPROBS)]


class ErrorDetail(BaseModel):
    """``param`` names the field at fault, ``code`` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What every error looks like."""

    error: ErrorDetail


class StreamOptions(Strict):
    """What a stream tells besides its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None

    @property
    def asks(self) -> bool:
        """Whether it asks for anything."""
        return bool(self.include_usage or self.continuous_usage_stats)


class GenerationRequest(StructuredFields):
    """What completions and chat share; null stands for a field's default everywhere."""

    model: str = Field(description="The base model, an adapter, or `base:adapter`.")
    n: Annotated[_Whole, Field(ge=1, le=MAX_N)] | None = None
    temperature: float | None = None
    top_k: Int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias = None
    seed: _Whole | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    stop: Stop = None
    stop_token_ids: list[Count] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: NumLogprobs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    user: str | None = None

    @property
    def num_choices(self) -> int:
        """Sequences for each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds ``usage``."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of a stream holds ``usage``."""
        return self.wants_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def sampling_params(
        self,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        asked: Asked | None,
        defaults: Mapping[str, Any],
    ) -> SamplingParams:
        """The parameters that the body asks for.

        Args:
            asked: What the answer must match.
            defaults: Of fields that the body leaves out, where they are not those of ``SamplingParams``.

        Raises:
            InvalidRequestError: a value lies outside its range.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        chosen = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(
            **{**defaults, **chosen},
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured=None if asked is None else asked.spec,
        )
