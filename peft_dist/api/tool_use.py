"""What a chat asks for with ``tools`` and ``tool_choice``: what the template is shown, what the answer must match, and
who reads it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft_dist.api.protocol_tools import NamedToolChoice, Tool, ToolChoice
from peft_dist.api.tool_readers import READERS, ArrayReader, CallDelta, NamedReader, ToolReader
from peft_dist.core.errors import InvalidRequestError

# Under these stand values, not schemas.
_VALUES = frozenset({"const", "enum", "default", "examples"})
# Blanks as chat templates write them, and no more: small models write blanks to the end of their length.
_SPACING = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How an answer may call functions.

    Attributes:
        reader: Makes one for each choice.
        schema: JSON schema that the whole answer must match; None: any text is an answer.
        tells_calls: An answer with calls that ended by itself says so in ``finish_reason``.
        most: Calls of one answer that are told; None: all.
    """

    reader: Callable[[], ToolReader]
    schema: dict[str, Any] | None = None
    tells_calls: bool = True
    most: int | None = None

    @classmethod
    def of(
        cls, tools: Sequence[Tool] | None, choice: ToolChoice, parallel: bool | None, reader: str | None
    ) -> ToolUse | None:
        """None where nothing can be called.

        Args:
            parallel: Whether an answer may have several calls; None: yes.
            reader: Of ``READERS``, for answers of the model's own making; None: how it writes calls is not known.

        Raises:
            InvalidRequestError: the fields do not go together, or nobody knows how this model calls.
        """
        if not tools:
            if choice not in (None, "none", "auto"):
                raise InvalidRequestError("tool_choice needs tools: send them, or leave it out", "tool_choice")
            return None
        _check_names(tools)
        most = 1 if parallel is False else None
        if choice == "none":
            return None
        if choice == "required":
            try:
                return cls(ArrayReader, _array(tools, most), most=most)
            except RecursionError as error:
                raise InvalidRequestError("tools are nested too deep: send flatter parameters", "tools") from error
        if isinstance(choice, NamedToolChoice):
            wanted = choice.function.name
            for tool in tools:
                if tool.function.name == wanted:
                    return cls(lambda: NamedReader(wanted), {**_SPACING, **_parameters(tool)}, tells_calls=False)
            names = ", ".join(repr(tool.function.name) for tool in tools)
            raise InvalidRequestError(f"tool_choice names {wanted!r}, and tools have {names}", "tool_choice")
        if reader is None:
            raise InvalidRequestError(
                "how this model writes calls is not known: start the server with --tool-call-parser, or send "
                "tool_choice 'required' or a function's name",
                "tool_choice",
            )
        known = frozenset(tool.function.name for tool in tools)
        return cls(lambda: READERS[reader](known), most=most)


class CallsOfChoice:
    """What one choice of an answer has said and called so far."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._reader = use.reader()
        self.content = ""
        self.calls: list[dict[str, Any]] = []

    def take(self, text: str, *, ended: bool) -> list[dict[str, Any]]:
        """The ``delta`` of each chunk that tells of this piece of text."""
        said = self._reader.feed(text) + (self._reader.end() if ended else [])
        deltas: list[dict[str, Any]] = []
        for one in said:
            if isinstance(one, str):
                self.content += one
                deltas.append({"content": one})
            elif self._use.most is None or one.index < self._use.most:
                deltas.append({"tool_calls": [self._told(one)]})
        return deltas

    def finish_reason(self, reason: str | None) -> str | None:
        """What an answer with these calls says when it ended for ``reason``."""
        return "tool_calls" if reason == "stop" and self.calls and self._use.tells_calls else reason

    def message(self) -> dict[str, Any]:
        """The fields of the whole answer's message."""
        return {"content": self.content or None, "tool_calls": self.calls} if self.calls else {"content": self.content}

    def _told(self, delta: CallDelta) -> dict[str, Any]:
        if delta.name is None:
            self.calls[delta.index]["function"]["arguments"] += delta.arguments
            return {"index": delta.index, "function": {"arguments": delta.arguments}}
        function = {"name": delta.name, "arguments": delta.arguments}
        call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        self.calls.append(call)
        return {"index": delta.index, **call, "function": dict(function)}


def _check_names(tools: Sequence[Tool]) -> None:
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.function.name in seen:
            raise InvalidRequestError(
                f"two tools are called {tool.function.name!r}: give each a name of its own", f"tools[{index}]"
            )
        seen.add(tool.function.name)


def _parameters(tool: Tool) -> dict[str, Any]:
    # Arguments are an object, whether or not the schema says so.
    return {"type": "object", **(tool.function.parameters or {})}


def _array(tools: Sequence[Tool], most: int | None) -> dict[str, Any]:
    """Of calls of any of them, one at least."""
    calls = []
    for index, tool in enumerate(tools):
        # References are from the schema's root, which a function's parameters are not any more.
        root = f"#/items/anyOf/{index}/properties/parameters"
        named = {"name": {"const": tool.function.name}, "parameters": _moved(_parameters(tool), root)}
        calls.append({"type": "object", "properties": named, "required": [*named], "additionalProperties": False})
    limit = {} if most is None else {"maxItems": most}
    return {**_SPACING, "type": "array", "minItems": 1, **limit, "items": {"anyOf": calls}}


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references to its own parts are right where it stands at ``root``."""
    if isinstance(schema, list):
        return [_moved(one, root) for one in schema]
    if not isinstance(schema, dict):
        return schema
    # An id of its own would have references be from there again.
    moved = {key: value if key in _VALUES else _moved(value, root) for key, value in schema.items() if key != "$id"}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved
