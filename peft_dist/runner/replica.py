"""One replica, assembled: the model on its device, and the engine that drives it."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import Batch, ScheduledSequence, SequenceStart
from peft_dist.core.block_manager import BlockManager
from peft_dist.core.config import EngineConfig, ModelInfo
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.adapter_manager import AdapterManager
from peft_dist.engine.engine import Engine
from peft_dist.engine.scheduler import Scheduler, SchedulerLimits
from peft_dist.kernels import backend
from peft_dist.kernels.kv_pool import KVCachePool, block_bytes
from peft_dist.runner.adapter_modules import describe_modules
from peft_dist.runner.adapter_store import AdapterStore
from peft_dist.runner.adapter_tensors import load_adapter
from peft_dist.runner.executor import TorchExecutor
from peft_dist.runner.kv_probe import probe_kv_shapes
from peft_dist.runner.loader import end_of_sequence_ids, has_tokenizer, load_model, max_positions, resolve_device
from peft_dist.runner.memory import count_blocks
from peft_dist.runner.model_runner import ModelRunner
from peft_dist.runner.packing import pack_weights

logger = logging.getLogger(__name__)
_VERSIONED = ("torch", "transformers", "peft", "accelerate")


@dataclass
class Replica:
    """An engine with its model. ``close`` ends what runs; the memory goes with the object (``release_memory``)."""

    engine: Engine
    model_info: ModelInfo
    store: AdapterStore
    runner: ModelRunner

    def __post_init__(self) -> None:
        self._modules = describe_modules(self.runner.model)

    def load_adapter(self, name: str, path: str | Path, *, allow_pickle: bool = False) -> AdapterSpec:
        """Read and check an adapter whole, keep it on the host, and let requests use it.

        Raises:
            AdapterError: it is refused; nothing has changed.
        """
        adapter = load_adapter(name, Path(path), self._modules, allow_pickle=allow_pickle)
        self.store.add(adapter)
        self.engine.register_adapter(adapter.spec)
        return adapter.spec

    def close(self) -> None:
        self.engine.abort(list(self.engine.requests))
        while self.engine.has_work:
            self.engine.step(0.0)


def release_memory() -> None:
    """Give what no object holds any more back to the device's driver."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def build_replica(config: EngineConfig) -> Replica:
    """Load the model, size its memory, and put an engine on top.

    Raises:
        ConfigError: the model cannot be served with this configuration.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device)
    model = load_model(config, device)
    if device.type == "cpu":
        pack_weights(model, config.pack_weights)
    shapes = probe_kv_shapes(model)
    store = AdapterStore(model, device, model.dtype)
    eos = end_of_sequence_ids(model)
    longest = max_positions(model, config.max_model_len)
    per_block = block_bytes(shapes, config.block_size, model.dtype)
    num_blocks = count_blocks(config, device, per_block, longest, lambda: _warm_up(model, shapes, store, config))
    longest = min(longest, num_blocks * config.block_size)
    kv = KVCachePool(shapes, num_blocks, config.block_size, model.dtype, device, config.num_host_blocks)
    kernels = backend.choose(device, config.compile_kernels, model.dtype)
    runner = ModelRunner(model, kv, store, eos, kernels)
    depth = config.depth if config.depth is not None else int(device.type == "cuda")
    limits = SchedulerLimits(
        max_model_len=longest,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        preemption=config.preemption,
    )
    blocks = BlockManager(num_blocks, config.block_size, config.num_host_blocks)
    scheduler = Scheduler(limits, blocks, AdapterManager(config.max_loras))
    info = _describe(config, runner, longest, depth)
    logger.info(
        "%s on %s in %s: %d KV blocks of %d tokens", info.model, device, info.dtype, num_blocks, config.block_size
    )
    return Replica(Engine(scheduler, TorchExecutor(runner), depth, eos), info, store, runner)


def _describe(config: EngineConfig, runner: ModelRunner, longest: int, depth: int) -> ModelInfo:
    return ModelInfo(
        model=config.model,
        served_model_name=config.served_model_name or Path(config.model).name,
        max_model_len=longest,
        vocab_size=runner.vocab_size,
        eos_token_ids=runner.eos_token_ids,
        num_blocks=runner.kv.num_blocks,
        num_host_blocks=config.num_host_blocks,
        block_size=config.block_size,
        device=str(runner.device),
        dtype=str(runner.model.dtype).removeprefix("torch."),
        depth=depth,
        attention_backend=runner.backend,
        lora_backend=runner.backend,
        tokenizer=config.model if has_tokenizer(config.model) else None,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _warm_up(model: PreTrainedModel, shapes: list[tuple[int, int]], store: AdapterStore, config: EngineConfig) -> None:
    """Run the largest batch once, on a KV pool just big enough, so that the model's peak memory is known."""
    blocks = -(-config.max_num_batched_tokens // config.block_size)
    kv = KVCachePool(shapes, blocks, config.block_size, model.dtype, model.device)
    runner = ModelRunner(model, kv, store, ())
    start = SequenceStart("warm-up", [0] * config.max_num_batched_tokens, [], SamplingParams(temperature=0.0), 0, 0)
    sequence = ScheduledSequence("warm-up", start.prompt_token_ids, 0, list(range(blocks)), samples=True)
    runner.finish(runner.start(Batch(0, [sequence], [start])))
