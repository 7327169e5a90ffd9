"""A Batch becomes tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from peft_dist.core.batch import PLACEHOLDER, Batch, ScheduledSequence
from peft_dist.kernels.transfer import to_device
from peft_dist.kernels.types import AttentionMetadata, LoRAPlan
from peft_dist.runner.merge_state import plans_for


@dataclass(slots=True)
class PackedInputs:
    """One packed forward of ``T`` tokens, of which ``L`` rows reach the logits.

    Attributes:
        input_ids, position_ids: int64 ``[1, T]``; ids of draws still in flight are filled in by the runner.
        pending: (row, request id) of those.
        logits_rows: int64 ``[L]``, rows that draw first, in order of ``sampled``, then rows to score.
        sampled: Sequences that draw a token in this step.
        scored: (sequence, first of its rows among the logits, ids that follow its inputs in the prompt).
        lora, lora_correction: Plans of the rows (``merge_state.plans_for``); ``lora_logits`` and
            ``lora_logits_correction`` are those of the rows among the logits.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    pending: list[tuple[int, str]]
    logits_rows: torch.Tensor
    sampled: list[ScheduledSequence]
    scored: list[tuple[ScheduledSequence, int, list[int]]]
    attention: AttentionMetadata
    lora: LoRAPlan | None
    lora_correction: LoRAPlan | None
    lora_logits: LoRAPlan | None
    lora_logits_correction: LoRAPlan | None


def pack(
    batch: Batch,
    prompts: dict[str, list[int]],
    block_size: int,
    device: torch.device,
    lora_backend: str,
    attention_backend: str,
) -> PackedInputs:
    """Lay out a batch with at least one sequence.

    Args:
        prompts: Prompt ids of the sequences whose prompts are scored in this step.
        lora_backend, attention_backend: Which kernels run it (``kernels.backend``, ``kernels.attention_backends``).
    """
    sequences = batch.sequences
    lengths = np.array([sequence.num_tokens for sequence in sequences], dtype=np.int32)
    starts = np.array([sequence.start for sequence in sequences], dtype=np.int32)
    query_start = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    ids = np.fromiter((token for sequence in sequences for token in sequence.token_ids), np.int64, query_start[-1])
    rows = np.arange(query_start[-1], dtype=np.int64)
    positions = rows + np.repeat(starts - query_start[:-1], lengths)
    pending = [
        (int(row), sequences[int(np.searchsorted(query_start, row, side="right")) - 1].request_id)
        for row in np.flatnonzero(ids == PLACEHOLDER)
    ]
    slots = np.array([sequence.adapter_slot for sequence in sequences], dtype=np.int32)
    sampled = [(i, sequence) for i, sequence in enumerate(sequences) if sequence.samples]
    logits_rows = [int(query_start[i + 1]) - 1 for i, _ in sampled]
    logits_slots = [int(slots[i]) for i, _ in sampled]
    scored = []
    for i, sequence in enumerate(sequences):
        if sequence.wants_prompt_logprobs:
            following = prompts[sequence.request_id][sequence.start + 1 : sequence.start + 1 + sequence.num_tokens]
            scored.append((sequence, len(logits_rows), following))
            logits_rows += range(int(query_start[i]), int(query_start[i]) + len(following))
            logits_slots += [int(slots[i])] * len(following)
    if not logits_rows:
        # Some models cannot take logits of no row at all; one row costs nothing and nobody reads it.
        logits_rows, logits_slots = [0], [int(slots[0])]
    lora, correction = plans_for(np.repeat(slots, lengths), batch.merged_slot, lora_backend)
    of_logits, correction_of_logits = plans_for(np.array(logits_slots, np.int32), batch.merged_slot, lora_backend)
    return PackedInputs(
        input_ids=_to(ids, device)[None],
        position_ids=_to(positions, device)[None],
        pending=pending,
        logits_rows=_to(np.array(logits_rows, dtype=np.int64), device),
        sampled=[sequence for _, sequence in sampled],
        scored=scored,
        attention=_attention(
            sequences, query_start, starts + lengths, positions, lengths, block_size, device, attention_backend
        ),
        lora=lora,
        lora_correction=correction,
        lora_logits=of_logits,
        lora_logits_correction=correction_of_logits,
    )


def _attention(
    sequences: list[ScheduledSequence],
    query_start: np.ndarray,
    context_lens: np.ndarray,
    positions: np.ndarray,
    lengths: np.ndarray,
    block_size: int,
    device: torch.device,
    backend: str,
) -> AttentionMetadata:
    tables = np.zeros((len(sequences), max(len(sequence.block_table) for sequence in sequences)), dtype=np.int32)
    for table, sequence in zip(tables, sequences, strict=True):
        table[: len(sequence.block_table)] = sequence.block_table
    owner = np.repeat(np.arange(len(sequences)), lengths)
    slot_mapping = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    context_lens = context_lens.astype(np.int32)
    return AttentionMetadata(
        query_start_loc=query_start,
        context_lens=context_lens,
        block_tables=tables,
        slot_mapping=slot_mapping,
        query_start_loc_t=_to(query_start, device),
        context_lens_t=_to(context_lens, device),
        block_tables_t=_to(tables, device),
        slot_mapping_t=_to(slot_mapping, device),
        max_query_len=int(lengths.max()),
        max_context_len=int(context_lens.max()),
        backend=backend,
    )


def _to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(array), device)
