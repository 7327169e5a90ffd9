"""The batch sampler against a slow oracle that knows one row at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peft_dist.core.batch import SequenceStart
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.runner.draws import uniforms
from peft_dist.runner.sampler import SamplerState, sample
from peft_dist.runner.sampler_edits import AllowedTokens, edit_logits

VOCAB = 70
EOS = (3, 64)


@dataclass
class Row:
    """One sequence and its logits."""

    logits: np.ndarray
    params: SamplingParams
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    seed: int = 0
    index: int = 0
    allowed: frozenset[int] | None = None

    def state(self) -> SamplerState:
        start = SequenceStart("r", self.prompt, self.output, self.params, self.seed, self.index)
        return SamplerState(start, len(self.logits), EOS)


def edited_by_hand(row: Row) -> np.ndarray:
    """Bias, ends, penalties: one token at a time, in float32 as they are defined (so that ties agree)."""
    p, z, f = row.params, row.logits.copy(), np.float32
    for token in range(len(z)):
        if row.allowed is not None and token not in row.allowed:
            z[token] = -math.inf
        z[token] += f((p.logit_bias or {}).get(token, 0.0))
        if len(row.output) < p.min_tokens and token in (*EOS, *p.stop_token_ids):
            z[token] = -math.inf
        if token in row.prompt or token in row.output:
            penalty = f(p.repetition_penalty)
            z[token] = z[token] / penalty if z[token] > 0 else z[token] * penalty
        if times := row.output.count(token):
            z[token] -= f(p.frequency_penalty) * f(times) + f(p.presence_penalty)
    return z


def filtered_by_hand(z: np.ndarray, p: SamplingParams) -> tuple[np.ndarray, float]:
    """The distribution that is drawn from, and how near a filter's border comes to flipping."""
    margin = math.inf
    weights = np.exp((z - z.max()).astype(np.float64) / p.temperature)
    if p.min_p:
        margin = min(margin, float(np.abs(weights - p.min_p).min()))
        weights[weights < p.min_p] = 0.0
    if 0 < p.top_k < len(z):
        weights[z < sorted(z)[-p.top_k]] = 0.0
    if p.top_p < 1:
        kept, share = [], 0.0
        for token in sorted(range(len(z)), key=lambda t: (-weights[t], t)):
            if share >= p.top_p:
                break
            kept.append(token)
            share += weights[token] / weights.sum()
            margin = min(margin, abs(share - p.top_p))
        gap = min(weights[kept]) - max(
            [weight for token, weight in enumerate(weights) if token not in kept], default=-1.0
        )
        # Weights that are equal go by their place; those that differ by less than float32 can tell may do so too.
        margin = margin if gap == 0 else min(margin, gap)
        weights = np.array([weight if token in kept else 0.0 for token, weight in enumerate(weights)])
    return weights / weights.sum(), margin


def token_by_hand(row: Row) -> int:
    z = edited_by_hand(row)
    assume(z.max() > -math.inf)
    if row.params.temperature < 1e-5:
        return int(z.argmax())
    probabilities, margin = filtered_by_hand(z, row.params)
    u = uniforms(row.seed, row.index, len(row.output), 1)[0]
    total = 0.0
    for token, probability in enumerate(probabilities):
        total += probability
        margin = min(margin, abs(total - u) if probability else math.inf)
        if total > u:
            assume(margin > 1e-5)
            return token
    raise AssertionError("probabilities add up to less than the draw")


