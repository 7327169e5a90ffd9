"""What a worker asks of the replica it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.handover import SequenceState
from peft_dist.core.messages import Exported, Imported, ReplicaDetail, ReplicaStats, SequenceProgress
from peft_dist.core.request import Request

if TYPE_CHECKING:  # It needs torch, of which a replica in a test knows nothing.
    from peft_dist.runner.kv_transfers import Transport


class ReplicaEngine(Protocol):
    """The engine's side that faces the worker.

    Attributes:
        on_start: Hears the ids of the requests that a step about to run is the first one of.
    """

    on_start: Callable[[list[str]], None] | None

    @property
    def requests(self) -> Mapping[str, Request]:
        """Those that were added and have not ended, by id."""
        ...

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

    def prefetch_adapter(self, content_hash: str) -> None:
        """Bring an adapter to the device if there is room that no request uses."""
        ...

    def forget_adapter(self, content_hash: str) -> None: ...

    def stats(self) -> ReplicaStats: ...

    def detail(self) -> ReplicaDetail: ...


class ReplicaHandovers(Protocol):
    """Requests that go to other replicas with their KV, or come from them. No call waits."""

    def fileno(self) -> int:
        """A file descriptor that is readable when ``poll`` has something to do."""
        ...

    @property
    def is_due(self) -> bool:
        """Whether ``poll`` has something to do that ``fileno`` does not tell of."""
        ...

    def export(self, handover: int, request_ids: Iterable[str]) -> None: ...

    def end_export(self, handover: int, *, moved: bool) -> None: ...

    def import_requests(self, handover: int, requests: Sequence[Request], states: Sequence[SequenceState]) -> None: ...

    def abort(self, request_ids: Iterable[str]) -> None:
        """Give up the imports of these requests."""
        ...

    def clear(self) -> None:
        """Give up whatever is under way, and abort its requests."""
        ...

    def poll(self) -> list[Exported | Imported]:
        """Carry on what can go on between two steps, and tell what has ended."""
        ...


class Replica(Protocol):
    """A loaded model with its engine. Every call but ``inspect_adapter`` comes from the worker's one thread."""

    @property
    def engine(self) -> ReplicaEngine: ...

    @property
    def handovers(self) -> ReplicaHandovers: ...

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

    def check_device(self) -> None:
        """Raises DeviceLostError when the device can do nothing more for this process."""
        ...

    def use_transport(self, transport: Transport) -> None:
        """How KV gets to replicas of other hosts, from now on."""
        ...

    def follow(self) -> None:
        """Do what rank 0 of this replica does, until it is closed. For every other rank."""
        ...

    def warm_up_some(self) -> bool:
        """Do a little of what would hold up requests later; False: nothing is left to do. For when there is no work."""
        ...

    def lacks_warm_up(self) -> bool:
        """Whether ``warm_up_some`` has something to do."""
        ...

    def fileno(self) -> int:
        """A file descriptor that is readable when a step makes sense again for an engine that waits for a load."""
        ...

    def close(self) -> None: ...
