"""The fields of a chat by which a model may call functions of its client."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from peft_dist.api.strict import Strict

_CHOICES = ("none", "auto", "required")


class FunctionDefinition(Strict):
    """A function of the client. ``parameters`` is the JSON schema of the object that holds its arguments; none: any."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """Only functions."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """By its name alone."""

    name: str


class NamedToolChoice(Strict):
    """The one function that is to be called."""

    type: Literal["function"]
    function: NamedFunction


def _parse_choice(value: object) -> object:
    # By hand: of a union the field would be named with the type that did not fit.
    if value is None or (isinstance(value, str) and value in _CHOICES):
        return value
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict):
        name = value["function"].get("name")
        if isinstance(name, str):
            return NamedToolChoice(type="function", function=NamedFunction(name=name))
    choices = ", ".join(map(repr, _CHOICES))
    problem = f"it must be {choices} or {{'type': 'function', 'function': {{'name': ...}}}}"
    raise PydanticCustomError("tool_choice", "{problem}", {"problem": problem})


ToolChoice = Annotated[
    NamedToolChoice | str | None,
    PlainValidator(_parse_choice),
    WithJsonSchema({"anyOf": [{"enum": [*_CHOICES, None]}, NamedToolChoice.model_json_schema()]}),
]


class CalledFunction(Strict):
    """``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(Strict):
    """One call, as an answer told it."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
