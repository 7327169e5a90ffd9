"""Changes to single logits: allowed tokens, bias, ends held back, penalties.

Each edit is one gather and one scatter over all rows that need it; the indices are built on the host, once a
batch, from the tokens that are touched. Rows and tokens that nobody asked to change cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_dist.kernels.transfer import to_device
from peft_dist.runner.sampler_state import SamplerState

_BITS = 32


class AllowedTokens(NamedTuple):
    """What some rows may draw; the others may draw everything.

    ``words``: int32 ``[len(rows), ceil(V / 32)]`` on the host; bit ``t % 32`` of word ``t // 32`` lets token
    ``t`` pass.
    """

    rows: Sequence[int]
    words: Tensor

    def among(self, rows: Sequence[int]) -> AllowedTokens:
        """The same, where ``rows`` are all that there is; those of ``self.rows`` are among them."""
        places = {row: place for place, row in enumerate(rows)}
        return AllowedTokens([places[row] for row in self.rows], self.words)


def edit_logits(
    rows: Tensor, states: Sequence[SamplerState], draws: Sequence[int], allowed: AllowedTokens | None = None
) -> None:
    """Edit ``rows`` in place, in the order the module names.

    Args:
        rows: float32 ``[R, V]``, contiguous.
        states: The sequence of each row.
        draws: The number of each row's draw.
        allowed: What some of the rows may draw.
    """
    if allowed is not None:
        _mask_others(rows, allowed)
    _add_biases(rows, states)
    _mask_ends(rows, states, draws)
    _apply_penalties(rows, states)


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """Return the first ``count`` bits of each row of int32 ``[R, W]`` as bool ``[R, count]``, lowest bit first."""
    if words.device.type == "cpu":
        # A hundredth of what the shifts below take there.
        bits_of_bytes = np.unpackbits(words.numpy().view(np.uint8), axis=1, count=count, bitorder="little")
        return torch.from_numpy(bits_of_bytes).view(torch.bool)
    bits = (words.unsqueeze(-1) >> torch.arange(_BITS, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(1)[:, :count].bool()


def _mask_others(rows: Tensor, allowed: AllowedTokens) -> None:
    banned = ~unpack_bits(to_device(allowed.words, rows.device), rows.shape[1])
    if len(allowed.rows) == len(rows):
        rows.masked_fill_(banned, -torch.inf)
    else:
        index = to_device(torch.tensor(allowed.rows), rows.device)
        rows[index] = rows[index].masked_fill_(banned, -torch.inf)


def _flat(places: list[tuple[int, NDArray[np.int64]]], rows: Tensor) -> Tensor:
    """Indices into ``rows.view(-1)`` of the given tokens of the given rows."""
    width = rows.shape[1]
    return torch.from_numpy(np.concatenate([ids + row * width for row, ids in places])).to(rows.device)


def _add_biases(rows: Tensor, states: Sequence[SamplerState]) -> None:
    biased = [(row, state) for row, state in enumerate(states) if len(state.bias_ids)]
    if biased:
        index = _flat([(row, state.bias_ids) for row, state in biased], rows)
        values = np.concatenate([state.bias_values for _, state in biased])
        flat = rows.view(-1)
        flat[index] += torch.from_numpy(values).to(rows.device)


def _mask_ends(rows: Tensor, states: Sequence[SamplerState], draws: Sequence[int]) -> None:
    places = [
        (row, state.end_ids)
        for row, (state, draw) in enumerate(zip(states, draws, strict=True))
        if state.ends_are_masked(draw)
    ]
    if places:
        rows.view(-1)[_flat(places, rows)] = -torch.inf


def _apply_penalties(rows: Tensor, states: Sequence[SamplerState]) -> None:
    penalised = [(row, state.params, state.tokens) for row, state in enumerate(states) if state.tokens is not None]
    if not penalised:
        return
    counts = np.concatenate([table.counts for _, _, table in penalised])
    lengths = [len(table.ids) for _, _, table in penalised]

    def spread(values: list[float]) -> NDArray[np.float32]:
        return np.repeat(np.array(values, dtype=np.float32), lengths)

    subtracted = spread([params.frequency_penalty for _, params, _ in penalised]) * counts
    subtracted += spread([params.presence_penalty for _, params, _ in penalised]) * (counts > 0)
    # Within these bounds no finite logit becomes infinite or NaN.
    bounded = [min(max(params.repetition_penalty, 1e-30), 1e30) for _, params, _ in penalised]
    repetition = torch.from_numpy(spread(bounded)).to(rows.device)
    index = _flat([(row, table.ids) for row, _, table in penalised], rows)
    flat = rows.view(-1)
    values = flat[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[index] = values - torch.from_numpy(subtracted).to(rows.device)
