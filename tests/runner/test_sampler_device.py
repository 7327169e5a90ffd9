"""The tensor operations that serve a GPU draw what the host's path draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_dist.core.batch import SequenceStart
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.runner import sampler
from peft_dist.runner.sampler import SampledToken, SamplerState, sample
from peft_dist.runner.sampler_edits import AllowedTokens

VOCAB = 1009
PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, logprobs=2),
    SamplingParams(logprobs=0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.5, top_k=20, logprobs=5),
    SamplingParams(temperature=2.0, min_p=0.2, frequency_penalty=0.7),
    SamplingParams(temperature=0.9, top_k=50, top_p=0.8, min_p=0.01, presence_penalty=-0.4, logit_bias={5: 3.0}),
    SamplingParams(min_tokens=9, stop_token_ids=(1, 2)),
    SamplingParams(repetition_penalty=1e-300),
    SamplingParams(repetition_penalty=1e300, temperature=1e300, top_p=1e-300, top_k=2**70),
)


def draw(device: str, seed: int, *, limited: bool, poisoned: bool) -> list[SampledToken]:
    logits = torch.from_numpy(np.random.default_rng(seed).standard_normal((len(PARAMS), VOCAB), dtype=np.float32) * 3)
    if poisoned:
        logits[seed % len(PARAMS), 17] = torch.nan
    logits[-1, 1] = 0.0
    allowed = None
    if limited:
        rows = range(0, len(PARAMS), 3)
        words = torch.full((len(rows), (VOCAB + 31) // 32), 0x33333333, dtype=torch.int32)
        allowed = AllowedTokens(rows, words)
    states = [SamplerState(SequenceStart("r", [1, 2, 3], [4, 5, 4], p, seed, 0), VOCAB, (7,)) for p in PARAMS]
    return sample(logits.to(device), states, [3] * len(PARAMS), allowed).collect()


def assert_same(found: list[SampledToken], expected: list[SampledToken]) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert (mine.token_id, mine.error) == (other.token_id, other.error)
        assert (mine.logprobs is None) == (other.logprobs is None)
        for token, entry in (mine.logprobs or {}).items():
            assert other.logprobs is not None
            assert entry.rank == other.logprobs[token].rank
            assert entry.logprob == pytest.approx(other.logprobs[token].logprob, abs=1e-5)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("poisoned", [False, True])
def test_tensor_operations_draw_what_numpy_draws(
    monkeypatch: pytest.MonkeyPatch, limited: bool, poisoned: bool
) -> None:
    for seed in range(25):
        expected = draw("cpu", seed, limited=limited, poisoned=poisoned)
        assert sum(token.error is not None for token in expected) == poisoned
        with monkeypatch.context() as patch:
            patch.setattr(sampler, "_on_host", lambda rows: False)
            assert_same(draw("cpu", seed, limited=limited, poisoned=poisoned), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("poisoned", [False, True])
def test_a_gpu_draws_what_the_host_draws(limited: bool, poisoned: bool) -> None:
    for seed in range(100):
        expected = draw("cpu", seed, limited=limited, poisoned=poisoned)
        assert_same(draw("cuda", seed, limited=limited, poisoned=poisoned), expected)
