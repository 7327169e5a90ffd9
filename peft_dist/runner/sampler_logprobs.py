"""Log-probabilities of the model's own distribution: raw logits, before penalties, temperature and filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_dist.core.errors import PeftDistError
from peft_dist.core.outputs import Logprob, PositionLogprobs

# Bounds the float32 copies made of one slice of prompt logits.
_SLICE_BYTES = 32 << 20


class NonFiniteLogitsError(PeftDistError):
    """A prompt's logits hold NaN or infinity: no probabilities follow from them."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Chosen token and the K most likely ones of R positions, still on the device.

    ``chosen``, ``rank``: ``[R]``; ``top_ids``, ``top``: ``[R, K]``, best first. ``rank`` is 1 plus the number of
    tokens that are strictly more likely.
    """

    ids: Tensor
    chosen: Tensor
    rank: Tensor
    top_ids: Tensor
    top: Tensor

    def tensors(self) -> list[Tensor]:
        """All fields, in order."""
        return [self.ids, self.chosen, self.rank, self.top_ids, self.top]

    def positions(self, counts: Sequence[int]) -> list[PositionLogprobs]:
        """Copy to the host; ``counts[r]`` of the most likely tokens are kept for position ``r``."""
        rows = zip(
            self.ids.tolist(),
            self.chosen.tolist(),
            self.rank.tolist(),
            self.top_ids.tolist(),
            self.top.tolist(),
            counts,
            strict=True,
        )
        return [
            {token: Logprob(logprob, rank), **_best(token, top_ids[:count], top[:count])}
            for token, logprob, rank, top_ids, top, count in rows
        ]


def _best(chosen: int, ids: list[int], logprobs: list[float]) -> PositionLogprobs:
    return {
        token: Logprob(logprob, logprobs.index(logprob) + 1)
        for token, logprob in zip(ids, logprobs, strict=True)
        if token != chosen
    }


def token_logprobs(logits: Tensor, ids: Tensor, top: int) -> TokenLogprobs:
    """Log-probabilities of ``ids`` and of the ``top`` most likely tokens of each row.

    Args:
        logits: ``[R, V]``, any floating type.
        ids: int64 ``[R]`` on the same device.
        top: How many, 0 for the chosen alone.
    """
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    column = ids.unsqueeze(1)
    # Counted among the logits: two of them can share a rounded log-probability.
    rank = (logits > logits.gather(1, column)).sum(1) + 1
    best = logprobs.topk(min(top, logits.shape[1]), dim=1)
    return TokenLogprobs(ids, logprobs.gather(1, column).squeeze(1), rank, best.indices, best.values)


def prompt_logprobs(logits: Tensor, next_token_ids: Sequence[int] | Tensor, top: int) -> list[PositionLogprobs]:
    """Log-probabilities of a prompt's own tokens, in slices of bounded memory.

    Args:
        logits: ``[T, V]``, one row for each prompt position that has a successor in the prompt.
        next_token_ids: The ``T`` successors.
        top: How many of the most likely tokens to report besides.

    Raises:
        NonFiniteLogitsError: a row holds NaN or +inf, or nothing but -inf.
    """
    ids = torch.as_tensor(next_token_ids, dtype=torch.int64).to(logits.device)
    step = max(1, _SLICE_BYTES // (4 * logits.shape[1]))
    found: list[PositionLogprobs] = []
    for start in range(0, logits.shape[0], step):
        part = logits[start : start + step]
        finite = part.amax(-1).isfinite()
        if not bool(finite.all()):
            row = start + int((~finite).nonzero()[0])
            raise NonFiniteLogitsError(
                f"the logits of prompt row {row} are not finite: check the base model's and the adapter's weights, "
                "or serve in a wider dtype"
            )
        found += token_logprobs(part, ids[start : start + step], top).positions([top] * len(part))
    return found
