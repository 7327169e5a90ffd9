"""The only thing an engine may ask to spend time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import Batch, StepResult


class Executor(Protocol):
    """Runs batches in the order they are submitted, and adapter changes in the same order.

    ``submit`` may return before the work is done; ``collect`` waits for it. Because everything runs in
    order, a block or slot may be given to another request as soon as the last batch that uses it has been
    submitted.
    """

    def submit(self, batch: Batch) -> Any:
        """Start a batch and return a handle for ``collect``."""
        ...

    def collect(self, handle: Any) -> StepResult:
        """Wait for a submitted batch."""
        ...

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop what is kept of sequences that ended or were aborted."""
        ...

    def load_adapter(self, spec: AdapterSpec, slot: int) -> None:
        """Put a registered adapter's weights into a device slot, over whatever was there."""
        ...

    def drop_adapter(self, slot: int) -> None:
        """Free a device slot."""
        ...

    def discard_adapter(self, content_hash: str) -> None:
        """Free the host copy of an adapter that is in no slot."""
        ...
