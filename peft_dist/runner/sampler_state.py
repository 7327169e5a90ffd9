"""What the sampler must remember of one sequence, rebuilt from its tokens wherever it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from peft_dist.core.batch import SequenceStart
from peft_dist.core.grammars import GrammarState
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.runner.draws import uniforms

# Below this a division by the temperature would only overflow: the most likely token is taken.
GREEDY_TEMPERATURE = 1e-5
# Above this every finite logit difference is nothing in float32, but -inf / temperature must stay -inf.
_MAX_TEMPERATURE = 1e30
_DRAWS_AT_ONCE = 64


class TokenTable:
    """The distinct tokens of a sequence, each with how often it was drawn (0 for a token of the prompt alone)."""

    def __init__(self, prompt_token_ids: Iterable[int], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._place: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        for token in prompt_token_ids:
            self._place_of(token)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The different token ids seen, in the order of their first place."""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of ``ids`` was seen."""
        return self._counts[: len(self._place)]

    def count(self, token_ids: Iterable[int]) -> None:
        """Note that ``token_ids`` were drawn."""
        for token in token_ids:
            place = self._place_of(token)
            if place >= 0:
                self._counts[place] += 1

    def _place_of(self, token: int) -> int:
        place = self._place.get(token)
        if place is not None:
            return place
        if not 0 <= token < self._vocab_size:
            return -1
        place = self._place[token] = len(self._place)
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        return place


class SamplerState:
    """One sequence as the sampler sees it.

    Args:
        start: The sequence; with ``output_token_ids`` when it goes on after a preemption or on another replica.
        vocab_size: Columns of the logits. Ids beyond them, in ``logit_bias`` or a stop list, have no effect
            (admission refuses what a user should hear of).
        eos_token_ids: The model's end-of-sequence ids, held back until ``min_tokens`` are drawn.
        grammar: What its answer must match, at ``start.output_token_ids``; None: nothing.
    """

    def __init__(
        self,
        start: SequenceStart,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        grammar: GrammarState | None = None,
    ) -> None:
        params = start.params
        self.params: SamplingParams = params
        self.greedy = params.temperature < GREEDY_TEMPERATURE
        self.temperature = min(params.temperature, _MAX_TEMPERATURE)
        self._seed = start.seed
        self._sequence_index = start.sequence_index
        self._first_draw = 0
        self._draws: list[float] = []
        bias = {token: value for token, value in (params.logit_bias or {}).items() if token < vocab_size}
        self.bias_ids = np.array(list(bias), dtype=np.int64)
        self.bias_values = np.array(list(bias.values()), dtype=np.float32)
        ends = {token for token in (*eos_token_ids, *params.stop_token_ids) if 0 <= token < vocab_size}
        self.end_ids = np.array(sorted(ends), dtype=np.int64)
        self.tokens = _penalised_tokens(start, vocab_size)
        self.grammar = grammar
        self._always_edited = bool(len(bias)) or self.tokens is not None

    @property
    def needs_tokens(self) -> bool:
        """Whether a draw depends on the values of the draws before it."""
        return self.tokens is not None or self.grammar is not None

    def append(self, token_ids: Sequence[int]) -> None:
        """Note newly drawn tokens; call it before the draw that follows them."""
        if self.tokens is not None:
            self.tokens.count(token_ids)
        if self.grammar is not None:
            self.grammar.append(token_ids)

    def ends_are_masked(self, draw: int) -> bool:
        """Whether draw ``draw`` must not end the sequence."""
        return draw < self.params.min_tokens and len(self.end_ids) > 0

    def is_edited(self, draw: int) -> bool:
        """Whether the logits of draw ``draw`` are changed before temperature and filters."""
        is_bound = self.grammar is not None and not self.grammar.ended
        return self._always_edited or is_bound or self.ends_are_masked(draw)

    def uniform(self, draw: int) -> float:
        """The number in [0, 1) that decides draw ``draw``, whatever was asked before."""
        offset = draw - self._first_draw
        if not 0 <= offset < len(self._draws):
            # One call makes a block of draws for the price of one.
            self._first_draw, offset = draw, 0
            self._draws = uniforms(self._seed, self._sequence_index, draw, _DRAWS_AT_ONCE).tolist()
        return self._draws[offset]


def _penalised_tokens(start: SequenceStart, vocab_size: int) -> TokenTable | None:
    params = start.params
    repetition = params.repetition_penalty != 1.0
    if not (repetition or params.presence_penalty or params.frequency_penalty):
        return None
    table = TokenTable(start.prompt_token_ids if repetition else (), vocab_size)
    table.count(start.output_token_ids)
    return table
