"""The engine's executor on torch."""

from __future__ import annotations

from collections.abc import Sequence

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import Batch, StepResult
from peft_dist.runner.model_runner import ModelRunner, PendingStep


class TorchExecutor:
    """Runs batches through a ``ModelRunner``; on a GPU the work is queued in order and ``submit`` returns early."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    def submit(self, batch: Batch) -> PendingStep:
        return self.runner.start(batch)

    def collect(self, handle: PendingStep) -> StepResult:
        return self.runner.finish(handle)

    def forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.runner.forget(request_id)

    def load_adapter(self, spec: AdapterSpec, slot: int) -> None:
        self.runner.store.fill_slot(spec, slot)

    def drop_adapter(self, slot: int) -> None:
        self.runner.store.pool.drop(slot)

    def discard_adapter(self, content_hash: str) -> None:
        self.runner.store.remove(content_hash)
