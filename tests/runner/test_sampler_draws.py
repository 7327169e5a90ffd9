"""Philox against the published known answers, and against numpy's 64-bit sibling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.runner.draws import philox4x32, uniforms

WORD32 = (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85)
WORD64 = (0xD2E7470EE14C6C93, 0xCA5A826395121157, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, int], bits: int) -> tuple[int, ...]:
    """Ten rounds in Python integers, for 32 or 64 bit words."""
    m0, m1, w0, w1 = WORD32 if bits == 32 else WORD64
    mask = (1 << bits) - 1
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        left, right = m0 * a, m1 * c
        a, b, c, d = (right >> bits) ^ b ^ k0, right & mask, (left >> bits) ^ d ^ k1, left & mask
        k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    return a, b, c, d


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_the_random123_suite(counter, key, expected) -> None:
    assert tuple(philox4x32(np.array([counter], dtype=np.uint32), key)[0].tolist()) == expected


words64 = st.integers(0, 2**64 - 2)


@given(words64, words64, words64, words64)
def test_the_oracle_is_numpys_philox_when_its_words_have_64_bits(low: int, high: int, k0: int, k1: int) -> None:
    numpys = np.random.Philox(
        counter=np.array([low, 0, high, 0], dtype=np.uint64), key=np.array([k0, k1], dtype=np.uint64)
    ).random_raw(4)
    # numpy steps its counter before the first block.
    assert philox_by_hand((low + 1, 0, high, 0), (k0, k1), 64) == tuple(numpys.tolist())


@settings(max_examples=50)
@given(st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 4), min_size=1, max_size=5), st.integers(0, 2**64 - 1))
def test_blocks_agree_with_the_oracle(counters, seed: int) -> None:
    key = (seed & 0xFFFFFFFF, seed >> 32)
    blocks = philox4x32(np.array(counters, dtype=np.uint32), key)
    assert [tuple(row) for row in blocks.tolist()] == [philox_by_hand(c, key, 32) for c in counters]


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 127), st.integers(0, 2**40), st.integers(1, 40))
def test_a_draw_depends_only_on_its_number(seed: int, index: int, first: int, count: int) -> None:
    block = uniforms(seed, index, first, count)
    assert np.all((block >= 0) & (block < 1))
    assert [uniforms(seed, index, first + i, 1)[0] for i in (0, count - 1)] == [block[0], block[-1]]


def test_seeds_sequences_and_draws_have_streams_of_their_own() -> None:
    streams = np.concatenate([uniforms(seed, index, 0, 500) for seed in (0, 1, 2**32, 2**63) for index in range(4)])
    assert len(np.unique(streams)) == len(streams)
    assert abs(streams.mean() - 0.5) < 0.01
    assert abs(streams.var() - 1 / 12) < 0.005
