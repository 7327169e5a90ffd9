"""The bytes of single tokens, whatever the tokenizer's kind, and the offsets of legacy log-probabilities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_dist.api.logprobs import LegacyLogprobs, chat_logprobs, joined
from peft_dist.api.token_bytes import TokenBytes
from peft_dist.core.outputs import Logprob
from tests.api.http_support import EOS, PADDED_VOCAB, TOKENIZER, encode, make_tokenizer

BYTE_LEVEL = TokenBytes(TOKENIZER)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece models with byte fallback are converted: words begin with U+2581, the rest are bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abc", "\u2581a"]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("\u2581", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    pieces = ["[UNK]", "play", "##ing", "café"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@given(texts)
def test_byte_level_tokens_are_the_texts_bytes(text: str) -> None:
    assert b"".join(BYTE_LEVEL.raw(token) or b"" for token in encode(text)) == text.encode()


@given(texts)
def test_byte_fallback_tokens_are_the_texts_bytes(text: str) -> None:
    tokenizer = byte_fallback_tokenizer()
    kinds = TokenBytes(tokenizer)
    ids = tokenizer(text.replace("\u2581", ""), add_special_tokens=False)["input_ids"]
    assert b"".join(kinds.raw(token) or b"" for token in ids) == text.replace("\u2581", "").encode()


def test_word_pieces() -> None:
    kinds = TokenBytes(word_piece_tokenizer())
    assert [kinds.replaced(token) for token in (1, 3)] == ["play", "café"]


def test_special_and_unknown_tokens() -> None:
    assert BYTE_LEVEL.is_special(EOS) and BYTE_LEVEL.raw(EOS) == b"<|eos|>"
    assert BYTE_LEVEL.raw(PADDED_VOCAB - 1) is None
    assert BYTE_LEVEL.replaced(PADDED_VOCAB - 1) == f"token_id:{PADDED_VOCAB - 1}"
    assert TokenBytes(None).escaped(7) == "token_id:7"


def test_parts_of_a_character_stay_apart() -> None:
    first, second = encode("ö")
    assert BYTE_LEVEL.replaced(first) == BYTE_LEVEL.replaced(second) == "\ufffd"
    assert (BYTE_LEVEL.escaped(first), BYTE_LEVEL.escaped(second)) == ("bytes:\\xc3", "bytes:\\xb6")


@given(texts, st.integers(0, 5))
def test_offsets_are_where_tokens_begin(text: str, cuts: int) -> None:
    ids = encode(text)
    positions = [{token: Logprob(logprob=-1.0, rank=1)} for token in ids]
    legacy = LegacyLogprobs(BYTE_LEVEL, skip_special_tokens=True)
    size = max(1, len(ids) // (cuts + 1))
    pieces = [legacy.output(ids[i : i + size], positions[i : i + size]) for i in range(0, len(ids), size)]
    offsets = joined(pieces)["text_offset"]
    known = b""
    for token, offset in zip(ids, offsets, strict=True):
        assert offset == len(known.decode("utf-8", "ignore"))
        known += BYTE_LEVEL.raw(token) or b""


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_take_room_only_where_they_are_shown(skip: bool) -> None:
    ids = [*encode("a"), EOS, *encode("b")]
    positions = [{token: Logprob(logprob=-1.0, rank=1)} for token in ids]
    piece = LegacyLogprobs(BYTE_LEVEL, skip_special_tokens=skip).output(ids, positions)
    assert piece["text_offset"] == [0, 1, 1 if skip else 1 + len("<|eos|>")]


def test_infinity_becomes_a_number() -> None:
    position = {5: Logprob(logprob=float("-inf"), rank=9)}
    entry = chat_logprobs(BYTE_LEVEL, [5], [position], 1)["content"][0]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0


@pytest.mark.parametrize("skip", [True, False])
def test_offsets_know_special_tokens_that_have_no_role(skip: bool) -> None:
    """Such as Llama 3's reserved ones: text leaves out all that are marked as special."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|spare|>", special=True), AddedToken("<call>", special=False)])
    spare, plain = (tokenizer.convert_tokens_to_ids(name) for name in ("<|spare|>", "<call>"))
    assert spare not in tokenizer.all_special_ids
    tokens = [encode("a")[0], spare, plain, encode("b")[0]]
    legacy = LegacyLogprobs(TokenBytes(tokenizer), skip_special_tokens=skip)
    offsets = legacy.output(tokens, [{token: Logprob(-1.0, 1)} for token in tokens])["text_offset"]
    assert offsets == [0, 1, 1 if skip else 1 + len("<|spare|>"), (7 if skip else 7 + len("<|spare|>"))]
    assert tokenizer.decode(tokens, skip_special_tokens=skip) == ("a<call>b" if skip else "a<|spare|><call>b")
