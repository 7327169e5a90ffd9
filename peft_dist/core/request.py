"""A request while one engine owns it."""

from __future__ import annotations

import enum

import msgspec

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.outputs import PositionLogprobs
from peft_dist.core.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    """Where a request is: queued (preempted ones too), in batches, with its KV on the host, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


class Request(msgspec.Struct, eq=False):
    """One sequence: a prompt for one adapter, and all tokens drawn so far.

    It is wholly described by ``prompt_token_ids``, ``output_token_ids``, ``params``, ``seed`` and
    ``sequence_index``: from these any replica continues it with the same tokens.

    ``num_computed_tokens`` tokens have their KV in the cache once every submitted step has run.
    ``first_scheduled`` and ``last_scheduled`` are when it first and last ran, in seconds of the engine's clock; None
    before the first time.
    ``plain_end`` is for ``engine/stopping.py``: Tokens that it draws in all, where nothing but its length ends it; -1
    where something may, 0 until somebody has looked.
    ``num_in_flight`` draws were scheduled and are not known yet (placeholders behind ``output_token_ids``).
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    arrival_time: float
    adapter: AdapterSpec | None = None
    sequence_index: int = 0
    output_token_ids: list[int] = []
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    plain_end: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled: float | None = None
    last_scheduled: float | None = None
    block_hashes: list[bytes] = []
    num_published_blocks: int = 0
    prompt_logprobs: list[PositionLogprobs] = []
    finish_reason: str | None = None
    stop_reason: int | None = None

    @property
    def queue_seconds(self) -> float | None:
        """From its arrival at the server, less its way here, to the first step it was in here; None before that."""
        if self.first_scheduled is None:
            return None
        waited = self.first_scheduled - self.arrival_time
        return waited if waited > 0.0 else 0.0

    @property
    def num_known_tokens(self) -> int:
        """Prompt and drawn tokens whose values are known."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens and placeholders."""
        # Written out: it is asked for several times a step and request.
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Drawn tokens, placeholders included."""
        return len(self.output_token_ids) + self.num_in_flight

    @property
    def max_output_tokens(self) -> int:
        """Most tokens to draw."""
        assert self.params.max_tokens is not None, "admission resolves max_tokens"
        return self.params.max_tokens

    @property
    def content_hash(self) -> str:
        """What tells this request's KV from that of another adapter with the same tokens."""
        return self.adapter.content_hash if self.adapter else ""

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions are still to be scored (the first has no predecessor and no score)."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_token_ids) - 1

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.status is RequestStatus.FINISHED

    def tokens(self, start: int, stop: int) -> list[int]:
        """Known tokens of positions ``start`` to ``stop``."""
        n = len(self.prompt_token_ids)
        if stop <= n:
            return self.prompt_token_ids[start:stop]
        if start >= n:
            return self.output_token_ids[start - n : stop - n]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - n]
