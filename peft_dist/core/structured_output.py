"""The form that an answer must have, as a user asks for it."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from peft_dist.core.errors import InvalidRequestError

# Longer ones may be nested so deeply, one reference into another, that reading them needs more memory than there is.
MAX_BYTES = 64 << 10
_KINDS = ("json_schema", "regex", "choice", "grammar", "json_object")
_ANY_OBJECT = '{"type":"object"}'


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an answer must match from its first to its last token. Exactly one attribute is given.

    Raises:
        InvalidRequestError: none is given, or several; or one has the wrong type, or is longer than ``MAX_BYTES``
            (``.param`` names it). Whether a schema or grammar is right is checked where the request is taken.

    Attributes:
        json_schema: A JSON schema, as an object (a dict or a boolean) or as its text; kept as text. Properties are
            written in the order in which it names them.
        regex: A regular expression for the whole answer, in the syntax of Rust's ``regex``.
        choice: The answers there are to choose from.
        grammar: A context-free grammar in llguidance's dialect of Lark; it begins with the rule ``start``.
        json_object: Any JSON object.
    """

    json_schema: str | bool | dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise _wrong("json_object", self.json_object, "True or False")
        given = [kind for kind in _KINDS if getattr(self, kind) is not None and getattr(self, kind) is not False]
        if self.json_schema is False:
            given.insert(0, "json_schema")
        if len(given) != 1:
            problem = f"{' and '.join(given)} exclude each other" if given else "it says nothing of the answer"
            raise InvalidRequestError(f"{problem}: give one of {', '.join(_KINDS)}", given[-1] if given else None)
        [kind] = given
        if kind == "json_schema":
            msgspec.structs.force_setattr(self, kind, _schema_text(self.json_schema))
        elif kind == "choice":
            msgspec.structs.force_setattr(self, kind, _choices(self.choice))
        elif kind != "json_object" and not isinstance(getattr(self, kind), str):
            raise _wrong(kind, getattr(self, kind), "a string")
        _check_text(kind, self.text)

    @property
    def kind(self) -> str:
        """The name of the attribute that is given; "json_schema" for any JSON object."""
        if self.json_object:
            return "json_schema"
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def text(self) -> str:
        """What is given, as text; choices as a JSON list. With ``kind`` it says everything."""
        if self.json_object:
            return _ANY_OBJECT
        if self.choice is not None:
            return msgspec.json.encode(self.choice).decode()
        text: str = getattr(self, self.kind)
        return text


def _schema_text(schema: object) -> str:
    must = "a JSON schema: an object or a boolean, or its text"
    if isinstance(schema, str):
        try:
            msgspec.json.decode(schema)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
            raise InvalidRequestError(f"json_schema is not valid JSON: {error}", "json_schema") from error
        return schema
    if not isinstance(schema, (dict, bool)):
        raise _wrong("json_schema", schema, must)
    try:
        # Not msgspec's: it writes NaN and infinity as null, which is another schema.
        return json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"json_schema cannot be written as JSON: {error}", "json_schema") from error


def _choices(choices: Any) -> tuple[str, ...]:
    if not isinstance(choices, (list, tuple)) or not choices or not all(isinstance(each, str) for each in choices):
        raise _wrong("choice", choices, "a list of at least one string")
    for each in choices:
        _check_text("choice", each)
    return tuple(choices)


def _check_text(kind: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{kind} holds a lone surrogate: send valid Unicode", kind) from error
    if size > MAX_BYTES:
        raise InvalidRequestError(f"{kind} has {size} bytes: at most {MAX_BYTES} are read, make it shorter", kind)


def _wrong(kind: str, value: object, must: str) -> InvalidRequestError:
    return InvalidRequestError(f"{kind}={value!r:.200} is not valid: {kind} must be {must}", kind)
