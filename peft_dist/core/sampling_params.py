"""What a user asks of the sampler, validated once where it enters."""

from __future__ import annotations

import math
import sys
from typing import Any

import msgspec

from peft_dist.core.errors import InvalidRequestError
from peft_dist.core.structured_output import StructuredOutput

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 16


def _fail(param: str, value: object, must: str) -> None:
    raise InvalidRequestError(f"{param}={value!r} is out of range: {param} must be {must}", param=param)


def _tuple(param: str, value: Any, must: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple, set, frozenset)):
        _fail(param, value, must)
    return tuple(value)


def _is_text(value: object) -> bool:
    """A string that is not empty and that UTF-8 can write: half of a surrogate pair is no character."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    # A comparison, because math.isfinite overflows on integers that no float holds.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of one request; every field can differ between requests of one batch.

    Raises:
        InvalidRequestError: a value has the wrong type or lies outside its range (``.param`` names it).

    Attributes:
        n: Independent sequences drawn for the prompt.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k most likely tokens; 0 or -1 keeps all.
        top_p: Keep the smallest set of most likely tokens whose probability reaches it.
        min_p: Drop tokens less likely than ``min_p`` times the most likely one.
        presence_penalty, frequency_penalty: Subtracted from the logits of tokens already in the output
            (once, and per occurrence), in [-2, 2].
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt or output.
        logit_bias: Token id to a value in [-100, 100] added to its logit.
        seed: Makes the draws a function of the request alone; drawn at admission when None.
        max_tokens: Most tokens to generate; None is all that the model's length leaves.
        min_tokens: No end-of-sequence, stop id or stop string ends the sequence before this many tokens.
        stop: Strings that end the text (they are cut off unless ``include_stop_str_in_output``).
        stop_token_ids: Ids that end the sequence.
        ignore_eos: Go on after an end-of-sequence token.
        logprobs: Report the log-probability of each drawn token and of this many most likely ones.
        prompt_logprobs: The same for the tokens of the prompt.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the stop string at the end of the text.
        structured: What the answer must match; an end of sequence may then be drawn exactly where the answer is whole.
            Stops, ``max_tokens`` and bans by ``logit_bias`` hold too, and may end it earlier or leave nothing to draw.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        stop: Any = self.stop
        if isinstance(stop, str):
            stop = (stop,)
        elif stop is None:
            stop = ()
        msgspec.structs.force_setattr(self, "stop", _tuple("stop", stop, "a string or a list of strings"))
        ids: Any = () if self.stop_token_ids is None else self.stop_token_ids
        msgspec.structs.force_setattr(self, "stop_token_ids", _tuple("stop_token_ids", ids, "a list of token ids"))
        if self.logit_bias is not None and not isinstance(self.logit_bias, dict):
            _fail("logit_bias", self.logit_bias, "a map from token ids to numbers")
        self._check_integers()
        self._check_numbers()
        self._check_stops()
        self._check_flags()

    def _check_integers(self) -> None:
        ranges: list[tuple[str, int | None, int | None, bool]] = [
            ("n", 1, MAX_N, False),
            ("top_k", -1, None, False),
            ("max_tokens", 0, None, True),
            ("min_tokens", 0, None, False),
            ("logprobs", 0, MAX_LOGPROBS, True),
            ("prompt_logprobs", 0, MAX_LOGPROBS, True),
            ("seed", -(2**63), 2**64 - 1, True),
        ]
        for name, low, high, optional in ranges:
            value = getattr(self, name)
            if value is None and optional:
                continue
            bounds = f"an integer{'' if low is None else f' from {low}'}{'' if high is None else f' to {high}'}"
            if not _is_int(value) or (low is not None and value < low) or (high is not None and value > high):
                _fail(name, value, bounds)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _fail("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")

    def _check_numbers(self) -> None:
        for name, low, high, low_open in (
            ("temperature", 0.0, math.inf, False),
            ("top_p", 0.0, 1.0, True),
            ("min_p", 0.0, 1.0, False),
            ("presence_penalty", -2.0, 2.0, False),
            ("frequency_penalty", -2.0, 2.0, False),
            ("repetition_penalty", 0.0, math.inf, True),
        ):
            value = getattr(self, name)
            if not _is_number(value) or value > high or value < low or (low_open and value == low):
                _fail(name, value, f"a number in {'(' if low_open else '['}{low:g}, {high:g}]")
        for token, bias in (self.logit_bias or {}).items():
            if not _is_int(token) or token < 0 or not _is_number(bias) or abs(bias) > 100:
                _fail("logit_bias", {token: bias}, "a map from token ids to numbers in [-100, 100]")

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS or not all(_is_text(s) for s in self.stop):
            _fail("stop", self.stop, f"at most {MAX_STOP_STRINGS} non-empty strings of valid Unicode")
        if not all(_is_int(t) and t >= 0 for t in self.stop_token_ids):
            _fail("stop_token_ids", self.stop_token_ids, "token ids")

    def _check_flags(self) -> None:
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                _fail(name, getattr(self, name), "True or False")
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            _fail("structured", self.structured, "StructuredOutput(json_schema=...), or of another form, or None")
