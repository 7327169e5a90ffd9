"""Draws of the last steps on the device, where the next step finds them before the host does."""

from __future__ import annotations

import torch


class DrawnTokens:
    """A ring of one region a step; each holds the tokens that the step's sequences drew, in their order.

    A captured graph reads and writes it through indices, so its address never changes. One place behind the ring
    takes what padded rows draw, and nobody reads it.

    Attributes:
        tokens: int64 ``[num_steps * max_rows + 1]``.
    """

    def __init__(self, max_rows: int, num_steps: int, device: torch.device | str) -> None:
        """``num_steps``: a step's draws can be read until that many further ones have begun."""
        self.max_rows = max_rows
        self.num_steps = num_steps
        self.tokens = torch.zeros(num_steps * max_rows + 1, dtype=torch.int64, device=device)
        self._begun = 0

    @property
    def dump(self) -> int:
        """The place that nobody reads."""
        return len(self.tokens) - 1

    def begin(self) -> int:
        """First place of the next step's region."""
        first = self._begun % self.num_steps * self.max_rows
        self._begun += 1
        return first

    def write(self, first: int, tokens: torch.Tensor) -> None:
        """Keep what a step that was not captured drew: int64 ``[S]``, S at most ``max_rows``."""
        self.tokens[first : first + len(tokens)].copy_(tokens)

    def fill_pending(self, input_ids: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """``input_ids`` with the draw at ``sources`` (both int64 ``[T]``) wherever that is not negative."""
        return torch.where(sources >= 0, self.tokens[sources.clamp(min=0)], input_ids)
