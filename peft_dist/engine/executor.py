"""The only thing an engine may ask to spend time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import Batch, StepResult
from peft_dist.core.handover import KVHandle
from peft_dist.core.messages import AdapterResidency


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """How the load of an adapter ended; the slot is empty again when ``error`` says why it failed.

    Attributes:
        seconds: From ``start_load`` on.
        copy_seconds: Of these, what bringing the weights from the host to the device took; None where it was not told.
    """

    content_hash: str
    slot: int
    error: str | None
    seconds: float
    copy_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class TransferOutcome:
    """How the copy with this key ended; ``kv`` is where an export lies, ``error`` says why there is none.

    Attributes:
        seconds: That copying took.
    """

    key: int
    kv: KVHandle | None
    error: str | None
    seconds: float


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

    def can_merge(self, spec: AdapterSpec) -> bool:
        """Whether this adapter can be merged into the base weights."""
        ...

    def can_host(self, spec: AdapterSpec) -> bool:
        """Whether it can, and rows of others that run beside it, corrected, keep enough of the base's digits."""
        ...

    def switch(self, spec: AdapterSpec | None) -> float | None:
        """Merge a resident adapter into the weights (None: back to the base) for the batches submitted from now on.

        Batches in flight keep the weights they were submitted for. Returns the seconds that it took, or None where the
        device does it in its own time: the result of the next batch submitted tells them then (``switch_seconds``),
        once the device has measured them. Whatever it raises, the weights are the base's or those of
        ``merged_adapter``.
        """
        ...

    def merged_adapter(self) -> str | None:
        """Content hash of what the weights hold for the next batch; None: the base."""
        ...

    def holds_merged(self, content_hash: str) -> bool:
        """Whether ``switch`` to this adapter costs nothing, because its merged weights are still on the device."""
        ...

    def residency(self) -> list[AdapterResidency]:
        """Where the weights of the registered adapters are."""
        ...

    def peak_memory_bytes(self) -> int:
        """What the process has had of its device's memory at most; of the host's where there is no other."""
        ...

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop what is kept of sequences that ended or were aborted."""
        ...

    def start_load(self, spec: AdapterSpec, slot: int) -> None:
        """Begin to load a registered adapter into an empty device slot, and return at once.

        Its end is told by ``take_loaded``; until then no batch may use the slot, nor may it be dropped.
        """
        ...

    def take_loaded(self) -> list[LoadOutcome]:
        """Loads that have ended since the last call, without waiting.

        Raises:
            DeviceLostError: one failed because the device can do nothing more.
        """
        ...

    def fileno(self) -> int:
        """A file descriptor that is readable while ``take_loaded`` has something."""
        ...

    def drop_adapter(self, slot: int) -> None:
        """Free the device slot of a loaded adapter."""
        ...

    def keep_adapter(self, content_hash: str) -> None:
        """Keep the weights on the host, from where they are now (nowhere: do nothing), until ``release_adapter``."""
        ...

    def release_adapter(self, content_hash: str) -> None:
        """End what ``keep_adapter`` began."""
        ...

    def discard_adapter(self, content_hash: str) -> None:
        """Free what the host keeps of an adapter that is in no slot: its copy and where it came from."""
        ...

    def start_export(self, key: int, blocks: Sequence[int], *, on_host: bool, ahead: bool = False) -> None:
        """Begin to copy KV blocks, of the device or those of the host, to memory for another replica; steps go on.

        ``ahead``: Its request runs meanwhile. Those whose request stands still do not wait for such copies.
        No batch that writes to the blocks may be in flight, and none may until ``take_transfers`` told the end.
        """
        ...

    def start_import(self, key: int, kv: KVHandle, blocks: Sequence[int]) -> None:
        """Begin to fill device blocks from what was exported elsewhere; steps go on.

        No batch in flight may touch the blocks, and nobody may own them otherwise until ``take_transfers`` told the
        end.
        """
        ...

    def take_transfers(self) -> list[TransferOutcome]:
        """Copies that have ended since the last call, without waiting. Raises as ``take_loaded``."""
        ...

    def end_export(self, key: int) -> None:
        """Free the memory of an export, whether its copy has ended or not."""
        ...

    def transfers_fileno(self) -> int:
        """A file descriptor that is readable while ``take_transfers`` has something."""
        ...
