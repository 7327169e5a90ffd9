"""The two ways to draw from filtered rows: against Hugging Face's processors, each other, and at the borders."""

from __future__ import annotations

import hypothesis.extra.numpy as npst
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from peft_dist.core.batch import SequenceStart
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.runner.sampler import SamplerState, sample
from peft_dist.runner.sampler_dense import draw_tokens
from peft_dist.runner.sampler_host import draw_token, pick, top_p_set

BELOW_ONE = 1.0 - 2.0**-53


class FixedDraw(SamplerState):
    """A state whose uniform number is given instead of drawn."""

    def __init__(self, params: SamplingParams, vocab: int, u: float, prompt: list[int] | None = None) -> None:
        super().__init__(SequenceStart("r", prompt or [], [], params, 0, 0), vocab)
        self.u = u

    def uniform(self, draw: int) -> float:
        return self.u


def by_tensors(logits: np.ndarray, params: SamplingParams, u: float) -> int:
    rows = torch.from_numpy(logits[None])
    state = FixedDraw(params, len(logits), u)
    return int(draw_tokens(rows, rows.amax(1, keepdim=True), [state], [0])[0])


def by_numpy(logits: np.ndarray, params: SamplingParams, u: float) -> int:
    return draw_token(logits, float(logits.max()), params.temperature, params, u)


both = pytest.mark.parametrize("draw", [by_numpy, by_tensors])


def support(draw, logits: np.ndarray, params: SamplingParams, steps: int = 400) -> set[int]:
    return {draw(logits, params, u) for u in [*np.linspace(0, 1, steps, endpoint=False).tolist(), BELOW_ONE]}


uniform = st.one_of(st.sampled_from([0.0, 0.5, BELOW_ONE]), st.floats(0, 1, exclude_max=True))
filters = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 4.0),
    top_k=st.one_of(st.just(0), st.integers(-1, 700)),
    top_p=st.one_of(st.just(1.0), st.floats(1e-12, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)


@settings(max_examples=200, deadline=None)
@given(npst.arrays(np.float32, st.integers(1, 600), elements=st.floats(-20, 20, width=32)), filters, uniform)
def test_both_ways_draw_the_same(logits: np.ndarray, params: SamplingParams, u: float) -> None:
    first, second = by_numpy(logits, params, u), by_tensors(logits, params, u)
    if first != second:
        # Sums and powers may differ in the last bits: then a tiny step of one number must explain it.
        steps = [dict.fromkeys(STEPPED, 0.0) | {name: d} for name in STEPPED for d in (-1e-6, 1e-6)]
        near = {way(logits, *nudged(params, u, step)) for way in (by_numpy, by_tensors) for step in steps}
        assert {first, second} <= near


STEPPED = ("u", "top_p", "min_p")


def nudged(params: SamplingParams, u: float, step: dict[str, float]) -> tuple[SamplingParams, float]:
    top_p = min(max(params.top_p + step["top_p"], 1e-12), 1.0)
    min_p = min(max(params.min_p + step["min_p"], 0.0), 1.0)
    return msgspec.structs.replace(params, top_p=top_p, min_p=min_p), min(max(u + step["u"], 0.0), BELOW_ONE)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0.2, 3.0),
    st.floats(0.3, 2.5),
    st.one_of(st.just(0), st.integers(1, 40)),
    st.floats(0.05, 0.999),
    st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    uniform,
)
def test_the_whole_chain_is_hugging_faces(seed, temperature, repetition, top_k, top_p, min_p, u) -> None:
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.standard_normal((1, 50)).astype(np.float32) * 3)
    prompt = generator.integers(0, 50, 12).tolist()
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(repetition),
            TemperatureLogitsWarper(temperature),
            *([MinPLogitsWarper(min_p)] if min_p else []),
            *([TopKLogitsWarper(top_k)] if top_k else []),
        ]
    )
    before_top_p = chain(torch.tensor([prompt]), logits)
    ordered = before_top_p.softmax(-1, dtype=torch.float64).sort(descending=True).values.cumsum(-1)
    assume(float((ordered - top_p).abs().min()) > 1e-5)
    probabilities = TopPLogitsWarper(top_p)(torch.tensor([prompt]), before_top_p)[0].softmax(-1, dtype=torch.float64)
    sums = probabilities.cumsum(-1)
    assume(float((sums[probabilities > 0] - u).abs().min()) > 1e-5 or u in (0.0, BELOW_ONE))
    expected = (sums > u).nonzero()[0] if u < BELOW_ONE else probabilities.nonzero()[-1]

    params = SamplingParams(
        temperature=temperature, repetition_penalty=repetition, top_k=top_k, top_p=top_p, min_p=min_p
    )
    assert sample(logits, [FixedDraw(params, 50, u, prompt)], [0]).token_ids.tolist() == expected.tolist()


