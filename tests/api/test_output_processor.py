"""Stop strings, log-probabilities and finish reasons, from reports cut in every way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from peft_dist.api.output_processor import Delta, RequestOutputs, SequenceOutput
from peft_dist.core.errors import PeftDistError
from peft_dist.core.messages import SequenceProgress
from peft_dist.core.outputs import Logprob, PositionLogprobs
from peft_dist.core.sampling_params import SamplingParams

PIECES = ["a", "b", "c", "ab", "bc", "abc", "aab", "cab", "Ġ", "ÃĠ", "Ã", "©", "bÃ", "ðŁĺ", "Ģ", "X", "bbbb"]
EOS = len(PIECES)


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


TOKENIZER = make_tokenizer()


def ids(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def positions(token_ids: Sequence[int]) -> list[PositionLogprobs]:
    return [{token: Logprob(-0.5 - k, 2), 0: Logprob(-0.25, 1)} for k, token in enumerate(token_ids)]


def reports(token_ids: list[int], cuts: list[int], reason: str | None = "length", stop_id: int | None = None):
    """The reports of a sequence that ends with ``reason`` (None: it goes on), cut before the given places."""
    borders = sorted({0, *(cut for cut in cuts if cut < len(token_ids)), len(token_ids)})
    ranges = list(pairwise(borders)) or [(0, 0)]
    for start, stop in ranges:
        last = stop == len(token_ids)
        yield SequenceProgress(
            request_id="r-0",
            token_ids=token_ids[start:stop],
            first_index=start,
            logprobs=positions(token_ids)[start:stop],
            finish_reason=reason if last else None,
            stop_reason=stop_id if last else None,
        )


def run(params: SamplingParams, progress: Any, tokenizer: Any = TOKENIZER) -> tuple[SequenceOutput, list[Delta], bool]:
    output = SequenceOutput(tokenizer, [], params)
    deltas, aborted = [], False
    for report in progress:
        deltas.append(output.add(report))
        aborted |= output.must_abort
        if output.must_abort:
            assert report.finish_reason is None
    return output, deltas, aborted


def expected_end(token_ids: list[int], params: SamplingParams) -> tuple[str, int, str | None]:
    """Text, number of tokens and stop string by definition: look at every end of the whole text, from the left."""
    texts = [TOKENIZER.decode(token_ids[: n + 1]) for n in range(len(token_ids))]
    whole = texts[-1] if texts else ""
    # The first token with which each character is certain.
    known = [
        next((n for n, text in enumerate(texts) if not text.endswith("\ufffd") and len(text) > c), len(texts) - 1)
        for c in range(len(whole))
    ]
    for end in range(1, len(whole) + 1):
        for stop in sorted(params.stop, key=len, reverse=True):
            if whole[:end].endswith(stop) and known[end - 1] + 1 >= params.min_tokens:
                cut = end if params.include_stop_str_in_output else end - len(stop)
                return whole[:cut], known[end - 1] + 1, stop
    return whole, len(token_ids), None


@settings(max_examples=250, deadline=None)
@given(
    tokens=st.lists(st.integers(0, len(PIECES) - 1), max_size=25),
    cuts=st.lists(st.integers(0, 25), max_size=25),
    stops=st.lists(st.text("abcéX😀", min_size=1, max_size=5), max_size=4),
    min_tokens=st.integers(0, 12),
    include=st.booleans(),
)
def test_stop_strings_are_found_however_text_is_cut(tokens, cuts, stops, min_tokens: int, include: bool) -> None:
    params = SamplingParams(
        stop=tuple(stops),
        min_tokens=min_tokens,
        max_tokens=None,
        include_stop_str_in_output=include,
        skip_special_tokens=False,
        logprobs=1,
    )
    text, count, stop = expected_end(tokens, params)
    output, deltas, aborted = run(params, reports(tokens, cuts))
    completion = output.completion()
    assert (completion.text, completion.token_ids, completion.stop_reason) == (text, tokens[:count], stop)
    assert completion.finish_reason == ("length" if stop is None else "stop")
    assert completion.logprobs is not None
    assert [next(iter(position)) for position in completion.logprobs] == tokens[:count]
    assert "".join(delta.text for delta in deltas) == text
    assert [token for delta in deltas for token in delta.token_ids] == tokens[:count]
    assert [position for delta in deltas for position in delta.logprobs or ()] == completion.logprobs
    last_border = max([cut for cut in cuts if cut < len(tokens)], default=0)
    assert aborted == (stop is not None and count <= last_border)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(ids("a", "b", "c", "ab", "bc", "abc", "aab", "cab", "X", "bbbb")), max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=5),
)
def test_nothing_is_given_out_that_a_stop_string_may_still_take(tokens: list[int], stops: list[str]) -> None:
    params = SamplingParams(stop=tuple(stops), max_tokens=None)
    output, given_out = SequenceOutput(TOKENIZER, [], params), ""
    for report in reports(tokens, list(range(20)), reason=None):
        given_out += output.add(report).text
        known = TOKENIZER.decode(tokens[: report.first_index + len(report.token_ids)])
        if output.finish_reason is None:
            late = known.removeprefix(given_out)
            assert known.startswith(given_out)
            # What is late begins a stop string, and nothing longer at the end does.
            candidates = [known[i:] for i in range(len(known)) if any(s.startswith(known[i:]) for s in stops)]
            assert late == max(candidates, key=len, default="")


def test_the_first_to_end_wins_then_the_longest() -> None:
    assert run(SamplingParams(stop=("abcab", "bc")), reports(ids("a", "bc", "ab"), []))[0].stop_reason == "bc"
    output, _, _ = run(SamplingParams(stop=("c", "bc")), reports(ids("a", "bc"), []))
    assert (output.completion().text, output.stop_reason) == ("a", "bc")


def test_min_tokens_lets_an_early_stop_string_pass_for_good() -> None:
    params = SamplingParams(stop=("b",), min_tokens=3)
    output, deltas, aborted = run(params, reports(ids("a", "b", "a", "a", "b", "c"), [1, 2, 3, 4, 5]))
    assert (output.completion().text, len(output.completion().token_ids), aborted) == ("abaa", 5, True)
    assert [delta.text for delta in deltas] == ["a", "b", "a", "a", "", ""]
    assert run(SamplingParams(stop=("b",), min_tokens=2), reports(ids("a", "b"), []))[0].completion().text == "a"


def test_a_stop_string_may_begin_inside_one_that_came_too_early() -> None:
    output, deltas, _ = run(SamplingParams(stop=("aba",), min_tokens=3), reports(ids("ab", "a", "b", "a"), [1, 2, 3]))
    assert (output.completion().text, output.stop_reason) == ("ab", "aba")
    assert [delta.text for delta in deltas] == ["", "ab", "", ""]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop_id", [None, PIECES.index("X")])
def test_the_token_that_ends_a_sequence_is_counted_but_not_shown(include: bool, stop_id: int | None) -> None:
    end = EOS if stop_id is None else stop_id
    params = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=False, logprobs=0)
    output, _, aborted = run(params, reports([*ids("a", "b"), end], [1], "stop", stop_id))
    completion = output.completion()
    assert completion.text == "ab" + ("" if not include else "<eos>" if stop_id is None else "X")
    assert (completion.token_ids[-1], completion.finish_reason, completion.stop_reason) == (end, "stop", stop_id)
    assert len(completion.logprobs or ()) == 3
    assert not aborted


@pytest.mark.parametrize("reason", ["length", "abort"])
def test_what_was_held_back_comes_with_the_end(reason: str) -> None:
    params = SamplingParams(stop=("abX",))
    output, deltas, _ = run(params, reports(ids("c", "a", "bÃ"), [1, 2], reason))
    assert [delta.text for delta in deltas] == ["c", "", "ab\ufffd"]
    assert (output.finish_reason, output.stop_reason) == (reason, None)


def test_an_end_without_tokens() -> None:
    output, deltas, _ = run(SamplingParams(stop=("abX",)), reports(ids("ab"), [], None))
    assert deltas == [Delta(token_ids=ids("ab"))]
    end = SequenceProgress(request_id="r-0", token_ids=[], first_index=1, finish_reason="abort")
    assert output.add(end) == Delta("ab", [], None, "abort")
    nothing, _, _ = run(SamplingParams(max_tokens=0, logprobs=1), reports([], []))
    completion = nothing.completion()
    assert (completion.text, completion.token_ids, completion.logprobs) == ("", [], [])
    assert (completion.cumulative_logprob, completion.finish_reason) == (0, "length")


def test_a_failed_sequence_ends() -> None:
    output = SequenceOutput(TOKENIZER, [], SamplingParams())
    delta = output.add(
        SequenceProgress(request_id="r", token_ids=[], first_index=0, finish_reason="error", error="not finite")
    )
    assert delta.finish_reason == "error" and output.completion().error == "not finite"
    assert not output.must_abort


def test_reports_after_the_end_add_nothing() -> None:
    output, _, aborted = run(SamplingParams(stop=("b",)), reports(ids("a", "b"), [], None))
    before = output.completion()
    late = SequenceProgress(request_id="r-0", token_ids=ids("c"), first_index=2, finish_reason="length")
    assert output.add(late) == Delta(finish_reason="stop", stop_reason="b")
    assert output.completion() == before
    assert aborted
    assert not output.must_abort


def test_tokens_reported_twice_count_once_and_lost_ones_are_an_error() -> None:
    output = SequenceOutput(TOKENIZER, [], SamplingParams(logprobs=0))
    first, again = (next(reports(ids("a", "b", "c"), cuts, None)) for cuts in ([2], []))
    output.add(first)
    assert output.add(again).token_ids == ids("c")
    assert output.add(again).token_ids == []
    assert output.completion().text == "abc"
    assert len(output.completion().logprobs or ()) == 3
    with pytest.raises(PeftDistError, match=r"r-9.*token 7.*only 3"):
        output.add(SequenceProgress(request_id="r-9", token_ids=[1], first_index=7))


def test_without_a_tokenizer_there_are_ids_and_no_text() -> None:
    params = SamplingParams(stop=("a",), logprobs=1)
    output, _, _ = run(params, reports([5, 900, 7], [1]), tokenizer=None)
    completion = output.completion()
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [5, 900, 7], "length")
    assert completion.logprobs == positions([5, 900, 7])


def test_logprobs_tell_the_tokens_texts_and_their_sum() -> None:
    tokens = ids("ab", "Ġ", "bÃ")
    output, _, _ = run(SamplingParams(logprobs=1), reports(tokens, []))
    completion = output.completion()
    texts = [[entry.decoded_token for entry in position.values()] for position in completion.logprobs or ()]
    assert texts == [["ab", "a"], [" ", "a"], ["b\ufffd", "a"]]
    assert completion.cumulative_logprob == pytest.approx(-0.5 - 1.5 - 2.5)


def test_logprobs_nobody_asked_for_are_dropped() -> None:
    output, deltas, _ = run(SamplingParams(), reports(ids("a", "b"), []))
    assert output.completion().logprobs is output.completion().cumulative_logprob is deltas[0].logprobs is None


def test_the_prompt_decides_over_the_first_space() -> None:
    backend = Tokenizer(models.Unigram([("▁the", 0.0), ("▁cat", -1.0)]))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for prompt, text in (([0], " cat cat"), ([], "cat cat")):
        output = SequenceOutput(tokenizer, prompt, SamplingParams())
        output.add(SequenceProgress(request_id="r", token_ids=[1, 1], first_index=0))
        assert output.completion().text == text


def test_a_request_of_several_sequences() -> None:
    params = SamplingParams(n=2, prompt_logprobs=0, stop=("X",))
    outputs = RequestOutputs("r", TOKENIZER, "abc", ids("ab", "c", "a"), params, "sql")
    scores: list[PositionLogprobs] = [{2: Logprob(-1.0, 1)}, {0: Logprob(-math.inf, 9)}]

    def report(token_ids: list[int], **more: Any) -> SequenceProgress:
        return SequenceProgress(request_id="r", token_ids=token_ids, first_index=0, **more)

    assert outputs.add(1, report(ids("a", "X"), prompt_logprobs=scores)).must_abort
    assert not outputs.finished
    assert not outputs.output().finished
    assert not outputs.add(0, report(ids("b"), finish_reason="length", num_cached_tokens=16)).must_abort
    assert outputs.finished
    result = outputs.output()
    assert (result.request_id, result.prompt, result.adapter_name) == ("r", "abc", "sql")
    assert [(o.index, o.text, o.finish_reason) for o in result.outputs] == [(0, "b", "length"), (1, "a", "stop")]
    assert (result.finished, result.num_cached_tokens) == (True, 16)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    assert result.prompt_logprobs[1:] == [
        {2: Logprob(-1.0, 1, "c")},
        {0: Logprob(-math.inf, 9, "a")},
    ]


def test_prompt_logprobs_nobody_asked_for_are_none() -> None:
    assert RequestOutputs("r", TOKENIZER, None, [1], SamplingParams()).output().prompt_logprobs is None
    alone = RequestOutputs("r", None, None, [1], SamplingParams(prompt_logprobs=2))
    assert alone.output().prompt_logprobs == [None]