def pack(rows: list[Row]) -> AllowedTokens | None:
    limited = [r for r, row in enumerate(rows) if row.allowed is not None]
    if not limited:
        return None
    words = np.zeros((len(limited), (VOCAB + 31) // 32), dtype=np.uint32)
    for place, r in enumerate(limited):
        for token in rows[r].allowed or ():
            words[place, token // 32] |= np.uint32(1 << (token % 32))
    return AllowedTokens(limited, torch.from_numpy(words.view(np.int32)))


def draw(rows: list[Row]) -> list[int]:
    logits = torch.from_numpy(np.stack([row.logits for row in rows]))
    before = logits.clone()
    sampled = sample(logits, [row.state() for row in rows], [len(row.output) for row in rows], pack(rows))
    assert torch.equal(logits, before), "the caller's logits were changed"
    found = sampled.collect()
    assert [token.error for token in found] == [None] * len(rows)
    assert [token.token_id for token in found] == sampled.token_ids.tolist()
    return [token.token_id for token in found]


ids = st.integers(0, VOCAB - 1)
# Eighths make ties common; the wide floats make them rare.
logit = st.one_of(st.integers(-40, 40).map(lambda n: n / 8), st.floats(-30, 30, width=32))


@st.composite
def params(draw_: st.DrawFn) -> SamplingParams:
    def maybe(strategy: st.SearchStrategy, neutral: object) -> object:
        return draw_(st.one_of(st.just(neutral), strategy))

    return SamplingParams(
        temperature=maybe(st.one_of(st.just(0.0), st.floats(0.05, 5.0)), 1.0),
        top_k=maybe(st.integers(-1, VOCAB + 3), 0),
        top_p=maybe(st.floats(0.01, 1.0), 1.0),
        min_p=maybe(st.floats(0.0, 1.0), 0.0),
        presence_penalty=maybe(st.floats(-2, 2), 0.0),
        frequency_penalty=maybe(st.floats(-2, 2), 0.0),
        repetition_penalty=maybe(st.floats(0.3, 3.0), 1.0),
        logit_bias=maybe(st.dictionaries(ids, st.floats(-100, 100), max_size=5), None),
        stop_token_ids=maybe(st.lists(ids, max_size=3), ()),
        min_tokens=maybe(st.integers(0, 6), 0),
        max_tokens=None,
    )


@st.composite
def rows(draw_: st.DrawFn) -> Row:
    return Row(
        logits=draw_(npst.arrays(np.float32, VOCAB, elements=logit, fill=logit)),
        params=draw_(params()),
        prompt=draw_(st.lists(ids, max_size=6)),
        output=draw_(st.lists(ids, max_size=6)),
        seed=draw_(st.integers(-(2**63), 2**64 - 1)),
        index=draw_(st.integers(0, 127)),
        allowed=draw_(st.one_of(st.none(), st.frozensets(ids, min_size=3))),
    )


@settings(max_examples=200, deadline=None)
@given(rows())
def test_a_row_draws_what_the_oracle_draws(row: Row) -> None:
    expected = token_by_hand(row)
    assert draw([row]) == [expected]


@settings(max_examples=100, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=4))
def test_edited_logits_are_the_oracles_to_the_last_bit(batch: list[Row]) -> None:
    logits = torch.from_numpy(np.stack([row.logits for row in batch]))
    edit_logits(logits, [row.state() for row in batch], [len(row.output) for row in batch], pack(batch))
    np.testing.assert_array_equal(logits.numpy(), np.stack([edited_by_hand(row) for row in batch]))


def test_edits_are_made_in_their_order() -> None:
    p = SamplingParams(
        logit_bias={1: 2.0, 2: -3.0}, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    row = Row(np.array([1.0, 1.0, 1.0, -0.5], dtype=np.float32), p, prompt=[0, 1, 3], output=[2, 2])
    logits = torch.from_numpy(row.logits[None].copy())
    edit_logits(logits, [row.state()], [2])
    assert logits.tolist() == [[0.5, 1.5, -4.0 - 1.0, -1.0]]


@settings(max_examples=40, deadline=None)
@given(st.lists(rows(), min_size=2, max_size=6), st.randoms())
def test_batch_mates_and_places_change_nothing(batch: list[Row], random) -> None:
    for row in batch:
        assume(edited_by_hand(row).max() > -math.inf)
    alone = [draw([row])[0] for row in batch]
    order = random.sample(range(len(batch)), len(batch))
    assert draw([batch[i] for i in order]) == [alone[i] for i in order]


@settings(max_examples=40, deadline=None)
@given(params(), st.lists(ids, max_size=5), st.integers(0, 2**32), st.integers(0, 11))
def test_a_sequence_continued_elsewhere_draws_the_same_tokens(p: SamplingParams, prompt, seed: int, cut: int) -> None:
    logits = torch.from_numpy(np.random.default_rng(seed).standard_normal((12, VOCAB), dtype=np.float32) * 2)
    state = Row(logits[0].numpy(), p, prompt, seed=seed).state()
    whole: list[int] = []
    for k in range(12):
        whole.append(int(sample(logits[k : k + 1], [state], [k]).token_ids[0]))
        state.append(whole[-1:])
    moved = Row(logits[0].numpy(), p, prompt, whole[:cut], seed=seed).state()
    for k in range(cut, 12):
        assert int(sample(logits[k : k + 1], [moved], [k]).token_ids[0]) == whole[k]
        moved.append(whole[k : k + 1])


def normal(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, VOCAB), dtype=np.float32)


MIXED = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, repetition_penalty=1.5),
    SamplingParams(temperature=0.8, top_p=0.7),
    SamplingParams(temperature=1.3, top_k=9, presence_penalty=1.0, logprobs=3),
    SamplingParams(),
)


