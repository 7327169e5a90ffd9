"""Names of blocks: chained, and the same however the tokens come to be known."""

from __future__ import annotations

import hashlib

import hypothesis.strategies as st
from hypothesis import given

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.block_hash import chain_hashes, extend_block_hashes
from peft_dist.core.request import Request
from peft_dist.core.sampling_params import SamplingParams

SIZE = 4
TOKENS = st.lists(st.integers(0, 9), max_size=40)


@given(TOKENS, TOKENS)
def test_equal_names_are_equal_prefixes(one: list[int], other: list[int]) -> None:
    first, second = (chain_hashes(b"red", tokens, SIZE) for tokens in (one, other))
    assert len(first) == len(one) // SIZE
    for number, (a, b) in enumerate(zip(first, second, strict=False), start=1):
        assert (a == b) == (one[: number * SIZE] == other[: number * SIZE])
    assert not set(first) & set(chain_hashes(b"blue", one, SIZE))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.lists(TOKENS, max_size=4))
def test_a_chain_can_be_gone_on_with(prompt: list[int], drawn: list[list[int]]) -> None:
    red = AdapterSpec(name="x", content_hash="red", path="x", ranks={"q": 1}, num_bytes=1)
    request = Request("r", prompt, SamplingParams(), seed=0, arrival_time=0.0, adapter=red)
    extend_block_hashes(request, SIZE)
    for tokens in drawn:
        request.output_token_ids += tokens
        extend_block_hashes(request, SIZE)
    assert request.block_hashes == chain_hashes(b"red", request.prompt_token_ids + request.output_token_ids, SIZE)


def test_names_are_the_same_in_every_process() -> None:
    data = b"".join(token.to_bytes(8, "little") for token in (1, 2, 3, 4))
    assert chain_hashes(b"red", [1, 2, 3, 4, 5], SIZE) == [hashlib.blake2b(b"red" + data, digest_size=16).digest()]
