"""One draw from each of many rows, as tensor operations without a look at any value from the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_dist.runner.sampler_state import SamplerState


def draw_tokens(rows: Tensor, best: Tensor, states: Sequence[SamplerState], draws: Sequence[int]) -> Tensor:
    """Return int64 ``[R]``, the tokens that each row's uniform number picks from its filtered distribution.

    Args:
        rows: float32 ``[R, V]``, not changed.
        best: ``[R, 1]``, the largest value of each row; where it is not finite the token means nothing.
        states: The sequence of each row; filters are min_p, top_k, top_p in this order.
        draws: The number of each row's draw.
    """

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(rows.device, non_blocking=True).unsqueeze(1)

    vocab = rows.shape[1]
    weights = ((rows - best) / column([state.temperature for state in states])).exp_()
    if any(state.params.min_p > 0 for state in states):
        weights.masked_fill_(weights < column([state.params.min_p for state in states]), 0)
    top_k = [state.params.top_k if 0 < state.params.top_k < vocab else vocab for state in states]
    if min(top_k) < vocab:
        _keep_top_k(weights, rows, column(top_k, torch.int64))
    if any(state.params.top_p < 1 for state in states):
        # No share reaches 2: a row without top_p keeps everything, whatever its sums round to.
        shares = [state.params.top_p if state.params.top_p < 1 else 2.0 for state in states]
        _keep_top_p(weights, column(shares, torch.float64))
    uniform = column([state.uniform(draw) for state, draw in zip(states, draws, strict=True)], torch.float64)
    return _pick(weights, uniform)


def _keep_top_k(weights: Tensor, rows: Tensor, top_k: Tensor) -> None:
    ordered = rows.sort(dim=1, descending=True).values
    weights.masked_fill_(rows < ordered.gather(1, top_k - 1), 0)


def _keep_top_p(weights: Tensor, top_p: Tensor) -> None:
    ordered = weights.sort(dim=1, descending=True).values
    sums = ordered.cumsum(1, dtype=torch.float64)
    kept = ((sums < top_p * sums[:, -1:]).sum(1, keepdim=True) + 1).clamp(max=weights.shape[1])
    border = ordered.gather(1, kept - 1)
    ties = weights == border
    # Equal weights at the border stay in vocabulary order, as many as the set has room for.
    room = kept - (weights > border).sum(1, keepdim=True)
    weights.masked_fill_((weights < border) | (ties & (ties.cumsum(1) > room)), 0)


def _pick(weights: Tensor, uniform: Tensor) -> Tensor:
    sums = weights.cumsum(1, dtype=torch.float64)
    total = sums[:, -1:]
    # The product can round up to the total, which no running sum exceeds.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, target, right=True).clamp(max=weights.shape[1] - 1).squeeze(1)
