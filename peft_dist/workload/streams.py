"""Server-sent events of ``/v1/completions``, read with the times at which they came."""

from __future__ import annotations

from typing import Any

import msgspec

_MOST_ERROR = 300


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    queue_time: float | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


class Stream:
    """The events of one answer, cut anywhere.

    Attributes:
        times: When each event with tokens was read.
        prompt_tokens, output_tokens: As the server counts them; None where it does not tell.
        queueing: ``usage.queue_time``, which some servers tell.
        error: What the server says went wrong, or what is wrong with its events.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.queueing: float | None = None
        self.error: str | None = None
        self._ended = False
        self._rest = b""
        self._counted = 0

    def feed(self, data: bytes, now: float) -> None:
        """Read some bytes that came ``now``, in seconds."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._read(line[5:].strip(), now)

    def end(self) -> None:
        """There are no more bytes."""
        if not self._ended and self.error is None:
            self.error = "the stream broke off: neither a finish_reason nor [DONE] came"

    def _read(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._ended = True
            return
        try:
            event = _decoder.decode(data)
        except msgspec.DecodeError as error:
            self.error = self.error or f"an event cannot be read ({error}): {_short(data.decode(errors='replace'))}"
            return
        if event.error is not None:
            self.error = self.error or f"the server says: {_short(str(event.error))}"
        if event.usage is not None:
            self._note_usage(event.usage)
        if event.choices:
            choice = event.choices[0]
            self._ended = self._ended or choice.finish_reason is not None
            self._note_tokens(choice, event.usage, now)

    def _note_usage(self, usage: _Usage) -> None:
        self.prompt_tokens = self.prompt_tokens if usage.prompt_tokens is None else usage.prompt_tokens
        self.output_tokens = self.output_tokens if usage.completion_tokens is None else usage.completion_tokens
        self.queueing = self.queueing if usage.queue_time is None else usage.queue_time

    def _note_tokens(self, choice: _Choice, usage: _Usage | None, now: float) -> None:
        """A token may have no text, being part of a character: the running count tells, where there is one."""
        if usage is not None and usage.completion_tokens is not None:
            if usage.completion_tokens > self._counted:
                self._counted = usage.completion_tokens
                self.times.append(now)
        elif choice.text or choice.token_ids:
            self.times.append(now)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_ERROR else text[:_MOST_ERROR] + "..."
