"""The capacity benchmark's whole way, small: it compares every stream itself, and must notice what is wrong."""

from __future__ import annotations

import pytest
from bench import bench_capacity
from bench.capacity_client import Reading
from demo_model import MODEL_FOLDER, cache_root, is_complete
from tokenizers import Tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    folder = cache_root() / MODEL_FOLDER
    if not is_complete(folder):
        pytest.skip("the demo model is not in the cache (make demo puts it there)")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.slow
def test_streams_of_real_processes_are_right(tokenizer: Tokenizer) -> None:
    figures = bench_capacity.run(num_streams=8, rate=2000, num_tokens=40)
    assert figures["streams_compared_whole"] == 1 and figures["events"] > 8 * 30


def test_wrong_streams_are_noticed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three").ids
    wanted = bench_capacity.expected(tokenizer, bench_capacity.COMPLETIONS, ids, keeps=False)
    assert (wanted.tokens, wanted.num_events) == ([0, 1, 2], 5)
    bench_capacity.check(tokenizer, wanted, Reading([1.0], [5], 9))
    with pytest.raises(AssertionError, match="4 events of 5"):
        bench_capacity.check(tokenizer, wanted, Reading([1.0], [4], 9))
    body = b'data: {"choices":[{"text":"one","token_ids":[1],"finish_reason":"length"}]}\n\n'
    body += b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\ndata: [DONE]\n\n'
    data = b"HTTP/1.1 200 OK\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    with pytest.raises(AssertionError, match="text is another"):
        bench_capacity.check(tokenizer, wanted, Reading([1.0], [5], len(data), data))
