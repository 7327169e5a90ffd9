"""Log-probabilities in the formats of ``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from peft_dist.api.token_bytes import TokenBytes
from peft_dist.core.outputs import Logprob, PositionLogprobs

# JSON has no infinity; this is what OpenAI writes for a token that cannot be drawn.
_LOWEST = -9999.0


def chat_logprobs(
    texts: TokenBytes, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs], top: int
) -> dict[str, Any]:
    """``choices[i].logprobs`` of a chat answer or chunk, with the ``top`` most likely tokens of each position."""
    content = []
    for token, position in zip(token_ids, logprobs, strict=True):
        entry = _chat_entry(texts, token, position[token])
        best = sorted(position.items(), key=lambda item: item[1].rank)[:top]
        entry["top_logprobs"] = [_chat_entry(texts, other, logprob) for other, logprob in best]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(texts: TokenBytes, token: int, logprob: Logprob) -> dict[str, Any]:
    raw = texts.raw(token)
    return {
        "token": texts.replaced(token),
        "logprob": max(logprob.logprob, _LOWEST),
        "bytes": None if raw is None else list(raw),
    }


def prompt_logprobs(texts: TokenBytes, positions: Iterable[PositionLogprobs | None]) -> list[dict[str, Any] | None]:
    """The extra field ``prompt_logprobs``: for each prompt token an object by token id, null for the first."""
    return [None if position is None else _by_id(texts, position) for position in positions]


def _by_id(texts: TokenBytes, position: PositionLogprobs) -> dict[str, Any]:
    return {
        str(token): {
            "logprob": max(logprob.logprob, _LOWEST),
            "rank": logprob.rank,
            "decoded_token": texts.replaced(token),
        }
        for token, logprob in position.items()
    }


class LegacyLogprobs:
    """Builds ``choices[i].logprobs`` of a completion piece by piece; offsets count characters of its text."""

    def __init__(self, texts: TokenBytes, *, skip_special_tokens: bool) -> None:
        self._texts = texts
        self._skips_special = skip_special_tokens
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def prompt(
        self, text: str, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]
    ) -> dict[str, Any]:
        """The echoed prompt's part; ``positions`` has an entry for each token, None for the first."""
        piece = _empty()
        for token, position in zip(token_ids, positions, strict=True):
            self._add(piece, token, position, self._prompt_bytes(token, text))
        # The answer's text starts where the prompt's ends, however its tokens were counted.
        self._offset = len(text)
        self._decoder.reset()
        return piece

    def output(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
        """The part of tokens that were drawn."""
        piece = _empty()
        for token, position in zip(token_ids, positions, strict=True):
            skipped = self._skips_special and self._texts.is_special(token)
            self._add(piece, token, position, b"" if skipped else self._texts.raw(token) or b"")
        return piece

    def _prompt_bytes(self, token: int, text: str) -> bytes:
        raw = self._texts.raw(token) or b""
        if self._texts.is_special(token) and not text.startswith(self._texts.replaced(token), self._offset):
            return b""  # The tokenizer put it in front; the user did not write it.
        if self._offset == 0 and raw.startswith(b" ") and not text.startswith(" "):
            return raw[1:]
        return raw

    def _add(self, piece: dict[str, Any], token: int, position: PositionLogprobs | None, raw: bytes) -> None:
        piece["tokens"].append(self._texts.escaped(token))
        piece["text_offset"].append(self._offset)
        self._offset += len(self._decoder.decode(raw))
        piece["token_logprobs"].append(None if position is None else max(position[token].logprob, _LOWEST))
        piece["top_logprobs"].append(None if position is None else self._top(position))

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in position.items():
            top.setdefault(self._texts.escaped(token), max(logprob.logprob, _LOWEST))
        return top


def _empty() -> dict[str, Any]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def joined(pieces: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Pieces of one choice's legacy logprobs as one."""
    whole = _empty()
    for piece in pieces:
        for name, values in piece.items():
            whole[name].extend(values)
    return whole
