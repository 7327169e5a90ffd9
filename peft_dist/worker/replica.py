"""What a worker asks of the replica it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.messages import ReplicaDetail, ReplicaStats, SequenceProgress
from peft_dist.core.request import Request


class ReplicaEngine(Protocol):
    """The engine's side that faces the worker.

    Attributes:
        on_start: Hears the ids of the requests that a step about to run is the first one of.
    """

    on_start: Callable[[list[str]], None] | None

    @property
    def has_work(self) -> bool: ...

    @property
    def waits_for_load(self) -> bool:
        """Whether another step is of no use before an adapter has been loaded, or requests come or go."""
        ...

    @property
    def residency_version(self) -> int:
        """Grows whenever an adapter was registered, forgotten, brought to the device or put out of it."""
        ...

    def add_request(self, request: Request) -> None:
        """Raises ValueError when the request cannot be taken."""
        ...

    def abort(self, request_ids: Iterable[str]) -> None: ...

    def step(self, now: float) -> list[SequenceProgress]: ...

    def pin_adapter(self, name: str, content_hash: str | None) -> None:
        """Have a name pin this registered content and no other; None: nothing."""
        ...

    def forget_adapter(self, content_hash: str) -> None: ...

    def stats(self) -> ReplicaStats: ...

    def detail(self) -> ReplicaDetail: ...


class Replica(Protocol):
    """A loaded model with its engine. Every call but ``inspect_adapter`` comes from the worker's one thread."""

    @property
    def engine(self) -> ReplicaEngine: ...

    @property
    def model_info(self) -> ModelInfo: ...

    @property
    def load_timeout(self) -> float | None:
        """Seconds for finding, reading and checking one adapter; None is no limit."""
        ...

    def inspect_adapter(self, name: str, path: Path, *, allow_pickle: bool) -> AdapterSpec:
        """Read an adapter and check it whole. Raises AdapterError when it is refused."""
        ...

    def register_adapter(self, spec: AdapterSpec, *, allow_pickle: bool, pinned: bool) -> None:
        """Let requests use an adapter that was inspected, and keep it on the device where it is to be pinned.

        Raises AdapterError when it is refused.
        """
        ...

    def warm_up_some(self) -> bool:
        """Do a little of what would hold up requests later; False: nothing is left to do. For when there is no work."""
        ...

    def fileno(self) -> int:
        """A file descriptor that is readable when a step makes sense again for an engine that waits for a load."""
        ...

    def close(self) -> None: ...
