"""The work of one step, and what came of it."""

from __future__ import annotations

import msgspec

from peft_dist.core.outputs import PositionLogprobs
from peft_dist.core.sampling_params import SamplingParams

# Stands in ``token_ids`` for a token that a step still in flight draws.
PLACEHOLDER = -1
NO_ADAPTER = -1


class SequenceStart(msgspec.Struct, frozen=True):
    """Everything the sampler must know of a sequence, sent with its first step."""

    request_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    params: SamplingParams
    seed: int
    sequence_index: int


class ScheduledSequence(msgspec.Struct, frozen=True):
    """A sequence's share of one step.

    ``token_ids`` are the inputs at positions ``start`` onwards; ``block_table`` covers all positions up to
    the last input. When ``samples`` is set, the last input's logits draw the sequence's next token, whose
    number (0 for the first) is ``draw``. ``wants_prompt_logprobs`` asks for the logits of every input that
    is a prompt token with a successor in the prompt.
    """

    request_id: str
    token_ids: list[int]
    start: int
    block_table: list[int]
    adapter_slot: int = NO_ADAPTER
    samples: bool = False
    draw: int = 0
    wants_prompt_logprobs: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class Batch(msgspec.Struct, frozen=True):
    """One step. Block copies come first: swap-outs (device, host), then swap-ins (host, device).

    With ``merged_adapter`` (a content hash) the weights hold that adapter: sequences in its slot ``merged_slot`` need
    no LoRA kernel, all others are corrected by their own delta less the merged one. None: the base's own weights.
    """

    step: int
    sequences: list[ScheduledSequence]
    starts: list[SequenceStart] = []
    swap_outs: list[tuple[int, int]] = []
    swap_ins: list[tuple[int, int]] = []
    merged_adapter: str | None = None
    merged_slot: int = NO_ADAPTER

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)


class SequenceResult(msgspec.Struct, frozen=True):
    """0 to k tokens drawn for one sequence; ``first_draw`` is the number of the first of them.

    ``prompt_logprobs`` belongs to the prompt positions ``start + 1`` onwards of this step's inputs.
    ``error`` is set instead of tokens when this sequence alone failed (its logits were not finite).
    """

    request_id: str
    token_ids: list[int]
    first_draw: int
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs] | None = None
    error: str | None = None


class StepResult(msgspec.Struct, frozen=True):
    """What the step of that number drew, for each sequence of its batch.

    ``seconds`` is what it took on the device, None where nobody measured it; ``switch_seconds`` likewise what the
    change of weights before it took, where ``Executor.switch`` could not tell. ``swap_seconds`` is what copying KV
    blocks between device and host before it took, ``swap_bytes`` in all; it is no part of ``seconds``.
    """

    step: int
    sequences: list[SequenceResult]
    seconds: float | None = None
    switch_seconds: float | None = None
    swap_bytes: int = 0
    swap_seconds: float | None = None
