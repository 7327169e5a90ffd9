"""From the tokens that an engine reports to what a user reads: text, stop strings, log-probabilities.

``LLM`` and the server use the same code; it needs neither torch nor a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from peft_dist.api.detokenizer import Decoders, TextStream
from peft_dist.api.stop_strings import StopMatcher
from peft_dist.api.token_bytes import TokenBytes
from peft_dist.core.errors import PeftDistError
from peft_dist.core.messages import SequenceProgress
from peft_dist.core.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from peft_dist.core.sampling_params import SamplingParams


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What one report added to a sequence, cut where a stop string ended it.

    ``text`` lags behind ``token_ids`` while it may be part of a character or the beginning of a stop string.
    ``logprobs`` has an entry for each of ``token_ids``, or is None when none were asked for.
    """

    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class SequenceOutput:
    """The output of one sequence so far.

    Args:
        tokenizer: A Hugging Face tokenizer, or None: then there is no text and no stop string is found.
        prompt_token_ids: The prompt, on which the first piece of text may depend.
        params: What was asked for.
        index: The sequence's number among those of its request.
        decoders: The tokenizer's, where sequences share them.

    Attributes:
        must_abort: The last report's text ended the sequence, which its engine does not know: the caller aborts it.
        finish_reason: As in ``CompletionOutput``; later reports add nothing.
    """

    def __init__(
        self,
        tokenizer: Any | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        index: int = 0,
        decoders: Decoders | None = None,
    ) -> None:
        self.index = index
        self.must_abort = False
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self._params = params
        self._stream: TextStream | None = None
        self._texts: TokenBytes | None = None
        if tokenizer is not None:
            decoders = decoders or Decoders(tokenizer)
            self._stream = decoders.stream(prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
            self._texts = TokenBytes(tokenizer) if params.logprobs is not None else None
        self._matcher = StopMatcher(params.stop)
        # Text that comes in is text that goes out.
        self._is_plain = self._stream is not None and not params.stop and params.logprobs is None
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._text: list[str] = []
        self._held = ""

    def add(self, progress: SequenceProgress) -> Delta:
        """Take in a report and return what it adds.

        Raises:
            PeftDistError: tokens between this report and the last one are missing.
        """
        if self.finish_reason is not None:
            self.must_abort = False
            return Delta(finish_reason=self.finish_reason, stop_reason=self.stop_reason)
        known, pieces = len(self._token_ids), len(self._text)
        if self._is_plain and progress.first_index == known and progress.finish_reason is None:
            return self._add_plain(progress.token_ids)
        seen = known - progress.first_index
        if seen < 0:
            raise PeftDistError(
                f"{progress.request_id}: a report begins at token {progress.first_index}, but only {known} are "
                "known; reports of one sequence must be handed over in order and without gaps"
            )
        for place in range(seen, len(progress.token_ids)):
            self._take(progress, place)
            if self.finish_reason is not None:
                break
        self._end(progress)
        return Delta(
            "".join(self._text[pieces:]),
            self._token_ids[known:],
            self._logprobs[known:] if self._params.logprobs is not None else None,
            self.finish_reason,
            self.stop_reason,
        )

    def _add_plain(self, token_ids: Sequence[int]) -> Delta:
        """As ``add`` of tokens that follow what is known and end nothing: nearly every report."""
        assert self._stream is not None
        self._token_ids.extend(token_ids)
        text = "".join(map(self._stream.add, token_ids))
        if text:
            self._text.append(text)
        return Delta(text, token_ids)

    def completion(self) -> CompletionOutput:
        """Everything so far."""
        wants_logprobs = self._params.logprobs is not None
        chosen = zip(self._token_ids, self._logprobs, strict=True) if wants_logprobs else ()
        return CompletionOutput(
            index=self.index,
            text="".join(self._text),
            token_ids=list(self._token_ids),
            logprobs=list(self._logprobs) if wants_logprobs else None,
            cumulative_logprob=sum(p[token].logprob for token, p in chosen) if wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )

    def _take(self, progress: SequenceProgress, place: int) -> None:
        token = progress.token_ids[place]
        self._token_ids.append(token)
        if self._params.logprobs is not None and progress.logprobs is not None:
            self._logprobs.append(decoded(progress.logprobs[place], self._texts))
        ends = progress.finish_reason == "stop" and place == len(progress.token_ids) - 1
        # The token that ends a sequence belongs to its text no more than a stop string does.
        if self._stream is not None and (not ends or self._params.include_stop_str_in_output):
            self._add_text(self._stream.add(token))

    def _add_text(self, piece: str) -> None:
        """Give out what cannot be part of a stop string, up to one that is complete."""
        text = self._held + piece
        match = self._matcher.feed(piece, armed=len(self._token_ids) >= self._params.min_tokens)
        if match is None:
            out = len(text) - self._matcher.held
            self._held = text[out:]
        else:
            out = len(self._held) + match.end
            if not self._params.include_stop_str_in_output:
                out -= len(match.stop)
            self._held = ""
            self.finish_reason, self.stop_reason = "stop", match.stop
        if out:
            self._text.append(text[:out])

    def _end(self, progress: SequenceProgress) -> None:
        reason = progress.finish_reason
        self.error = progress.error
        if self.finish_reason is not None:
            self.must_abort = reason is None
            return
        if reason is None:
            return
        if self._stream is not None:
            self._add_text(self._stream.flush())
        if self.finish_reason is None:
            self._text.append(self._held)
            self.finish_reason, self.stop_reason = reason, progress.stop_reason


class RequestOutputs:
    """All sequences of one request, put together as ``RequestOutput``."""

    def __init__(
        self,
        request_id: str,
        tokenizer: Any | None,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        adapter_name: str | None = None,
    ) -> None:
        decoders = None if tokenizer is None else Decoders(tokenizer)
        self.sequences = [
            SequenceOutput(tokenizer, prompt_token_ids, params, index, decoders) for index in range(params.n)
        ]
        self._request_id = request_id
        self._prompt = prompt
        self._prompt_token_ids = list(prompt_token_ids)
        self._adapter_name = adapter_name
        self._wants_prompt_logprobs = params.prompt_logprobs is not None
        self._texts = TokenBytes(tokenizer) if tokenizer is not None and self._wants_prompt_logprobs else None
        self._prompt_logprobs: list[PositionLogprobs] = []
        self._num_cached_tokens = 0

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def add(self, sequence_index: int, progress: SequenceProgress) -> SequenceOutput:
        """Take in a report of one sequence and return that sequence (look at its ``must_abort``)."""
        if progress.prompt_logprobs is not None and not self._prompt_logprobs:
            self._prompt_logprobs = [decoded(position, self._texts) for position in progress.prompt_logprobs]
        if sequence_index == 0:
            self._num_cached_tokens = max(self._num_cached_tokens, progress.num_cached_tokens)
        sequence = self.sequences[sequence_index]
        sequence.add(progress)
        return sequence

    def output(self) -> RequestOutput:
        """Everything so far."""
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            adapter_name=self._adapter_name,
            outputs=[sequence.completion() for sequence in self.sequences],
            prompt_logprobs=[None, *self._prompt_logprobs] if self._wants_prompt_logprobs else None,
            num_cached_tokens=self._num_cached_tokens,
        )


def decoded(position: PositionLogprobs, texts: TokenBytes | None) -> PositionLogprobs:
    """``position`` with the text of every token; unchanged without a tokenizer."""
    if texts is None:
        return position
    return {
        token: msgspec.structs.replace(logprob, decoded_token=texts.replaced(token))
        for token, logprob in position.items()
    }
