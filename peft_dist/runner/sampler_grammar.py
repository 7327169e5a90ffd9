"""What the rows of a batch may draw by their grammars."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_dist.core.grammars import GrammarError, Grammars
from peft_dist.runner.sampler_edits import AllowedTokens
from peft_dist.runner.sampler_state import SamplerState


def allowed_tokens(
    states: Sequence[SamplerState], grammars: Grammars
) -> tuple[AllowedTokens | None, dict[int, GrammarError]]:
    """What the rows may draw next, and why some of them may not go on.

    Waits for grammars that are still being read, so the forward pass should be under way. All tokens that were drawn
    so far must be known.
    """
    rows, matchers = [], []
    failed: dict[int, GrammarError] = {}
    for row, state in enumerate(states):
        if state.grammar is None or state.grammar.ended:
            continue
        try:
            matchers.append(state.grammar.matcher())
        except GrammarError as error:
            failed[row] = error
        else:
            rows.append(row)
    if not rows:
        return None, failed
    words = torch.empty(len(rows), (grammars.vocab_size + 31) // 32, dtype=torch.int32)
    grammars.fill(matchers, words.data_ptr())
    for row in rows:
        grammar = states[row].grammar
        assert grammar is not None, "it was asked above"
        # Limits of the library are met here.
        if (problem := grammar.problem()) is not None:
            failed[row] = problem
    return AllowedTokens(rows, words), failed
