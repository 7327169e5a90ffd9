"""One replica, assembled: the model on its device, and the engine that drives it."""

from __future__ import annotations

import gc
import logging
import select
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig, ModelInfo
from peft_dist.core.cost_model import CostModel
from peft_dist.core.errors import AdapterError, ConfigError, UnfitAdapterError
from peft_dist.core.grammars import Grammars
from peft_dist.core.record_file import FULL, End, RecordFile, recording_folder
from peft_dist.core.versions import versions_of
from peft_dist.engine.assembly import assemble
from peft_dist.engine.engine import Engine
from peft_dist.engine.handovers import Handovers
from peft_dist.engine.recorded_moves import make_handovers
from peft_dist.kernels import backend
from peft_dist.kernels.kv_pool import KVCachePool, block_bytes
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.patches.sharding import num_outputs
from peft_dist.runner.adapter_memory import count_rows, expect_workspace, row_bytes
from peft_dist.runner.adapter_modules import describe_modules
from peft_dist.runner.adapter_store import AdapterStore
from peft_dist.runner.cost_prior import ModelSize, device_prior, measure_speed
from peft_dist.runner.cost_profile import hash_shapes, identify, read_profile, write_profile
from peft_dist.runner.decision_log import DecisionLog
from peft_dist.runner.device_way import choose_device_way
from peft_dist.runner.executor import TorchExecutor
from peft_dist.runner.fingerprint import Fingerprint
from peft_dist.runner.graph_setup import are_captured, choose_attention, graph_bytes, make_graphs
from peft_dist.runner.kv_probe import probe_kv_shapes
from peft_dist.runner.kv_transfers import Transport
from peft_dist.runner.loader import (
    end_of_sequence_ids,
    has_tokenizer,
    load_model,
    load_tokenizer,
    max_positions,
    resolve_device,
)
from peft_dist.runner.memory import MemoryLeft, adapter_host_bytes, count_blocks
from peft_dist.runner.merge_setup import as_in_the_base, later_device_bytes, make_merging
from peft_dist.runner.model_runner import ModelRunner
from peft_dist.runner.packing import prepare_layers
from peft_dist.runner.rank_executors import FollowingExecutor, make_executor
from peft_dist.runner.rank_group import join_ranks
from peft_dist.runner.restart_check import check_restart
from peft_dist.runner.warm_up import KernelWarmUp, run_largest_batch

logger = logging.getLogger(__name__)
_VERSIONED = ("torch", "transformers", "peft", "accelerate")


