"""What comes back for a request."""

from __future__ import annotations

import msgspec


class Logprob(msgspec.Struct, frozen=True):
    """Log-probability (natural logarithm) of one token; ``rank`` 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str | None = None


# For one position: the chosen token first, then the most likely ones, best first.
PositionLogprobs = dict[int, Logprob]


class CompletionOutput(msgspec.Struct):
    """One drawn sequence of a request.

    ``finish_reason`` is "stop" (end of sequence, stop id or stop string), "length", "abort", "error" (then
    ``error`` says why), or None while it runs; ``stop_reason`` is the stop string or stop id that ended it,
    None for the model's own end.
    """

    index: int
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None


class RequestOutput(msgspec.Struct):
    """All sequences of a request, in order of ``index``.

    ``prompt_logprobs`` has one entry per prompt token; the first is None because nothing precedes it.
    ``num_cached_tokens`` counts prompt tokens whose KV was found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    adapter_name: str | None
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(output.finish_reason is not None for output in self.outputs)
