"""Which options can change while the model stays as it was loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.runner.executor import TorchExecutor

# What a new engine reads; everything else was settled when the model was loaded.
_FREE = frozenset(
    (
        *("max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "preemption", "max_loras", "decision_log"),
        *("policy", "exec_type", "policy_profile", "max_adapter_wait", "merged_minority"),
    )
)


def check_restart(old: EngineConfig, new: EngineConfig, executor: TorchExecutor) -> None:
    """Raises ConfigError naming the first option of ``new`` that this model, loaded with ``old``, cannot follow."""
    for option in fields(EngineConfig):
        value, loaded = getattr(new, option.name), getattr(old, option.name)
        if option.name not in _FREE and value != loaded:
            raise ConfigError(
                f"{option.name}={value!r} needs the model loaded again, which has {loaded!r}: build a new replica"
            )
    if problem := next(_problems(old, new, executor), None):
        raise ConfigError(f"{problem}: build a new replica")


def _problems(old: EngineConfig, new: EngineConfig, executor: TorchExecutor) -> Iterator[str]:
    runner, most = executor.runner, executor.runner.store.pool.num_slots
    if most is not None and new.max_loras > most:
        yield f"max_loras={new.max_loras} is more than the {most} slots that were made"
    if runner.device.type == "cuda" and new.max_num_batched_tokens > old.max_num_batched_tokens:
        yield (
            f"max_num_batched_tokens={new.max_num_batched_tokens} is more than the {old.max_num_batched_tokens} for "
            "which memory was kept free"
        )
    if (new.exec_type == "vllm") != (old.exec_type == "vllm"):
        yield f"exec_type={new.exec_type!r} needs other copies of the weights than {old.exec_type!r}"
    if runner.merge is None:
        if new.exec_type != "dlora":
            yield f"exec_type={new.exec_type!r} merges adapters, and this model was loaded without means to"
        if new.policy == "merge" or (old.policy == "fcfs" and new.policy != "fcfs" and new.merge != "off"):
            yield f"policy={new.policy!r} merges adapters, and this model was loaded without means to"
    elif new.exec_type != "dlora":
        for spec in runner.store.specs:
            if not executor.can_merge(spec):
                yield f"exec_type={new.exec_type!r} runs merged adapters only, and {spec.name!r} cannot be merged"
