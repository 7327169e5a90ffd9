"""Log-probabilities of chosen tokens and of prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.core.batch import SequenceStart
from peft_dist.core.outputs import PositionLogprobs
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.runner import sampler_logprobs
from peft_dist.runner.sampler import SamplerState, sample
from peft_dist.runner.sampler_logprobs import NonFiniteLogitsError, prompt_logprobs

VOCAB = 37


def normal(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def check(position: PositionLogprobs, logits: torch.Tensor, chosen: int, top: int) -> None:
    """One position, from the definition: sort, and sum exponentials in float64."""
    z = logits.double().numpy()
    exact = z - np.log(np.exp(z - z.max()).sum()) - z.max()
    order = sorted(range(len(z)), key=lambda t: -z[t])
    assert list(position) == [chosen, *(t for t in order[:top] if t != chosen)]
    for token, found in position.items():
        assert found.logprob == pytest.approx(exact[token], abs=1e-5)
        assert found.rank == 1 + sum(z > z[token])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([None, 0, 1, 5, 20]), min_size=1, max_size=6), st.booleans(), st.integers(0, 999))
def test_rows_that_ask_get_the_raw_distribution(tops: list[int | None], greedy: bool, seed: int) -> None:
    logits = normal(len(tops), seed)
    states = []
    for top in tops:
        params = SamplingParams(
            temperature=0.0 if greedy else 0.5, logprobs=top, logit_bias={3: 50.0}, top_k=7, repetition_penalty=1.7
        )
        states.append(SamplerState(SequenceStart("r", [1, 2, 3], [4], params, seed, 0), VOCAB))
    sampled = sample(logits, states, [1] * len(tops)).collect()
    for row, top in enumerate(tops):
        if top is None:
            assert sampled[row].logprobs is None
        else:
            assert sampled[row].logprobs is not None
            check(sampled[row].logprobs, logits[row], sampled[row].token_id, top)


@pytest.mark.parametrize("slice_bytes", [1, 4 * VOCAB * 3, 1 << 30])
def test_prompts_are_the_same_in_slices_of_any_size(monkeypatch: pytest.MonkeyPatch, slice_bytes: int) -> None:
    monkeypatch.setattr(sampler_logprobs, "_SLICE_BYTES", slice_bytes)
    logits, successors = normal(11), [(5 * t) % VOCAB for t in range(11)]
    found = prompt_logprobs(logits, successors, 4)
    assert len(found) == 11
    for row, position in enumerate(found):
        check(position, logits[row], successors[row], 4)


def test_no_top_tokens_means_the_chosen_alone() -> None:
    assert [list(position) for position in prompt_logprobs(normal(3), torch.tensor([5, 6, 7]), 0)] == [[5], [6], [7]]


def test_an_empty_prompt_has_no_positions() -> None:
    assert prompt_logprobs(torch.empty(0, VOCAB), [], 3) == []


def test_more_top_tokens_than_the_vocabulary_holds() -> None:
    assert len(prompt_logprobs(normal(1)[:, :4], [2], 20)[0]) == 4


def test_equals_share_the_better_rank() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    position = prompt_logprobs(logits, [4], 4)[0]
    assert {token: entry.rank for token, entry in position.items()} == {1: 1, 2: 1, 4: 1, 3: 4}
    assert next(iter(position)) == 4


def test_a_prompt_row_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_logprobs, "_SLICE_BYTES", 4 * VOCAB * 2)
    logits = normal(7)
    logits[5, 2] = torch.nan
    with pytest.raises(NonFiniteLogitsError, match="row 5"):
        prompt_logprobs(logits, [0] * 7, 1)


def test_a_token_the_model_excludes_has_no_probability() -> None:
    logits = normal(1)
    logits[0, 9] = -torch.inf
    entry = prompt_logprobs(logits, [9], 0)[0][9]
    assert entry.logprob == -np.inf
    assert entry.rank == VOCAB
