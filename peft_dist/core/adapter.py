"""Identity and size of one adapter."""

from __future__ import annotations

from functools import cached_property

import msgspec

BASE_NAMES = (None, "__base__")


class AdapterSpec(msgspec.Struct, frozen=True, dict=True):
    """One adapter as every process knows it.

    ``content_hash`` covers configuration and weights: it identifies the adapter everywhere (prefix cache,
    slots, messages), while ``name`` is only what users call it. ``ranks`` maps a module path of the base
    model to the rank there; modules that are absent are not adapted. ``kind`` selects how it is loaded,
    applied, merged and costed. ``merged_ratio`` is how many times as large as the base's weight its part of a merged
    weight is, in the module where that is most; 0 where nothing is merged, infinite where it is beyond numbers.
    """

    name: str
    content_hash: str
    path: str
    ranks: dict[str, int]
    num_bytes: int
    kind: str = "lora"
    merged_ratio: float = 0.0

    @property
    def max_rank(self) -> int:
        """Largest rank of any module."""
        return max(self.ranks.values())

    # Asked for each row of each step.
    @cached_property
    def num_rank_rows(self) -> int:
        """Rank rows over all modules: what the LoRA kernel's work grows with."""
        return sum(self.ranks.values())

    @property
    def target_modules(self) -> list[str]:
        """Paths of the adapted modules in the base model, sorted."""
        return sorted(self.ranks)
