"""A request's part of a batch."""

from __future__ import annotations

from peft_dist.core.batch import PLACEHOLDER, ScheduledSequence, SequenceStart
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
    if request.status is not RequestStatus.RUNNING:
        return None
    request_id = request.request_id
    table = blocks.tables[request_id]
    if start >= len(table) * blocks.block_size:
        if not blocks.grow(request_id, start + 1):
            return None
        table = blocks.tables[request_id]
    most = request.params.max_tokens
    samples = most is None or len(drawn) < most
    request.num_computed_tokens = start + 1
    request.num_in_flight = int(samples)
    return ScheduledSequence(request_id, [drawn[-1]], start, table, slot, samples, len(drawn))


def part_of(request: Request, num_new: int, slot: int, blocks: BlockManager) -> ScheduledSequence:
    """The next tokens of a running request, for which there are blocks."""
    start = request.num_computed_tokens
    stop = start + num_new
    num_draws = request.num_output_tokens
    tokens = request.tokens(start, min(stop, request.num_known_tokens))
    samples = stop == len(request.prompt_token_ids) + num_draws and num_draws < request.max_output_tokens
    request.num_computed_tokens = stop
    request.num_in_flight += samples
    return ScheduledSequence(
        request_id=request.request_id,
        token_ids=tokens if len(tokens) == num_new else tokens + [PLACEHOLDER] * (num_new - len(tokens)),
        start=start,
        block_table=blocks.table(request.request_id),
        adapter_slot=slot,
        samples=samples,
        draw=num_draws,
        wants_prompt_logprobs=request.wants_prompt_logprobs and start < len(request.prompt_token_ids) - 1,
    )
