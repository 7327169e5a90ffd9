"""Structured outputs are read before anything is queued: what is wrong with one is told to whoever asks for it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from peft_dist.core.errors import InvalidRequestError
from peft_dist.core.grammars import (
    BigStackThread,
    GrammarError,
    GrammarLibraryError,
    Grammars,
    bytes_table,
    check,
    is_fast,
)
from peft_dist.core.structured_output import StructuredOutput

if TYPE_CHECKING:  # It needs pydantic, without which an LLM does.
    from peft_dist.api.protocol_structured import Asked

# Of a processor, for one; a replica takes about as long before its first token, and others wait with it.
MOST_SECONDS = 1.0
_THREADS = 2
_MOST_KNOWN = 256


class StructureChecks:
    """Whether structured outputs can be followed, for one model.

    A table of single bytes does for that: the model's own takes half a second to make, in which nothing else runs.

    Args:
        tokenizer: A Hugging Face tokenizer; None for a model without one.
        end_ids: What ends a sequence.
    """

    def __init__(self, tokenizer: Any | None, end_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._threads = BigStackThread(_THREADS, "grammar-checks")
        self._table: Any = None
        self._good: OrderedDict[StructuredOutput, None] = OrderedDict()

    async def check_asked(self, asked: Asked | None) -> None:
        """Raises InvalidRequestError, naming the field, when what it asks for cannot be followed."""
        if asked is not None and not self._is_known(asked.spec, asked.param):
            await asyncio.wrap_future(self._threads.submit(self._read, asked.spec, asked.param))
            self._keep(asked.spec)

    def check_now(self, spec: StructuredOutput) -> None:
        """The same, waiting for it; the parameter is "structured"."""
        if not self._is_known(spec, "structured"):
            self._threads.submit(self._read, spec, "structured").result()
            self._keep(spec)

    def grammars(self, vocab_size: int) -> Grammars:
        """What reads them for a model of this process, with ``vocab_size`` columns of logits."""
        tokenizer = self._tokenizer
        return Grammars(lambda: tokenizer, vocab_size, self._end_ids)

    def _is_known(self, spec: StructuredOutput, param: str) -> bool:
        if self._tokenizer is None:
            raise _cannot(param, "this model lacks a tokenizer, which they need")
        if not is_fast(self._tokenizer):
            kind = type(self._tokenizer).__name__
            raise _cannot(param, f"they need a fast tokenizer (tokenizer.json), not a {kind}")
        if not self._end_ids:
            raise _cannot(param, "the model's configuration lacks an end-of-sequence token")
        return spec in self._good

    def _read(self, spec: StructuredOutput, param: str) -> None:
        try:
            check(spec, self._bytes_table(), MOST_SECONDS)
        except GrammarLibraryError as error:
            raise InvalidRequestError(f"{param}: {error}", param) from error
        except GrammarError as error:
            remedy = "correct it; docs/http-api.md (Structured outputs) tells what is supported"
            raise InvalidRequestError(f"{param} cannot be followed: {error}. Remedy: {remedy}", param) from error

    def _bytes_table(self) -> Any:
        if self._table is None:
            added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
            self._table = bytes_table(token.content for token in added if token.special)
        return self._table

    def _keep(self, spec: StructuredOutput) -> None:
        self._good[spec] = None
        if len(self._good) > _MOST_KNOWN:
            self._good.popitem(last=False)


def _cannot(param: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} asks for a structured output: {reason}; leave it out", param)
