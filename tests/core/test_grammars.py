"""What is read of a form, and what comes of trouble with it, without a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_dist.core import grammars
from peft_dist.core.grammars import GrammarError, GrammarLibraryError, Grammars, bytes_table, check, table_of
from peft_dist.core.structured_output import StructuredOutput
from tests.api.http_support import EOS, PADDED_VOCAB, TOKENIZER, encode, make_tokenizer

PACKAGE = Path(grammars.__file__).parents[1]
WORD = StructuredOutput(choice=["hello", "hell"])


def allowed(made: Grammars, *matchers: Any) -> list[set[int]]:
    words = np.full((len(matchers), (PADDED_VOCAB + 31) // 32), -1, dtype=np.int32)
    made.fill(matchers, words.ctypes.data)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return [set(map(int, np.flatnonzero(row))) for row in bits]


def make(tokenizer: Any = TOKENIZER, ends: tuple[int, ...] = (EOS,)) -> Grammars:
    return Grammars(lambda: tokenizer, PADDED_VOCAB, ends)


def test_a_state_is_a_function_of_the_tokens() -> None:
    made = make(ends=(EOS, 3, PADDED_VOCAB + 5))
    tokens = encode("hell")
    grown, again = made.state(WORD, []), made.state(WORD, tokens)
    assert allowed(made, grown.matcher()) == [{tokens[0]} | {encode("he")[0], encode("h")[0], encode("hello")[0]}]
    grown.append(tokens)
    # Every end of sequence may come, and what goes on.
    ends = {EOS, 3}
    assert allowed(made, grown.matcher(), again.matcher()) == [{*ends, *encode("o")}] * 2
    again.append([EOS])
    assert again.ended and not grown.ended
    assert made.state(WORD, [*tokens, 3, 50]).ended


def test_what_is_read_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = grammars.read, []
    monkeypatch.setattr(grammars, "read", lambda spec, table: seen.append(spec) or read(spec, table))
    monkeypatch.setattr(grammars, "_MOST_READ", 2)
    made = make()
    other, third = StructuredOutput(regex="b"), StructuredOutput(regex="c")
    for spec in (WORD, other, WORD, third, WORD, other):
        made.state(spec, []).matcher()
    assert seen == [WORD, other, third, other]


def test_a_token_that_does_not_fit_is_an_error_that_stays() -> None:
    made = make()
    state = made.state(WORD, encode("x"))
    for _ in range(2):
        with pytest.raises(GrammarError, match="cannot be followed further"):
            state.matcher()
    assert made.state(WORD, []).matcher() is not None


class Broken:
    """A tokenizer that is none."""


@pytest.mark.parametrize(
    ("tokenizer", "ends", "words"),
    [
        (None, (EOS,), "need a tokenizer"),
        (Broken(), (EOS,), "fast tokenizer"),
        (TOKENIZER, (), "end-of-sequence"),
        (TOKENIZER, (PADDED_VOCAB,), "end-of-sequence"),
    ],
)
def test_trouble_with_the_table_is_told_to_each_request(tokenizer: Any, ends: tuple[int, ...], words: str) -> None:
    state = make(tokenizer, ends).state(WORD, [])
    with pytest.raises(GrammarError, match=words):
        state.matcher()


def test_a_tokenizer_that_cannot_be_loaded() -> None:
    def load() -> Any:
        raise OSError("tokenizer.json is truncated")

    with pytest.raises(GrammarError, match="truncated"):
        Grammars(load, PADDED_VOCAB, (EOS,)).state(WORD, []).matcher()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert not grammars.is_available()
    with pytest.raises(GrammarLibraryError, match="pip install 'peft-dist\\[structured\\]'"):
        bytes_table()
    with pytest.raises(GrammarError, match="pip install"):
        make().state(WORD, []).matcher()


def test_padding_and_truncation_of_the_tokenizer_are_left_alone() -> None:
    TOKENIZER.backend_tokenizer.enable_truncation(7)
    try:
        assert table_of(TOKENIZER, PADDED_VOCAB, [EOS]).vocab_size == PADDED_VOCAB
        assert TOKENIZER.backend_tokenizer.truncation["max_length"] == 7
    finally:
        TOKENIZER.backend_tokenizer.no_truncation()


def test_tokens_that_the_model_lacks_are_left_out() -> None:
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert len(tokenizer) == size + 1
    assert table_of(tokenizer, size, [EOS]).vocab_size == size
    with pytest.raises(GrammarError, match="vocab size too small"):
        table_of(tokenizer, size - 1, [EOS])


@pytest.mark.parametrize("choice", ["", "a.b", "[x]", "a|b", "é😀", "\x00\n\\", "a b"])
def test_choices_are_taken_as_they_are(choice: str) -> None:
    table = bytes_table()
    matcher = grammars.read(StructuredOutput(choice=[choice, "other"]), table)
    assert matcher.consume_tokens(list(choice.encode())) and matcher.is_accepting()
    wrong = grammars.read(StructuredOutput(choice=[choice]), table)
    assert not (wrong.consume_tokens(list(b"axb")) and wrong.is_accepting())


def test_thousands_of_choices() -> None:
    choices = [f"{i:x}" for i in range(9000)]
    matcher = grammars.read(StructuredOutput(choice=choices), bytes_table())
    assert matcher.consume_tokens(list(b"12a")) and matcher.is_accepting()


def test_reading_that_takes_long_is_refused() -> None:
    check(WORD, bytes_table(), 60.0)
    with pytest.raises(GrammarError, match="make it simpler"):
        check(WORD, bytes_table(), 0.0)


def test_one_module_knows_the_library() -> None:
    naming = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if "import llguidance" in line or "from llguidance" in line or '"llguidance"' in line
    }
    assert naming == {"core/grammars.py"}


def test_branches_that_are_not_told_apart_may_be_followed() -> None:
    """As of pydantic's unions whose tag has a default: it is not required."""
    branch = {"type": "object", "additionalProperties": False}
    schema = {"oneOf": [{**branch, "properties": {"a": {"const": n}}} for n in (1, 2)]}
    made = make()
    for text in ('{"a": 1}', '{"a": 2}', "{}"):
        assert made.state(StructuredOutput(json_schema=schema), encode(text)).matcher().is_accepting()
    with pytest.raises(GrammarError, match="doesn't satisfy"):
        made.state(StructuredOutput(json_schema=schema), encode('{"a": 3}')).matcher()
    check(StructuredOutput(json_schema=True), bytes_table(), 10.0)
