"""One choice of an answer that is sent whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft_dist.api.generation import Piece
from peft_dist.core.outputs import PositionLogprobs


@dataclass(slots=True)
class Collected:
    """What came of a choice so far; ``logprobs`` holds one part for each piece, as its format wrote it."""

    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def take(self, piece: Piece, text: str, logprobs: dict[str, Any] | None) -> None:
        """Add a piece, with its text and log-probabilities as the format writes them."""
        self.text.append(text)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.token_ids.extend(piece.delta.token_ids)
        if piece.is_first:
            self.prompt_logprobs = piece.prompt_logprobs
        self.finish_reason = piece.delta.finish_reason
        self.stop_reason = piece.delta.stop_reason

    @property
    def joined_text(self) -> str:
        """All text so far."""
        return "".join(self.text)
