"""An engine from a configuration: the same one whatever it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from peft_dist.core.block_manager import BlockManager
from peft_dist.core.config import EngineConfig, ModelInfo
from peft_dist.core.cost_model import CostModel
from peft_dist.core.record_file import Recorder
from peft_dist.engine.adapter_manager import AdapterManager
from peft_dist.engine.decisions import Decision
from peft_dist.engine.engine import Engine
from peft_dist.engine.executor import Executor
from peft_dist.engine.limits import SchedulerLimits
from peft_dist.engine.recording import FORMAT, Begin, Entry, RecordedEngine, RecordingExecutor
from peft_dist.engine.scheduler import Scheduler
from peft_dist.policy.factory import make_policy
from peft_dist.policy.settings import PolicySettings


def assemble(
    config: EngineConfig,
    info: ModelInfo,
    executor: Executor,
    cost: CostModel,
    *,
    page_rows: int,
    num_rows: int | None,
    on_decision: Callable[[Decision], None] | None = None,
    record: Callable[[Entry], None] | None = None,
) -> Engine:
    """An engine with nothing in it, for a model that is loaded. Two must not use one executor at the same time.

    ``page_rows`` and ``num_rows``: As of ``AdapterManager``. ``record``: Is handed what the engine is told.
    """
    settings = replace(policy_settings(config), steps_in_flight=info.depth)
    limits = SchedulerLimits(
        max_model_len=info.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        preemption=config.preemption,
        # The policy's: the artifact's profile knows no bound, and no adapter makes room for another early there either.
        max_adapter_wait=settings.max_adapter_wait,
    )
    blocks = BlockManager(info.num_blocks, config.block_size, config.num_host_blocks)
    adapters = AdapterManager(config.max_loras, page_rows, num_rows)
    scheduler = Scheduler(limits, blocks, adapters, make_policy(config.policy, config.exec_type, settings, cost))
    if record is None:
        return Engine(scheduler, executor, info.depth, info.eos_token_ids, cost, on_decision)
    recorder = Recorder(record)
    recorder.note(Begin(FORMAT, config, info, cost.to_dict(), page_rows, num_rows))
    watched = cast(Executor, RecordingExecutor(executor, recorder))
    return RecordedEngine(recorder, scheduler, watched, info.depth, info.eos_token_ids, cost, on_decision)


def policy_settings(config: EngineConfig) -> PolicySettings:
    if config.policy_profile == "artifact":
        return PolicySettings.artifact()
    return PolicySettings(max_adapter_wait=config.max_adapter_wait, merged_minority=config.merged_minority)
