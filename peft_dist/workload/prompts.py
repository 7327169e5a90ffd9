"""Prompts of a given length that no two requests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from peft_dist.core.errors import ConfigError

# Common enough to be one token each, with the space before it, in most vocabularies.
_WORDS = (
    *("the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "on", "with", "as", "be", "at", "by", "this"),
    *("have", "from", "or", "one", "had", "not", "but", "what", "all", "were", "when", "we", "there", "can", "an"),
    *("your", "which", "their", "said", "if", "do", "will", "each", "about", "how", "up", "out", "them", "then", "she"),
)
# Tells these streams of random numbers from those of times, (seed, interval, adapter): no interval is so late.
_PROMPTS = 0x50524D50


@dataclass(frozen=True, slots=True)
class Prompts:
    """Random prompts: no prefix is shared but by chance, so that no prefix cache helps.

    Attributes:
        kind: "ids": lists of token ids, exactly as long as asked for; "text": as many common words, each a token in
            most vocabularies (records then tell the server's count).
        first_id, end_id: Ids are drawn from ``first_id`` up to, and without, ``end_id``.
        seed: A prompt depends on this and on the number of its request.
    """

    kind: Literal["ids", "text"] = "ids"
    first_id: int = 100
    end_id: int = 30_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("ids", "text"):
            raise ConfigError(f"prompts of kind {self.kind!r}: use ids or text")
        if not 0 <= self.first_id < self.end_id:
            raise ConfigError(
                f"first_id={self.first_id}, end_id={self.end_id}: ids are drawn from the first up to, and without, the "
                "end, which must be above it (--first-id, --end-id)"
            )
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be 0 or more")

    def make(self, index: int, num_tokens: int) -> str | list[int]:
        """The prompt of request ``index``; those of a warm-up have numbers below 0."""
        generator = np.random.default_rng((self.seed, _PROMPTS, abs(index), int(index < 0)))
        if self.kind == "ids":
            return [int(token) for token in generator.integers(self.first_id, self.end_id, num_tokens)]
        return " ".join(_WORDS[place] for place in generator.integers(0, len(_WORDS), num_tokens))
