"""From what a model writes to the calls that it makes: one reader for each way of writing them.

``hermes``: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` among text (Hermes, Qwen, SmolLM2).
``llama3_json``: the whole answer is ``{"name": ..., "parameters": {...}}``, several with ``;`` between (Llama 3).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

_DECODER = json.JSONDecoder()
_BEGIN, _END = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_NO_JSON = (ValueError, RecursionError)
_NOT_JSON = ("<function=", "<arg_key>")


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call: its first one has the name. ``arguments`` is text of a JSON object, joined over the pieces."""

    index: int
    name: str | None
    arguments: str


Said = str | CallDelta


class ToolReader(Protocol):
    """Reads one choice's text as it comes."""

    def feed(self, text: str) -> list[Said]:
        """What is certain now: content, and calls."""
        ...

    def end(self) -> list[Said]:
        """The rest; nothing more comes."""
        ...


class NamedReader:
    """The whole text is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> list[Said]:
        if not text:
            return []
        name, self._name = self._name, None
        return [CallDelta(0, name, text)]

    def end(self) -> list[Said]:
        return [] if self._name is None else [CallDelta(0, self._name, "")]


class ArrayReader:
    """The whole text is an array of objects with a name and parameters. One that is cut off is left out.

    Each character is looked at once: an object is parsed when its last brace has come.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._count = 0

    def feed(self, text: str) -> list[Said]:
        found: list[Said] = []
        start = 0
        for place, character in enumerate(text):
            if self._in_string:
                self._in_string = character != '"' or self._is_escaped
                self._is_escaped = character == "\\" and not self._is_escaped
            elif character == '"':
                self._in_string = True
            elif character == "{":
                if not self._depth:
                    start = place
                self._depth += 1
            elif character == "}" and self._depth:
                self._depth -= 1
                if not self._depth:
                    found += self._call("".join([*self._pieces, text[start : place + 1]]))
                    self._pieces, start = [], place + 1
        if self._depth:
            self._pieces.append(text[start:])
        return found

    def end(self) -> list[Said]:
        return []

    def _call(self, text: str) -> list[Said]:
        call = _called(text, self._count)
        self._count += call is not None
        return [] if call is None else [call]


class HermesReader:
    """Calls stand in tags, text between them is content. What is no call in a tag is content, tag and all."""

    def __init__(self, names: Container[str]) -> None:
        self._names = names
        self._text = ""
        self._inside = False
        self._count = 0

    def feed(self, text: str) -> list[Said]:
        self._text += text
        found: list[Said] = []
        while True:
            tag = _END if self._inside else _BEGIN
            before, met, behind = self._text.partition(tag)
            if not met:
                break
            found += self._calls(before, _BEGIN + before + _END) if self._inside else _content(before)
            self._text, self._inside = behind, not self._inside
        if not self._inside:
            # What may become a tag waits for what follows.
            kept = _overlap(self._text, _BEGIN)
            found += _content(self._text[: len(self._text) - kept])
            self._text = self._text[len(self._text) - kept :]
        return found

    def end(self) -> list[Said]:
        # Some models end their turn where the tag would close.
        rest, self._text = self._text, ""
        return self._calls(rest, _BEGIN + rest) if self._inside else _content(rest)

    def _calls(self, text: str, raw: str) -> list[Said]:
        try:
            value = json.loads(text)
        except _NO_JSON:
            return [raw]
        found: list[Said] = []
        for one in value if isinstance(value, list) else [value]:
            call = _call(one, self._count + len(found))
            if call is None or call.name not in self._names:
                return [raw]
            found.append(call)
        self._count += len(found)
        return found


class LlamaReader:
    """Calls are the whole answer, or there are none. Nobody knows which before its end where it begins like one."""

    def __init__(self, names: Container[str]) -> None:
        self._names = names
        self._text = ""
        self._is_content = False

    def feed(self, text: str) -> list[Said]:
        if self._is_content:
            return _content(text)
        self._text += text
        begins = self._text.lstrip()
        if not begins or begins.startswith(("{", _PYTHON_TAG)) or _PYTHON_TAG.startswith(begins):
            return []
        self._is_content = True
        return [self._text]

    def end(self) -> list[Said]:
        if self._is_content:
            return []
        rest = self._text.strip().removeprefix(_PYTHON_TAG).strip()
        found: list[Said] = []
        while rest:
            try:
                value, end = _DECODER.raw_decode(rest)
            except _NO_JSON:
                return [self._text]
            call = _call(value, len(found))
            if call is None or call.name not in self._names:
                return [self._text]
            found.append(call)
            rest = rest[end:].lstrip("; \t\r\n")
        return found or _content(self._text)


READERS: Mapping[str, Callable[[Container[str]], ToolReader]] = {"hermes": HermesReader, "llama3_json": LlamaReader}
"""Made with the names of the functions that can be called: what names another one is no call."""


def reader_for(template: str) -> str | None:
    """The name of the reader whose way of writing a chat template shows; None: it shows none that is known."""
    if _BEGIN in template:
        # Some write no JSON between the tags.
        return None if any(mark in template for mark in _NOT_JSON) else "hermes"
    return "llama3_json" if _PYTHON_TAG in template or '"parameters": dictionary' in template else None


def _called(text: str, index: int) -> CallDelta | None:
    try:
        return _call(json.loads(text), index)
    except _NO_JSON:
        return None


def _call(value: Any, index: int) -> CallDelta | None:
    """What an object calls; None for one that calls nothing."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        # Written twice. The text must be an object's all the same: it comes back in the next turn.
        try:
            return CallDelta(index, value["name"], arguments) if isinstance(json.loads(arguments), dict) else None
        except _NO_JSON:
            return None
    if not isinstance(arguments, dict):
        return None
    return CallDelta(index, value["name"], json.dumps(arguments, ensure_ascii=False))


def _content(text: str) -> list[Said]:
    return [text] if text else []


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of ``text`` that ``tag`` begins with."""
    sizes = range(min(len(text), len(tag) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(tag[:size])), 0)