@both
def test_the_ends_of_the_unit_interval_draw_the_first_and_last_kept_token(draw) -> None:
    logits = np.array([-np.inf, -9.0, 2.0, 1.0, 2.0, -9.0, -np.inf], dtype=np.float32)
    for params, kept in (
        (SamplingParams(), {1, 2, 3, 4, 5}),
        (SamplingParams(top_k=3), {2, 3, 4}),
        (SamplingParams(top_k=2), {2, 4}),
        (SamplingParams(min_p=0.3), {2, 3, 4}),
        (SamplingParams(top_p=0.9), {2, 3, 4}),
        (SamplingParams(top_p=0.3), {2}),
        (SamplingParams(top_p=1e-300), {2}),
        (SamplingParams(top_p=0.99, top_k=4, min_p=0.5), {2, 4}),
    ):
        assert draw(logits, params, 0.0) == min(kept)
        assert draw(logits, params, BELOW_ONE) == max(kept)
        assert support(draw, logits, params, 40) <= kept


@both
@pytest.mark.parametrize("vocab", [1, 2, 3, 255, 256, 257, 1000])
def test_the_last_draw_below_one_reaches_the_last_token(draw, vocab: int) -> None:
    # Sums of thirds and sevenths round; the draw must stay inside whatever they come to.
    logits = np.log(np.arange(1, vocab + 1, dtype=np.float32) / 3)
    for params in (SamplingParams(), SamplingParams(top_p=1 - 2**-53), SamplingParams(temperature=0.7)):
        assert draw(logits, params, BELOW_ONE) == vocab - 1
        assert draw(logits, params, 0.0) == 0


@both
def test_ties_at_the_border_of_top_p_stay_in_vocabulary_order(draw) -> None:
    logits = np.zeros(10, dtype=np.float32)
    assert support(draw, logits, SamplingParams(top_p=0.35)) == {0, 1, 2, 3}
    assert support(draw, logits, SamplingParams(top_p=1e-9)) == {0}
    logits[[4, 7]] = 1.0
    assert support(draw, logits, SamplingParams(top_p=0.1)) == {4}
    assert support(draw, logits, SamplingParams(top_p=0.6)) == {0, 1, 2, 4, 7}


@both
def test_ties_at_the_border_of_top_k_all_stay(draw) -> None:
    logits = np.array([1, 3, 2, 2, 0, 2], dtype=np.float32)
    assert support(draw, logits, SamplingParams(top_k=2)) == {1, 2, 3, 5}


@both
def test_later_filters_see_what_earlier_ones_left(draw) -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    assert support(draw, logits, SamplingParams(top_p=0.55)) == {0, 1}
    # Of the two tokens that top_k leaves, the first alone holds 4/7.
    assert support(draw, logits, SamplingParams(top_k=2, top_p=0.55)) == {0}
    assert support(draw, logits, SamplingParams(min_p=0.7, top_p=0.55)) == {0}


