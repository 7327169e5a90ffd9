"""The chunks of a stream as server-sent events.

Nearly every event tells of some text and nothing else, and differs from the one before it in that text alone: what
stands around it is written once for each choice.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft_dist.api.answer_format import AnswerFormat
from peft_dist.api.errors import encode_json
from peft_dist.api.generation import MAX_BATCH, Generation, Piece
from peft_dist.api.protocol import GenerationRequest
from peft_dist.api.streaming import event


class ChunkWriter:
    """Writes the events of one answer.

    Args:
        head: What every chunk begins with.

    Attributes:
        max_batch: Pieces that ``events`` may be given at once.
    """

    def __init__(
        self, head: Mapping[str, Any], body: GenerationRequest, generation: Generation, answer_format: AnswerFormat
    ) -> None:
        self._head = {**head, "object": answer_format.chunk_name}
        self._body = body
        self._generation = generation
        self._format = answer_format
        self._is_plain = answer_format.tells_text_only and not body.wants_running_usage
        # Every chunk tells the usage at its own token, which is known for the last piece alone.
        self.max_batch = 1 if body.wants_running_usage else MAX_BATCH
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def opening(self) -> bytes:
        """What comes before the first token."""
        return b"".join(map(self._written, self._format.opening(self._generation)))

    def events(self, batch: Sequence[Piece]) -> bytes:
        """Of these pieces, each in events of its own; empty when they tell nothing."""
        return b"".join(self._each(batch))

    def closing(self) -> bytes:
        """What comes behind the last token."""
        if not self._body.wants_usage:
            return b""
        return event(encode_json({**self._head, "choices": [], "usage": self._generation.usage.as_dict()}))

    def _each(self, batch: Sequence[Piece]) -> Iterable[bytes]:
        for piece in batch:
            delta = piece.delta
            if self._is_plain and delta.finish_reason is None:
                if delta.text:
                    before, behind = self._around.get(piece.choice.index) or self._split(piece.choice.index)
                    yield before + encode_json(delta.text) + behind
            else:
                yield from map(self._written, self._format.chunk(piece))

    def _split(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and behind the text in the events of a choice."""
        marker = uuid.uuid4().hex
        before, _, behind = self._written(self._format.text_only(index, marker)).partition(f'"{marker}"'.encode())
        self._around[index] = before, behind
        return before, behind

    def _written(self, choice: dict[str, Any]) -> bytes:
        chunk = {**self._head, "choices": [choice]}
        if self._body.wants_usage:
            chunk["usage"] = self._generation.usage.as_dict() if self._body.wants_running_usage else None
        return event(encode_json(chunk))
