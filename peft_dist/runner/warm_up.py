"""The largest batch, run once before memory is shared out."""

from __future__ import annotations

from transformers import PreTrainedModel

from peft_dist.core.batch import Batch, ScheduledSequence, SequenceStart
from peft_dist.core.config import EngineConfig
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.runner.adapter_store import AdapterStore
from peft_dist.runner.model_runner import ModelRunner


def run_largest_batch(
    model: PreTrainedModel,
    shapes: list[tuple[int, int]],
    store: AdapterStore,
    config: EngineConfig,
    lora_backend: str,
    attention_backend: str,
) -> None:
    """Run it on a KV pool just big enough, so that the model's peak memory is known."""
    blocks = -(-config.max_num_batched_tokens // config.block_size)
    kv = KVCachePool(shapes, blocks, config.block_size, model.dtype, model.device)
    runner = ModelRunner(model, kv, store, (), lora_backend, attention_backend)
    start = SequenceStart("warm-up", [0] * config.max_num_batched_tokens, [], SamplingParams(temperature=0.0), 0, 0)
    sequence = ScheduledSequence("warm-up", start.prompt_token_ids, 0, list(range(blocks)), samples=True)
    runner.finish(runner.start(Batch(0, [sequence], [start])))
