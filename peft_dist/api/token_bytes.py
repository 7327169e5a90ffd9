"""The bytes behind single tokens: a token may hold part of a character, so its text alone does not tell."""

from __future__ import annotations

import json
from typing import Any


def _byte_level_alphabet() -> dict[str, int]:
    """The printable characters that byte-level tokenizers write for bytes.

    Printable bytes stand for themselves, the others follow from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """Bytes and texts of tokens, each worked out once. ``tokenizer`` is a Hugging Face tokenizer, or None."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[int, bytes | None] = {}
        added = {} if tokenizer is None else tokenizer.added_tokens_decoder
        # More than those that have a role (``all_special_ids``): text leaves out each that is marked so.
        self._special = frozenset(token for token, told in added.items() if told.special)
        self._added = frozenset(added)
        self._kinds = _decoder_kinds(tokenizer)
        self._alphabet = _byte_level_alphabet() if "ByteLevel" in self._kinds else {}

    def is_special(self, token: int) -> bool:
        """Whether the tokenizer holds this for no text, such as an end-of-sequence token."""
        return token in self._special

    def raw(self, token: int) -> bytes | None:
        """The token's bytes, or None when nothing is known of it (no tokenizer, or an id beyond its last)."""
        if token not in self._cache:
            self._cache[token] = self._find(token)
        return self._cache[token]

    def pieces(self, tokens: list[int]) -> list[str]:
        """Tokens as the tokenizer's vocabulary writes them, such as ``\u0120a`` for " a"."""
        if self._tokenizer is None:
            return [f"token_id:{token}" for token in tokens]
        found: list[str] = self._tokenizer.convert_ids_to_tokens(tokens)
        return found

    def replaced(self, token: int) -> str:
        """The token as text, with U+FFFD for what is no whole character."""
        raw = self.raw(token)
        return f"token_id:{token}" if raw is None else raw.decode("utf-8", "replace")

    def escaped(self, token: int) -> str:
        r"""The token as text, or ``bytes:\xNN`` when it is no text: different tokens stay different."""
        raw = self.raw(token)
        if raw is None:
            return f"token_id:{token}"
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _find(self, token: int) -> bytes | None:
        if self._tokenizer is None:
            return None
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return None
        if token in self._added:
            return piece.encode("utf-8")
        if self._alphabet:
            return b"".join(_alphabet_bytes(self._alphabet, character) for character in piece)
        if "ByteFallback" in self._kinds and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        if self._kinds & {"Metaspace", "ByteFallback", "Replace"}:
            return piece.replace("\u2581", " ").encode("utf-8")
        return str(self._tokenizer.decode([token])).encode("utf-8")


def _alphabet_bytes(alphabet: dict[str, int], character: str) -> bytes:
    byte = alphabet.get(character)
    return character.encode("utf-8") if byte is None else bytes([byte])


def _decoder_kinds(tokenizer: Any | None) -> frozenset[str]:
    """Names of the steps by which a fast tokenizer turns pieces into text."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return frozenset()
    state = json.loads(decoder.__getstate__())
    return frozenset({state["type"], *(step["type"] for step in state.get("decoders", []))})
