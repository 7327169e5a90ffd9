"""Text that comes token by token is the text of one decode, for every kind of tokenizer."""

from __future__ import annotations

import string
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, ByT5Tokenizer

from peft_dist.api import detokenizer
from peft_dist.api.detokenizer import Decoders, TextStream, decoder
from scripts.demo_model import MODEL_FOLDER, cache_root, is_complete

SPECIALS = ["<s>", "</s>", "<|user|>"]
WORDS = ["▁the", "▁cat", "▁", "▁▁", "s", "at", "▁na", "ï", "ve", "é", "▁😀", "ab", "\n", "."]


@lru_cache
def byte_level() -> Tokenizer:
    """Every byte has a token, and some tokens end or begin inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens(["Ġthe", "two words", "Ġcaf", "Ã", "cafÃ", "ðŁĺ", "âĤ", "é", "naÃ¯ve", "\ufffd"])
    return tokenizer


@lru_cache
def metaspace() -> Tokenizer:
    """As SentencePiece's Unigram models come: a leading space belongs to the word, and is dropped at the start."""
    pieces = ["<unk>", *WORDS, *string.ascii_lowercase]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


@lru_cache
def byte_fallback() -> Tokenizer:
    """As Llama 2's: characters without a token are written as one token for each byte."""
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, *string.ascii_lowercase]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIALS])
    return tokenizer


@lru_cache
def demo() -> Any:
    folder = cache_root() / MODEL_FOLDER
    if not is_complete(folder):
        pytest.skip("the demo model is not in the cache (make demo puts it there)")
    return AutoTokenizer.from_pretrained(folder)


def size(tokenizer: Any) -> int:
    return tokenizer.get_vocab_size() if isinstance(tokenizer, Tokenizer) else len(tokenizer)


def streamed(tokenizer: Any, prompt: list[int], output: list[int], skip: bool) -> list[str]:
    stream = TextStream(decoder(tokenizer, skip_special_tokens=skip), prompt)
    return [*(stream.add(token) for token in output), stream.flush()]


def in_context(tokenizer: Any, prompt: list[int], output: list[int], skip: bool) -> str:
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + output, skip_special_tokens=skip)
    assume(whole.startswith(before))
    return whole[len(before) :]


def byte_ids(tokenizer: Any, data: bytes) -> list[int]:
    """One token for each byte."""
    if tokenizer is byte_fallback():
        return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]
    return [tokenizer.token_to_id(piece) for byte in data for piece in _letter(byte)]


def _letter(byte: int) -> str:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


@pytest.mark.parametrize("make", [byte_level, metaspace, demo], ids=lambda make: make.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_add_up_to_one_decode(make, data: st.DataObject, skip: bool) -> None:
    tokenizer = make()
    token = st.integers(0, size(tokenizer) - 1)
    prompt, output = data.draw(st.lists(token, max_size=40)), data.draw(st.lists(token, max_size=40))
    assert "".join(streamed(tokenizer, prompt, output, skip)) == in_context(tokenizer, prompt, output, skip)


@pytest.mark.parametrize("make", [byte_level, metaspace, byte_fallback, demo], ids=lambda make: make.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_shared_texts_of_tokens_change_no_piece(make, data: st.DataObject, skip: bool) -> None:
    """Twice, as the second time every token's text is known."""
    tokenizer = make()
    token = st.integers(0, size(tokenizer) - 1)
    prompt, output = data.draw(st.lists(token, max_size=12)), data.draw(st.lists(token, max_size=60))
    shared, wanted = Decoders(tokenizer), streamed(tokenizer, prompt, output, skip)
    for _ in range(2):
        stream = shared.stream(prompt, skip_special_tokens=skip)
        assert [*(stream.add(token) for token in output), stream.flush()] == wanted


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=6), st.lists(st.integers(0, 255), max_size=100), st.integers(7, 70))
def test_shared_texts_change_nothing_behind_broken_characters(prompt, output, bound: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detokenizer, "_MAX_PENDING", bound)
        stream = Decoders(byte_level()).stream(prompt, skip_special_tokens=True)
        found = [*(stream.add(token) for token in output), stream.flush()]
        assert found == streamed(byte_level(), prompt, output, True)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=12), st.lists(st.integers(0, 255), max_size=300), st.integers(7, 70))
def test_bytes_that_are_no_text_come_out_as_one_decode_gives_them(prompt, output, bound: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detokenizer, "_MAX_PENDING", bound)
        assert "".join(streamed(byte_level(), prompt, output, True)) == in_context(byte_level(), prompt, output, True)


text_strategy = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=lambda make: make.__name__)
@settings(max_examples=50, deadline=None)
@given(before=text_strategy, text=text_strategy)
def test_no_piece_holds_half_a_character(make, before: str, text: str) -> None:
    tokenizer = make()
    assume("\ufffd" not in text)
    # A word first: a leading space is dropped only at the very start of a text.
    prompt = byte_ids(tokenizer, ("x" + before).encode())
    pieces = streamed(tokenizer, prompt, byte_ids(tokenizer, text.encode()), True)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