@pytest.mark.parametrize(
    "poison",
    [
        lambda z: z.__setitem__(7, np.nan),
        lambda z: z.__setitem__(0, np.inf),
        lambda z: z.fill(np.nan),
        lambda z: z.fill(np.inf),
        lambda z: z.fill(-np.inf),
    ],
    ids=["one NaN", "one +inf", "all NaN", "all +inf", "all -inf"],
)
@pytest.mark.parametrize("bad", range(len(MIXED)))
def test_a_row_that_is_not_finite_fails_alone(poison, bad: int) -> None:
    logits = normal(len(MIXED))
    batch = [Row(z, p, [1, 2], [5], seed=i) for i, (z, p) in enumerate(zip(logits, MIXED, strict=True))]
    healthy = draw(batch)
    poison(logits[bad])
    found = sample(torch.from_numpy(logits), [row.state() for row in batch], [1] * len(batch)).collect()
    assert "not finite" in (found[bad].error or "")
    assert found[bad][:2] == (0, None)
    others = [i for i in range(len(batch)) if i != bad]
    assert [found[i].token_id for i in others] == [healthy[i] for i in others]
    assert all(found[i].error is None for i in others)


def test_masked_tokens_of_the_model_itself_are_no_error() -> None:
    logits = normal(len(MIXED))
    logits[:, 5:] = -np.inf
    assert max(draw([Row(z, p) for z, p in zip(logits, MIXED, strict=True)])) < 5


def test_a_request_that_leaves_no_token_fails_alone() -> None:
    p = SamplingParams(min_tokens=2)
    batch = [Row(normal(1)[0], p, allowed=frozenset(EOS)), Row(normal(1)[0], p, allowed=frozenset({*EOS, 9}))]
    logits = torch.from_numpy(np.stack([row.logits for row in batch]))
    found = sample(logits, [row.state() for row in batch], [0, 0], pack(batch)).collect()
    assert "no token is left" in (found[0].error or "")
    assert found[1][::2] == (9, None)


def test_ends_come_only_after_min_tokens() -> None:
    logits = np.full(VOCAB, -5.0, dtype=np.float32)
    logits[[3, 64, 11]] = 9.0
    logits[12] = 1.0
    p = SamplingParams(temperature=0.0, min_tokens=3, stop_token_ids=(11,), ignore_eos=True)
    state = Row(logits, p).state()
    drawn = [int(sample(torch.from_numpy(logits[None]), [state], [k]).token_ids[0]) for k in range(5)]
    assert drawn == [12, 12, 12, 3, 3]


def test_ids_outside_the_vocabulary_touch_no_other_row() -> None:
    p = SamplingParams(
        temperature=0.0,
        logit_bias={VOCAB + 1: 100.0},
        stop_token_ids=(VOCAB + 2,),
        min_tokens=4,
        repetition_penalty=2.0,
    )
    batch = [Row(normal(1)[0], p, [VOCAB + 3, -1], [VOCAB + 4]), Row(normal(1, 1)[0], SamplingParams(temperature=0.0))]
    assert draw(batch)[1] == int(batch[1].logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 9e-6, 1.1e-5, 1e-3])
def test_the_limit_of_low_temperatures_is_greedy(temperature: float) -> None:
    assert draw([Row(z, SamplingParams(temperature=temperature)) for z in normal(4)]) == normal(4).argmax(1).tolist()


def test_the_limit_of_high_temperatures_is_uniform_over_what_the_model_allows() -> None:
    logits = normal(1)
    logits[:, ::2] = -np.inf
    drawn = {draw([Row(logits[0], SamplingParams(temperature=1e300), seed=s)])[0] for s in range(400)}
    assert drawn == set(range(1, VOCAB, 2))


def test_greedy_takes_the_first_of_equals() -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[[8, 30]] = 2.0
    assert draw([Row(logits, SamplingParams(temperature=0.0)), Row(logits, SamplingParams(top_k=1, top_p=0.1))]) == [
        8,
        8,
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_sampled_as_their_float32_values(dtype: torch.dtype) -> None:
    logits = torch.from_numpy(normal(len(MIXED))).to(dtype)
    states = [Row(normal(1)[0], p, [1], [2]).state() for p in MIXED]
    narrow, wide = (sample(x, states, [1] * len(states)).token_ids for x in (logits, logits.float()))
    assert torch.equal(narrow, wide)


def test_an_empty_batch_draws_nothing() -> None:
    assert sample(torch.empty(0, VOCAB), [], []).collect() == []
