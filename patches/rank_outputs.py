"""How the outputs of one layer on several ranks become one. All ranks have to come by in the same order."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import distributed as dist


class Combination(Protocol):
    """What a LoRA layer does around its own work where it is split over ranks."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's own input."""
        ...

    def leave(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The output, the same bits on every rank, of this rank's ``y`` and what was given to ``enter``."""
        ...


class Reduced:
    """Inputs are split: the output is the sum."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def leave(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = y.contiguous()
        dist.all_reduce(y)
        return y


class Gathered:
    """Outputs are split: they are put beside one another.

    Attributes:
        size: Ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def leave(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows = y.reshape(-1, y.shape[-1]).contiguous()
        parts = rows.new_empty(self.size, *rows.shape)
        dist.all_gather(list(parts.unbind(0)), rows)
        whole = parts.transpose(0, 1)
        return whole.reshape(*y.shape[:-1], self.size * y.shape[-1])


class Vocabulary:
    """An embedding's tokens are split: each id is looked up by the rank that has it, and zero on the others."""

    def __init__(self, first: int, last: int) -> None:
        """This rank has the ids ``first`` up to ``last``."""
        self._first, self._last = first, last

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self._first).clamp_(0, self._last - self._first - 1)

    def leave(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        elsewhere = (x < self._first) | (x >= self._last)
        y = y.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        dist.all_reduce(y)
        return y