@settings(max_examples=100, deadline=None)
@given(
    npst.arrays(np.float32, st.integers(1, 300), elements=st.floats(0, 1, width=32)), st.floats(0, 1, exclude_min=True)
)
def test_the_top_p_set_is_the_smallest(weights: np.ndarray, top_p: float) -> None:
    weights[0] = 1.0
    kept = top_p_set(weights, top_p)
    assert np.all(np.diff(kept) > 0)
    inside, total = weights[kept].sum(dtype=np.float64), weights.sum(dtype=np.float64)
    assert inside >= (top_p - 1e-12) * total
    assert inside - weights[kept].min() < (top_p + 1e-12) * total
    rest = np.delete(weights, kept)
    assert not len(rest) or rest.max() <= weights[kept].min()


@settings(max_examples=100, deadline=None)
@given(npst.arrays(np.float32, st.integers(1, 1200), elements=st.floats(0, 1, width=32)), uniform)
def test_a_pick_is_where_the_running_sum_passes_the_draw(weights: np.ndarray, u: float) -> None:
    weights[len(weights) // 2] = 0.5
    place = pick(weights, u)
    assert weights[place] > 0
    sums = np.cumsum(weights, dtype=np.float64)
    assert sums[place] >= u * sums[-1] * (1 - 1e-14)
    assert sums[place] - weights[place] <= u * sums[-1] * (1 + 1e-14) + 1e-300


def test_a_pick_at_the_border_of_two_blocks_stays_on_a_token_with_weight() -> None:
    """A block's sum and the running sum inside it are added up in different orders."""
    for seed in range(40):
        weights = np.random.default_rng(seed).random(1024, dtype=np.float32) ** 8
        blocks = weights.reshape(-1, 256)
        blocks[:, :2] = blocks[:, -2:] = 0
        shares = np.cumsum(blocks.sum(1, dtype=np.float64)) / weights.sum(dtype=np.float64)
        for share in shares.tolist():
            for u in (share, np.nextafter(share, 0), np.nextafter(share, 0) - 2.0**-53, share + 2.0**-53):
                assert weights[pick(weights, float(min(u, BELOW_ONE)))] > 0


@both
def test_a_row_of_other_filters_beside_it_changes_no_draw(draw) -> None:
    logits = np.random.default_rng(1).standard_normal((3, 500)).astype(np.float32)
    params = [SamplingParams(), SamplingParams(top_p=0.4), SamplingParams(top_k=5, min_p=0.1, temperature=0.5)]
    for u in np.linspace(0, BELOW_ONE, 25).tolist():
        states = [FixedDraw(p, 500, u) for p in params]
        rows = torch.from_numpy(logits)
        together = draw_tokens(rows, rows.amax(1, keepdim=True), states, [0] * 3).tolist()
        assert together == [draw(z, p, u) for z, p in zip(logits, params, strict=True)]


def test_frequencies_follow_the_distribution() -> None:
    """Chi-square over 20 categories: 43.8 is passed by chance once in a thousand; the seeds are fixed."""
    draws = 6000
    logits = np.random.default_rng(3).standard_normal(20).astype(np.float32)
    for params in (SamplingParams(seed=11), SamplingParams(seed=12, temperature=0.6, top_p=0.97)):
        state = SamplerState(SequenceStart("r", [], [], params, params.seed or 0, 0), 20)
        rows = torch.from_numpy(logits).expand(draws, 20)
        counts = np.bincount(sample(rows, [state] * draws, list(range(draws))).token_ids.numpy(), minlength=20)
        weights = np.exp(logits.astype(np.float64) / params.temperature)
        if params.top_p < 1:
            order = np.argsort(-weights)
            weights[order[1 + np.searchsorted(np.cumsum(weights[order]), params.top_p * weights.sum()) :]] = 0
        expected = weights / weights.sum() * draws
        kept = expected > 0
        assert counts[~kept].sum() == 0
        assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 43.8
