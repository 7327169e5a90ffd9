"""What the HTTP layer asks of the engines behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.messages import ReplicaStats, SequenceProgress
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.observation import MigrationView, ReplicaView, RollingView


@dataclass(frozen=True, slots=True)
class NewRequest:
    """One prompt as it arrives.

    Attributes:
        request_id: Unique among unfinished requests; sequence i is known to replicas as ``f"{request_id}-{i}"``.
        prompt_token_ids: At least one id of the model's vocabulary.
        params: ``params.n`` sequences are drawn; ``seed`` and ``max_tokens`` may be None.
        model: Name of the base or of an adapter as the user wrote it; None is the base.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    model: str | None = None


class RequestStream(Protocol):
    """Tokens of one request as they are drawn: (sequence index, progress), sequences interleaved.

    Ends after the last sequence's progress with a ``finish_reason`` ("stop", "length", "abort", or "error"
    with ``progress.error`` set). Close it (``aclose``) in a ``finally``: closing early aborts what still
    runs within one engine step; closing a stream that was read to its end does nothing. Until either, its
    sequences take room in the queue, also when they have ended. Cancelling whoever waits for the next item
    closes it too.
    """

    def __aiter__(self) -> RequestStream: ...

    async def __anext__(self) -> tuple[int, SequenceProgress]:
        """Raises EngineDeadError when the replica died or the server stops before the end."""
        ...

    def take_ready(self, limit: int) -> list[tuple[int, SequenceProgress]]:
        """Up to ``limit`` items that the next calls of ``__anext__`` would return at once; raises nothing."""
        ...

    async def aclose(self) -> None:
        """Stop reading; what still runs of the request is aborted."""
        ...


class RollingRestarts(Protocol):
    """Restarting all replicas one after another."""

    def begin(self) -> RollingView:
        """Start, if none is under way, and go on by itself until all were restarted or one does not come back.

        Raises:
            ReplicaStateError: one is under way; or replicas cannot be spared, or are not started again.
        """
        ...

    def cancel(self) -> RollingView:
        """Go no further. Raises ReplicaStateError when none is under way."""
        ...

    def view(self) -> RollingView:
        """How far the last one is."""
        ...


class EngineClient(Protocol):
    """All replicas as one engine. Every method runs on the event loop's thread and returns at once or awaits."""

    @property
    def rolling(self) -> RollingRestarts:
        """What restarts the replicas one after another."""
        ...

    @property
    def model(self) -> ModelInfo:
        """The served model."""
        ...

    @property
    def is_healthy(self) -> bool:
        """Whether requests can be served now."""
        ...

    @property
    def health_error(self) -> str | None:
        """Why ``is_healthy`` is False."""
        ...

    def adapters(self) -> list[AdapterSpec]:
        """Adapters that new requests can name, in order of loading."""
        ...

    def pinned_adapters(self) -> frozenset[str]:
        """Names of those that stay on the device."""
        ...

    def resolve(self, name: str | None) -> AdapterSpec | None:
        """The adapter that a user's model name means, None for the base.

        Raises:
            UnknownModelError: nothing of that name is served.
        """
        ...

    def check_room(self, num_sequences: int, param: str) -> None:
        """Whether requests of so many sequences together could be admitted now. ``param``: What asks for them.

        Raises:
            InvalidRequestError: it never could.
            QueueFullError: too many requests wait.
        """
        ...

    def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, model: str | None
    ) -> RequestStream:
        """Admit a request and return its stream.

        Admission happens in the call itself, before anything is awaited, so a caller can still answer
        with an error status.

        Raises:
            UnknownModelError: ``model`` is not served.
            InvalidRequestError: prompt or parameters can never be served.
            QueueFullError: too many requests wait.
            EngineDeadError: no replica is alive, or the server is stopping.
        """
        ...

    def abort(self, request_id: str, sequence_index: int | None = None) -> None:
        """End a request, or one of its sequences, as "abort"; unknown or finished ones are ignored."""
        ...

    async def load_adapter(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        allow_hub: bool = False,
        root: str | None = None,
        allow_pickle: bool = False,
        pinned: bool | None = None,
    ) -> AdapterSpec:
        """Load an adapter from a folder (below ``root`` when given) or, with ``allow_hub``, a hub id.

        With ``replace``, requests that arrive afterwards use the new content under the same name, running
        ones finish with the old. A ``pinned`` one stays on the device until it is unloaded; None: if what it
        replaces does.

        Raises:
            AdapterError: the name is taken or reserved, or the adapter was refused, perhaps because pins leave no
                room for it, or it as a pinned one none for others.
            EngineDeadError: the replica died meanwhile.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Stop serving an adapter: new requests are refused at once, running ones finish.

        Raises:
            UnknownModelError: no adapter of that name is loaded.
        """
        ...

    def stats(self) -> ReplicaStats:
        """The last report of a ready replica, or of the last known one when none is ready."""
        ...

    @property
    def num_unread(self) -> int:
        """Sequences that have ended, and whose streams were neither read to the end nor closed."""
        ...

    def replicas(self) -> list[ReplicaView]:
        """Every replica as it was last heard of. Cheap: its parts are shared, and never change."""
        ...

    def migration(self) -> MigrationView | None:
        """What came of placing adapters and moving requests so far; None with one replica."""
        ...

    async def drain_replica(self, replica_id: int, *, restart: bool = False) -> None:
        """Move a replica's requests to others, give it no new ones, and return when it has none left.

        With ``restart`` it is then ended and started again; without, it waits until ``resume_replica``, and has kept
        that in mind (``drain_kept``); where it dies, its next incarnations wait.

        Raises:
            UnknownReplicaError: there is no such replica.
            ReplicaStateError: it does not serve, or no other one does; it is to be restarted already; or before it was
                empty it was resumed, or died.
        """
        ...

    def resume_replica(self, replica_id: int) -> None:
        """Let a drained replica take requests again; one that died and is started again, once it is ready.

        Raises:
            UnknownReplicaError, ReplicaStateError: there is no such replica, or it was not drained.
        """
        ...

    async def drain_kept(self, replica_id: int) -> None:
        """Return when a replica remembers whether it is drained, for a server after this one, or after two seconds."""
        ...

    async def stop(self) -> None:
        """Fail what still runs with EngineDeadError and end the replicas. Idempotent."""
        ...