@dataclass
class Replica:
    """An engine with its model. ``close`` ends what runs; the memory goes with the object (``release_memory``).

    Attributes:
        config: What the engine goes by now; ``loaded_with`` what the model was loaded with.
        identity: What measured seconds depend on (``cost_profile.identify``).
    """

    engine: Engine
    handovers: Handovers
    model_info: ModelInfo
    store: AdapterStore
    runner: ModelRunner
    executor: TorchExecutor
    config: EngineConfig
    loaded_with: EngineConfig
    identity: dict[str, str]
    kernels: KernelWarmUp

    @property
    def load_timeout(self) -> float | None:
        """Seconds for reading one adapter; None is no limit."""
        return self.config.adapter_load_timeout

    def inspect_adapter(self, name: str, path: str | Path, *, allow_pickle: bool = False) -> AdapterSpec:
        """Read and check an adapter whole, and keep nothing of it. For any thread.

        Raises:
            AdapterError: it cannot be served.
        """
        return self.store.inspect(name, Path(path), allow_pickle=allow_pickle)

    def register_adapter(self, spec: AdapterSpec, *, allow_pickle: bool = False, pinned: bool = False) -> None:
        """Let requests use an adapter that was inspected; its weights are read when the first of them comes.

        A pinned one's are read now, and stay on the device. What the same name pinned before is pinned no more.

        Raises:
            AdapterError: the device has no room for it beside the pinned ones, or none for another beside it; or it
                cannot be merged where that is all that runs. Nothing has changed.
        """
        if pinned and self.config.exec_type == "vllm":
            raise AdapterError(
                f"adapter {spec.name!r} cannot be pinned: exec_type='vllm' keeps no adapters, but models"
            )
        self.engine.check_room(spec, pinned=pinned)
        reason = self.executor.prepare_merge(spec)
        if reason and self.config.exec_type != "dlora":
            raise UnfitAdapterError(
                f"adapter {spec.name!r}: {reason}, and exec_type={self.config.exec_type!r} runs nothing else"
            )
        captured_for = self.executor.captured_for
        self.executor.register(spec, allow_pickle=allow_pickle)
        self.engine.register_adapter(spec, pinned=pinned)
        if self.executor.captured_for != captured_for:
            self.kernels.begin()

    def load_adapter(
        self, name: str, path: str | Path, *, allow_pickle: bool = False, pinned: bool = False
    ) -> AdapterSpec:
        """``inspect_adapter``, then ``register_adapter``."""
        spec = self.inspect_adapter(name, path, allow_pickle=allow_pickle)
        self.register_adapter(spec, allow_pickle=allow_pickle, pinned=pinned)
        return spec

    def restart(self, config: EngineConfig) -> Engine:
        """Take a new engine, with other options, for the model as it was loaded.

        It has the same adapters registered and pinned. What the old one was running is aborted, and the loads under
        way are waited for. Its cost model goes on.

        Raises:
            ConfigError: an option needs the model loaded in another way; the old engine goes on.
        """
        check_restart(self.loaded_with, config, self.executor)
        old = self.engine
        new = new_engine(config, self.model_info, self.executor, old.cost)
        pins = old.scheduler.adapters.pins.specs
        if problem := new.scheduler.adapters.space.find_full({spec.content_hash: spec for _, spec in pins}.values()):
            raise ConfigError(f"max_loras={config.max_loras}: {problem}")
        self._drain(wait_for_loads=True)
        self._close_log()
        self.executor.clear()
        self.config = config
        self.model_info = replace(self.model_info, max_loras=config.max_loras)
        self.engine, self.handovers = new, make_handovers(new)
        for spec in old.adapters.values():
            self.engine.register_adapter(spec)
        for name, spec in pins:
            self.engine.pin_adapter(name, spec.content_hash)
        return self.engine

    def warm_up(self, *, progress: bool = False) -> None:
        """On a GPU, make ahead of time what the adapters registered so far need: captured steps, compiled kernels."""
        self.executor.capture(progress=progress)
        self.kernels.finish(progress=progress)

    def check_device(self) -> None:
        """Raises DeviceLostError when the device can do nothing more for this process."""
        self.executor.check_device()

    def use_transport(self, transport: Transport) -> None:
        """How KV gets to replicas of other hosts, from now on."""
        self.executor.transfers.transport = transport

    def warm_up_some(self) -> bool:
        """A little of what registered adapters need, kernels and then captured steps; False: nothing is left to do."""
        return self.kernels.go_on() or (self.kernels.are_steps_of_use and self.executor.capture_some())

    def lacks_warm_up(self) -> bool:
        """Whether ``warm_up_some`` has something to do."""
        return self.kernels.are_left or (self.kernels.are_steps_of_use and self.executor.lacks_captures)

    def fileno(self) -> int:
        """A file descriptor that is readable when an adapter's load has ended and ``engine.step`` should be called."""
        return self.executor.fileno()

    def follow(self) -> None:
        """Do what rank 0 of this replica does, until it is closed. For every other rank, and nothing else then."""
        assert isinstance(self.executor, FollowingExecutor), "rank 0 leads"
        self.executor.follow()

    def close(self) -> None:
        """End what runs, and the loader's threads; write down what was learnt of costs, where that was asked for."""
        self._drain()
        self.executor.close()
        self._close_log()
        if self.config.cost_profile is not None and self.engine.cost.num_steps:
            write_profile(Path(self.config.cost_profile), self.identity, self.model_info.model, self.engine.cost)

    def _drain(self, *, wait_for_loads: bool = False) -> None:
        engine = self.engine
        engine.abort(list(engine.requests))
        while engine.has_work:
            if engine.waits_for_load:
                if not wait_for_loads:
                    return
                select.select([self.fileno()], [], [])
            engine.step(0.0)

    def _close_log(self) -> None:
        if isinstance(self.engine.on_decision, DecisionLog):
            self.engine.on_decision.close()


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
    ranks = join_ranks(config)
    device = resolve_device(config.device)
    mark = Fingerprint(config)
    model = load_model(config, device, mark.before(ranks.shard) if ranks.is_split else None)
    # Before its weights are packed, its layers wrapped and the memory taken.
    mark.see(model)
    speed, size, shapes_hash = measure_speed(device, model.dtype), ModelSize.of(model), hash_shapes(model)
    ranks.combine(model)
    prepare_layers(model, config)
    shapes = probe_kv_shapes(model)
    modules = describe_modules(model)
    num_rows = count_rows(config, modules, device, model.dtype)
    pool = LoRAPool(device, model.dtype, num_rows=num_rows, num_slots=config.max_loras)
    attention = choose_attention(config, device, model.dtype, shapes)
    lora = backend.choose_lora(device, config.compile_kernels, model.dtype)
    captured = are_captured(config, device, attention)
    eos = end_of_sequence_ids(model)
    longest = max_positions(model, config.max_model_len)
    per_block = block_bytes(shapes, config.block_size, model.dtype)
    adapter_bytes = num_rows * row_bytes(modules, model.dtype)
    room_bytes = expect_workspace(config, modules, pool) if lora == "triton" else 0
    left = MemoryLeft(config, device, pool, adapter_bytes + room_bytes)
    left.promised = (config.num_blocks or 0) * per_block
    merge = make_merging(config, model, modules, left)
    ranks.check_alike("merge", merge.way if merge is not None else "off")
    store = AdapterStore(model, ranks.whole(as_in_the_base(modules, merge)), pool, adapter_host_bytes(config, device))
    num_blocks = count_blocks(
        config,
        device,
        per_block,
        longest,
        adapter_bytes + room_bytes + later_device_bytes(config, merge, modules),
        lambda: run_largest_batch(model, shapes, store, config, lora, attention),
        merge.remedy if merge is not None and merge.on_device else None,
        partial(graph_bytes, config, num_outputs(model), len(shapes)) if captured else None,
    )
    num_blocks = ranks.smallest(num_blocks)
    longest = min(longest, num_blocks * config.block_size)
    kv = KVCachePool(shapes, num_blocks, config.block_size, model.dtype, device, config.num_host_blocks)
    left.promised = 0
    depth = config.depth if config.depth is not None else int(device.type == "cuda")
    runner = ModelRunner(model, kv, store, eos, lora, attention, merge, config.max_num_seqs, depth)
    runner.grammars = Grammars(partial(load_tokenizer, config), runner.vocab_size, eos)
    if captured:
        runner.graphs = make_graphs(config, runner, longest, ranks)
    info = _describe(config, runner, longest, depth, adapter_bytes, mark.text)
    logger.info(
        "%s on %s in %s: %d KV blocks of %d tokens", info.model, device, info.dtype, num_blocks, config.block_size
    )
    logger.info("adapters: %d rank rows in each of %d modules, %d slots", num_rows, len(modules), config.max_loras)
    executor = make_executor(runner, config.adapter_load_timeout, ranks)
    if config.kv_transfer != "host":
        executor.transfers.devices = choose_device_way(kv.device)
    identity = identify(info, shapes_hash, device)
    cost = read_profile(Path(config.cost_profile), identity) if config.cost_profile else None
    if cost is None:
        prior = device_prior(speed, size, row_bytes(modules, model.dtype), len(modules), info.merge_way)
        cost = CostModel(prior)
    engine = new_engine(config, info, executor, cost)
    kernels = KernelWarmUp(runner, config, longest, executor.rehearse)
    replica = Replica(engine, make_handovers(engine), info, store, runner, executor, config, config, identity, kernels)
    replica.warm_up(progress=ranks.rank == 0)
    return replica


