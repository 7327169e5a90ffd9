"""Which steps are captured: their sizes, and what they are captured for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from peft_dist.runner.step_buffer import StepBuffer, StepShape

MOST_MIXED_TOKENS = 2048
# Beyond these, sizes are twice as far apart.
_FINE_TOKENS = 1024
_FEW_ROWS, _MANY_ROWS = 16, 512


class Variant(NamedTuple):
    """What a captured step was captured for.

    Attributes:
        shape: Padding included.
        lora: Rows have adapters' parts added.
        corrected: Rows have the merged adapter's part taken away.
        merged: ``MergedLayers.key`` of the weights that stand in for the modules' own.
        fuses: Layers may be one launch with their adapters, all of which are finite.
        few_ranks: No adapter has more than 16 ranks, whatever others are registered: launches are made for so many.
    """

    shape: StepShape
    lora: bool
    corrected: bool
    merged: tuple[int, ...] | None
    fuses: bool = False
    few_ranks: bool = False


@dataclass(slots=True)
class CapturedStep:
    """One graph, what it reads, and what it leaves."""

    inputs: StepBuffer
    replay: Callable[[], None]
    outputs: list[torch.Tensor]

    @property
    def logits(self) -> torch.Tensor:
        """``[rows, vocab]``."""
        return self.outputs[0]

    def best(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 tokens and uint8 status of the first rows, as ``sampler.best_tokens`` gives them."""
        return self.outputs[1][:count], self.outputs[2][:count]


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Sequences of captured decode steps: up to four apart, and beyond 64 at most an eighth.

    Each size is memory and time of the start, so beyond ``_MANY_ROWS`` there are eight for twice as many.
    """
    sizes = {1, 2, 3, 4, 6, *range(8, 65, 4), *range(72, 129, 8), *range(144, _MANY_ROWS + 1, 16)}
    first = _MANY_ROWS
    while first < max_num_seqs:
        sizes.update(range(first, 2 * first, first // 8))
        first *= 2
    return sorted(size for size in {*sizes, max_num_seqs} if size <= max_num_seqs)


def mixed_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> list[tuple[int, int]]:
    """(tokens, sequences) of captured steps with prompts in them.

    Beyond the largest, a step takes the device longer than Python needs to launch it.
    """
    most = min(max_num_batched_tokens, MOST_MIXED_TOKENS)
    rows = sorted({min(_FEW_ROWS, max_num_seqs), max_num_seqs})
    sizes = {*range(64, min(most, _FINE_TOKENS) + 1, 64), *range(_FINE_TOKENS, most + 1, 128), most}
    return [(tokens, few) for tokens in sorted(sizes) for few in rows if tokens != few]


def captured_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> dict[str, tuple[int, ...]]:
    """``decode_sizes`` and ``prompt_sizes`` of a profile of a replica that captures its steps."""
    prompts = {tokens for tokens, _ in mixed_sizes(max_num_seqs, max_num_batched_tokens)}
    return {"decode_sizes": tuple(decode_sizes(max_num_seqs)), "prompt_sizes": tuple(sorted(prompts))}
