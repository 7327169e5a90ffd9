"""How an answer is written, by completions and by chat."""

from __future__ import annotations

from typing import Any, Protocol

from peft_dist.api.generation import Generation, Piece


class AnswerFormat(Protocol):
    """Writes one answer, whole or in chunks.

    Attributes:
        object_name, chunk_name: What ``object`` says in an answer and in a chunk.
        tells_text_only: ``chunk`` of a piece that ends nothing is ``text_only`` of its text, or nothing without text.
    """

    object_name: str
    chunk_name: str
    tells_text_only: bool

    def opening(self, generation: Generation) -> list[dict[str, Any]]:
        """Entries of ``choices`` that a stream begins with, each in a chunk of its own."""
        ...

    def chunk(self, piece: Piece) -> list[dict[str, Any]]:
        """Entries of ``choices`` that tell of this piece, each for a chunk of its own."""
        ...

    def text_only(self, index: int, text: str) -> dict[str, Any]:
        """The entry for a piece of text of a choice, without anything else to tell."""
        ...

    def take(self, piece: Piece) -> None:
        """Keep a piece for the whole answer."""
        ...

    def answer(self, generation: Generation) -> dict[str, Any]:
        """``choices`` of the whole answer, and what else the body asked for."""
        ...