def new_engine(config: EngineConfig, info: ModelInfo, executor: TorchExecutor, cost: CostModel) -> Engine:
    """As ``assemble``, with room for adapters as the executor's pool has it."""
    pool = executor.runner.store.pool
    log = DecisionLog(Path(config.decision_log)) if config.decision_log else None
    folder = recording_folder()
    return assemble(
        config,
        info,
        executor,
        cost,
        page_rows=pool.page_rows,
        num_rows=pool.num_rows,
        on_decision=log,
        record=RecordFile(folder, "engine", End(FULL)) if folder is not None else None,
    )


def _describe(
    config: EngineConfig, runner: ModelRunner, longest: int, depth: int, adapter_bytes: int, fingerprint: str
) -> ModelInfo:
    return ModelInfo(
        model=config.model,
        served_model_name=config.served_model_name or Path(config.model).name,
        max_model_len=longest,
        vocab_size=runner.vocab_size,
        eos_token_ids=runner.eos_token_ids,
        num_blocks=runner.kv.num_blocks,
        num_host_blocks=config.num_host_blocks,
        block_size=config.block_size,
        block_bytes=runner.kv.bytes_per_block * config.tensor_parallel_size,
        tensor_parallel_size=config.tensor_parallel_size,
        device=str(runner.device),
        dtype=str(runner.model.dtype).removeprefix("torch."),
        depth=depth,
        attention_backend=runner.attention_backend,
        lora_backend=runner.lora_backend,
        max_loras=config.max_loras,
        adapter_bytes=adapter_bytes,
        merge_way=runner.merge.way if runner.merge else "off",
        merge_bytes=runner.merge.num_bytes if runner.merge else 0,
        tokenizer=config.model if has_tokenizer(config.model) else None,
        versions=versions_of(_VERSIONED),
        fingerprint=fingerprint,
    )