@pytest.mark.parametrize("make", [byte_level, metaspace, byte_fallback], ids=lambda make: make.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_come_when_the_tokenizers_own_stream_gives_them(make, data: st.DataObject) -> None:
    tokenizer = make()
    if make is metaspace:
        ids = data.draw(st.lists(st.integers(1, len(WORDS)), max_size=20))
    else:
        ids = byte_ids(tokenizer, data.draw(text_strategy).encode())
    reference = DecodeStream(skip_special_tokens=True)
    assert streamed(tokenizer, [], ids, True)[:-1] == [reference.step(tokenizer, token) or "" for token in ids]


def test_the_first_piece_keeps_its_space_behind_a_prompt() -> None:
    tokenizer = metaspace()
    the, cat = tokenizer.token_to_id("▁the"), tokenizer.token_to_id("▁cat")
    assert streamed(tokenizer, [the], [cat], True) == [" cat", ""]
    assert streamed(tokenizer, [], [cat], True) == ["cat", ""]
    # Special tokens that are skipped give no context; what stands before them does.
    marks = [tokenizer.token_to_id("<|user|>")] * 30
    assert streamed(tokenizer, [the, *marks], [cat], True) == [" cat", ""]


def test_a_long_context_of_byte_tokens_is_not_cut_inside_a_character() -> None:
    tokenizer = byte_fallback()
    prompt = byte_ids(tokenizer, "😀😀😀😀a😀😀€😀".encode())
    assert "".join(streamed(tokenizer, prompt, byte_ids(tokenizer, "😀!".encode()), True)) == "😀!"


@pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=lambda make: make.__name__)
def test_a_character_that_the_prompt_began_belongs_to_the_output(make) -> None:
    tokenizer = make()
    ids = byte_ids(tokenizer, "ab😀c".encode())
    for cut in (3, 4, 5):
        assert "".join(streamed(tokenizer, ids[:cut], ids[cut:], True)) == "😀c"


def test_a_prompt_token_that_ends_inside_a_character_is_not_repeated() -> None:
    tokenizer = byte_level()
    tokenizer_ids = [tokenizer.token_to_id("cafÃ"), *byte_ids(tokenizer, b"\xa9s")]
    assert "".join(streamed(tokenizer, tokenizer_ids[:1], tokenizer_ids[1:], True)) == "és"


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    ids = byte_ids(byte_level(), "a€".encode())[:-1]
    assert streamed(byte_level(), [], ids, True) == ["a", "", "", "\ufffd"]


def test_byte_tokens_that_spoil_what_is_out_lose_nothing_that_follows() -> None:
    tokenizer = byte_fallback()
    # Alone the first byte is "A"; with the second the run is no UTF-8, and the decoder gives U+FFFD for both.
    ids = [*byte_ids(tokenizer, b"A\xe2"), tokenizer.token_to_id("▁cat"), tokenizer.token_to_id("s")]
    assert "".join(streamed(tokenizer, [], ids, True)) == "A\ufffd cats"


@pytest.mark.parametrize(("token", "text"), [(b"\x80", "\ufffd"), ("</s>", "")], ids=["bytes", "special tokens"])
def test_endless_tokens_that_are_no_text_cost_bounded_work(token: bytes | str, text: str) -> None:
    tokenizer, longest = byte_level(), 0
    decode = decoder(tokenizer, skip_special_tokens=True)

    def counting(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    stream = TextStream(counting, byte_ids(tokenizer, b"hi"))
    one = byte_ids(tokenizer, token)[0] if isinstance(token, bytes) else tokenizer.token_to_id(token)
    ids = [*byte_ids(tokenizer, b"a"), *[one] * 2000, *byte_ids(tokenizer, "é.".encode())]
    assert "".join(map(stream.add, ids)) + stream.flush() == f"a{text * 2000}é."
    assert longest <= 2 * detokenizer._MAX_PENDING


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_a_character_behind_bytes_that_are_no_text_stays_whole(character: str) -> None:
    for lone in range(detokenizer._MAX_PENDING - 5, detokenizer._MAX_PENDING + 5):
        ids = byte_ids(byte_level(), b"\x80" * lone + character.encode())
        assert "".join(streamed(byte_level(), [], ids, True)) == "\ufffd" * lone + character


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    for tokenizer in (byte_level(), ByT5Tokenizer()):
        (a,) = byte_ids(byte_level(), b"a") if tokenizer is byte_level() else tokenizer("a")["input_ids"][:1]
        assert streamed(tokenizer, [], [a, 10**6, a], True) == ["a", "", "a", ""]


@settings(max_examples=60, deadline=None)
@given(text_strategy, text_strategy, st.booleans())
def test_a_tokenizer_without_a_fast_back_end(before: str, text: str, skip: bool) -> None:
    tokenizer = ByT5Tokenizer()
    assume("\ufffd" not in before + text)
    prompt, output = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, text))
    output = [*output, tokenizer.eos_token_id]
    pieces = streamed(tokenizer, prompt, output, skip)
    assert "".join(pieces) == text + ("" if skip else tokenizer.eos_token)


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_left_out_only_when_asked(skip: bool) -> None:
    tokenizer = demo()
    ids = tokenizer("<|im_start|>user\nhi 😀<|im_end|>")["input_ids"]
    expected = "user\nhi 😀" if skip else "<|im_start|>user\nhi 😀<|im_end|>"
    assert "".join(streamed(tokenizer, [], ids, skip)) == expected
