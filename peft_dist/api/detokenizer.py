"""Text from tokens as they come.

Decoding each token alone is wrong: a character may span tokens, and what a token means can depend on the one
before it (a leading space). So every new token is decoded behind the few tokens whose text is out already, and
text is given out once no later token can change it.

This is the method of ``tokenizers.decoders.DecodeStream``, at the same cost, but it also gives out what is left at
the end, goes on where a decoder rewrites earlier text (runs of byte tokens that turn out to be no UTF-8), and
serves tokenizers without a fast back end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tokenizers import Tokenizer, decoders

Decode = Callable[[list[int]], str]
# Text of a token that is the same behind whatever comes before it; empty for one of which that is not known.
WholeText = Callable[[int], str]

# What decoders put where bytes are no character, or not yet one.
REPLACEMENT = "\ufffd"
_CONTEXT = 8
_MAX_PENDING = 64
# Tokens that the longest unfinished character (three bytes of four) can span.
_UNFINISHED = 3


def decoder(tokenizer: Any, *, skip_special_tokens: bool) -> Decode:
    """How ``tokenizer`` turns ids into text, unknown ids into none.

    Args:
        tokenizer: A Hugging Face tokenizer, fast or slow, or a ``tokenizers.Tokenizer``.
        skip_special_tokens: Leave special tokens out of the text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(backend, Tokenizer):
        return partial(backend.decode, skip_special_tokens=skip_special_tokens)
    return partial(_decode_slowly, tokenizer, len(tokenizer), skip_special_tokens)


class Decoders:
    """How one tokenizer turns ids into text, and what it said of single tokens. Shared by all sequences of a server.

    Args:
        tokenizer: A Hugging Face tokenizer, fast or slow, or a ``tokenizers.Tokenizer``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decoders = {skips: _Decoder(tokenizer, skip_special_tokens=skips) for skips in (False, True)}

    def stream(self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> TextStream:
        """A stream of text behind a prompt."""
        chosen = self._decoders[skip_special_tokens]
        return TextStream(chosen.decode, prompt_token_ids, chosen.whole if chosen.joins_bytes else _unknown)


class _Decoder:
    """Ids to text, with or without special tokens.

    Attributes:
        joins_bytes: The text of tokens is that of their bytes put together, so a token of whole characters has the
            same text behind any others. True of byte-level tokenizers; others drop or add spaces.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool) -> None:
        self.decode = decoder(tokenizer, skip_special_tokens=skip_special_tokens)
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.joins_bytes = isinstance(backend, Tokenizer) and isinstance(backend.decoder, decoders.ByteLevel)
        self._texts: dict[int, str] = {}

    def whole(self, token_id: int) -> str:
        """As ``WholeText``, each token decoded once: there are no more than the vocabulary has."""
        text = self._texts.get(token_id)
        if text is None:
            text = self.decode([token_id])
            self._texts[token_id] = text = "" if REPLACEMENT in text else text
        return text


def _unknown(token_id: int) -> str:
    return ""


def _decode_slowly(tokenizer: Any, size: int, skip_special_tokens: bool, token_ids: list[int]) -> str:
    known = [token for token in token_ids if token < size]
    text: str = tokenizer.decode(known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return text


class TextStream:
    """The text of one sequence's output.

    What ``add`` and ``flush`` return, put together, is the decoded prompt and output without the decoded prompt.
    (A character that the prompt left unfinished belongs to the output that completes it.)

    Args:
        decode: Ids to text.
        prompt_token_ids: What precedes the output; only its end is looked at.
        whole: Texts of single tokens that need not be decoded behind others.
    """

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int] = (), whole: WholeText = _unknown) -> None:
        self._decode = decode
        self._whole = whole
        context = _context(decode, prompt_token_ids)
        unfinished = _unfinished(decode, context)
        # ``_prefix``, the text of ``_given``, is out, and ``_pending`` follows. Only at the start may ``_pending``
        # be part of the prompt; then ``_prefix`` has its text too, and ``_settled`` what of it cannot change.
        self._given = context[: len(context) - unfinished]
        self._pending = context[len(context) - unfinished :]
        self._prefix = decode(context)
        self._settled = max(self._prefix.rstrip(REPLACEMENT), decode(self._given), key=len)

    def add(self, token_id: int) -> str:
        """Return the text that is certain now; empty while a character is unfinished."""
        if not self._pending and (text := self._whole(token_id)):
            self._given, self._prefix, self._settled = [token_id], text, text
            return text
        self._pending.append(token_id)
        text = self._decode(self._given + self._pending)
        if len(text) < len(self._prefix) or text == self._prefix:
            if len(self._pending) >= _MAX_PENDING:
                # Special tokens without end: they have no text, and need not be decoded again and again.
                del self._pending[:-_UNFINISHED]
            return ""
        if text.endswith(REPLACEMENT):
            return self._give_out_hopeless(text) if len(self._pending) >= _MAX_PENDING else ""
        return self._give_out(text, len(self._pending))

    def flush(self) -> str:
        """Return what was held back, with U+FFFD for an unfinished character; call it once, at the end."""
        return self._give_out(self._decode(self._given + self._pending), len(self._pending))

    def _give_out(self, text: str, count: int) -> str:
        """Return the part of ``text`` (that of ``count`` pending tokens and those before) that is new."""
        known = self._prefix
        if not text.startswith(known) and text.startswith(self._settled):
            # The prompt ended inside a character, which is whole now.
            known = self._settled
        self._given, self._pending = self._pending[:count], self._pending[count:]
        self._prefix = self._settled = self._decode(self._given)
        return text[len(known) :]

    def _give_out_hopeless(self, text: str) -> str:
        """Bound the work on endless bytes that are no text: keep back only what may still become a character."""
        for kept in range(_UNFINISHED, 0, -1):
            head = self._decode(self._given + self._pending[:-kept])
            if head + self._decode(self._pending[-kept:]) == text:
                return self._give_out(head, len(self._pending) - kept)
        return self._give_out(text, len(self._pending))


def _context(decode: Decode, token_ids: Sequence[int]) -> list[int]:
    """The shortest end tried that has text, and does not begin inside a character."""
    size = _CONTEXT
    while size < len(token_ids):
        end = list(token_ids[-size:])
        text = decode(end)
        if text and not text.startswith(REPLACEMENT):
            return end
        size *= 2
    return list(token_ids)


def _unfinished(decode: Decode, token_ids: list[int]) -> int:
    """How many tokens at the end belong to a character that later tokens may complete."""
    if not decode(token_ids).endswith(REPLACEMENT):
        return 0
    for count in range(1, min(_UNFINISHED, len(token_ids)) + 1):
        if not decode(token_ids[:-count]).endswith(REPLACEMENT):
            return count
    return 0
