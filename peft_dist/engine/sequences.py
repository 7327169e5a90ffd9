"""A request's part of a batch."""

from __future__ import annotations

from peft_dist.core.batch import ScheduledSequence, SequenceStart
from peft_dist.core.block_manager import BlockManager
from peft_dist.core.request import Request, RequestStatus


def start_of(request: Request) -> SequenceStart:
    """What the executor must know of it before its first step there."""
    return SequenceStart(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=list(request.output_token_ids),
        params=request.params,
        seed=request.seed,
        sequence_index=request.sequence_index,
    )


def decode_of(request: Request, slot: int, blocks: BlockManager) -> ScheduledSequence | None:
    """The next token of a running request whose last one is known: the short way, for almost all.

    None, and nothing has changed, where it is no such request, or there is no block for it.
    """
    start, drawn = request.num_computed_tokens, request.output_token_ids
    num_prompt = len(request.prompt_token_ids)
    if request.num_in_flight or start < num_prompt or start + 1 != num_prompt + len(drawn):
        return None
    if request.status is not RequestStatus.RUNNING or not blocks.grow(request.request_id, start + 1):
        return None
    table, samples = blocks.table(request.request_id).copy(), len(drawn) < request.max_output_tokens
    request.num_computed_tokens = start + 1
    request.num_in_flight = int(samples)
    return ScheduledSequence(request.request_id, [drawn[-1]], start, table, slot, samples, len(drawn))
