"""What a captured step's attention is told: device tensors that each replay fills anew."""

from __future__ import annotations

import numpy as np

from peft_dist.kernels.types import AttentionMetadata
from peft_dist.runner.step_buffer import StepBuffer, StepShape


def attention_of(inputs: StepBuffer, shape: StepShape, block_size: int, backend: str) -> AttentionMetadata:
    """What the host arrays say is true of no batch: kernels that can be captured read the device's alone."""
    longest = shape.max_blocks * block_size
    return AttentionMetadata(
        query_start_loc=np.linspace(0, shape.tokens, shape.rows + 1).astype(np.int32),
        context_lens=np.full(shape.rows, longest, np.int32),
        block_tables=np.zeros((shape.rows, shape.max_blocks), np.int32),
        slot_mapping=np.full(shape.tokens, -1, np.int64),
        query_start_loc_t=inputs.query_start_loc,
        context_lens_t=inputs.context_lens,
        block_tables_t=inputs.block_tables,
        slot_mapping_t=inputs.slot_mapping,
        max_query_len=1 if shape.decodes else shape.tokens,
        max_context_len=longest,
        backend=backend,
    )
