"""What the orchestrator and a replica say to each other.

Every message travels in an envelope with the protocol's version, the replica's epoch (a replica that was fenced keeps
its old one, so its late words are recognised) and its number (``core/numbering.py``). The encoding rejects types and
fields it does not know.
"""

from __future__ import annotations

import msgspec

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import PeftDistError
from peft_dist.core.handover import SequenceState
from peft_dist.core.joining import Join, Leave, Welcome
from peft_dist.core.message_kinds import Command, Report
from peft_dist.core.numbering import UNNUMBERED
from peft_dist.core.outputs import PositionLogprobs
from peft_dist.core.replica_state import AdapterResidency as AdapterResidency
from peft_dist.core.replica_state import ReplicaDetail as ReplicaDetail
from peft_dist.core.replica_state import ReplicaStats as ReplicaStats
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.step_costs import StepCosts
from peft_dist.core.succession import (
    Adopt,
    DrainKept,
    Identify,
    Identity,
    KeepDrained,
    NameAdapters,
    NamedAdapter,
    NamesKept,
)

PROTOCOL_VERSION = 11


class AddRequest(Command, frozen=True, kw_only=True):
    """Run one sequence. ``output_token_ids`` is not empty when the replica continues what another began.

    ``age`` are the seconds since the request arrived at the server, where that is not just now.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    sequence_index: int = 0
    content_hash: str | None = None
    output_token_ids: list[int] = []
    age: float = 0.0


class AbortRequest(Command, frozen=True, kw_only=True):
    """Stop these sequences; what is not running is passed over."""

    request_ids: list[str]


class LoadAdapter(Command, frozen=True, kw_only=True):
    """Read, check and keep an adapter; answered by ``AdapterResult`` with the same ``call_id``.

    ``path`` is what the user wrote: a folder, inside ``root`` when that is given, or a hub id where ``allow_hub`` is
    set; the replica finds it. A ``pinned`` one stays on the device; either way the name pins nothing else any more.
    """

    call_id: int
    name: str
    path: str
    root: str | None = None
    allow_hub: bool = False
    allow_pickle: bool = False
    pinned: bool = False


class PinAdapter(Command, frozen=True, kw_only=True):
    """Have a name pin the content that the replica holds, and no other; None: nothing. Not answered."""

    name: str
    content_hash: str | None = None


class PrefetchAdapter(Command, frozen=True, kw_only=True):
    """Bring content that it holds onto its device, if there is room beside all its requests' own. Not answered."""

    content_hash: str


class UnloadAdapter(Command, frozen=True, kw_only=True):
    """Drop the adapter once no running request uses it."""

    call_id: int
    content_hash: str


class ExportRequests(Command, frozen=True, kw_only=True):
    """Hold these sequences and copy their KV for another replica; answered by ``Exported`` with the same number.

    They do not run until ``EndExport`` or ``AbortRequest``. Those that have ended by then are passed over.
    """

    handover: int
    request_ids: list[str]


class EndExport(Command, frozen=True, kw_only=True):
    """Another replica runs the sequences now (``moved``), or they go on here; not answered, nor refused twice."""

    handover: int
    moved: bool


class ImportRequests(Command, frozen=True, kw_only=True):
    """Run sequences with the KV that another replica exported: all or none; answered by ``Imported``.

    ``states`` are in the order of ``requests``, whose ids are the new ones. ``AbortRequest`` ends it at any time.
    """

    handover: int
    requests: list[AddRequest]
    states: list[SequenceState]


class Shutdown(Command, frozen=True, kw_only=True):
    """End at once. What still runs need not be reported."""


class Fence(Command, frozen=True, kw_only=True):
    """This incarnation is over, others have its requests: end at once. Another one may join, unless it ``is_final``."""

    reason: str = ""
    is_final: bool = False


class Ping(Command, frozen=True, kw_only=True):
    """The orchestrator lives; answered by ``Progress``. Either shows the loss of what was sent last before it."""


class Ready(Report, frozen=True, kw_only=True):
    """The model is loaded, by the process ``pid``, and commands may come.

    What a replica has that another orchestrator had: the ``contents`` that it holds, and in order the ``names`` that it
    remembers of ``names_version`` (``NameAdapters``); ``is_drained``: it takes no requests (``KeepDrained``).
    """

    model: ModelInfo
    pid: int
    costs: StepCosts | None = None
    contents: list[AdapterSpec] = []
    names: list[NamedAdapter] = []
    names_version: int = 0
    is_drained: bool = False


class SequenceProgress(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """New tokens of one sequence; ``first_index`` is the number of the first of them in its output.

    ``finish_reason`` is None while it runs. ``prompt_logprobs`` starts at prompt position 1 and comes whole, with the
    first tokens. ``queue_seconds`` is the time from its arrival at the server, less its way to the replica, to its
    first step there, None before that. ``lacks_adapter``: It ended because its adapter could not be loaded there.
    """

    request_id: str
    token_ids: list[int]
    first_index: int
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    queue_seconds: float | None = None
    lacks_adapter: bool = False


class Started(Report, frozen=True, kw_only=True):
    """These sequences are in a batch for the first time. Told before the batch runs: it may end the process."""

    request_ids: list[str]


class Heartbeat(Report, frozen=True, kw_only=True):
    """The process lives. ``busy_seconds``: for how long its loop has been in one round, 0 while it waits.

    ``is_orphaned``: It heard nothing of the orchestrator for too long, and has no requests any more. ``missed``:
    Commands of these numbers, from the first to the last, did not arrive; since then it has none, either.
    """

    busy_seconds: float
    is_orphaned: bool = False
    missed: tuple[int, int] | None = None


class Warmth(Report, frozen=True, kw_only=True):
    """Whether nothing is left to compile or capture, and the seconds of a piece of it. Unless told, something is."""

    is_warm: bool
    pause: float = 0.0


class Progress(Report, frozen=True, kw_only=True):
    """What one engine step brought.

    ``num_taken``: Sequences to run that this incarnation has taken in so far; None: all that were sent.
    """

    sequences: list[SequenceProgress]
    stats: ReplicaStats
    detail: ReplicaDetail | None = None
    num_taken: int | None = None


class AdapterResult(Report, frozen=True, kw_only=True):
    """Answer to LoadAdapter and UnloadAdapter; ``error`` names the problem and the remedy.

    ``is_final``: The same load would end alike whenever it was tried: what is there is whole, and does not fit.
    """

    call_id: int
    spec: AdapterSpec | None = None
    error: str | None = None
    is_final: bool = False


class Exported(Report, frozen=True, kw_only=True):
    """Answer to ExportRequests: the sequences that have not ended. With ``error`` nothing was copied."""

    handover: int
    sequences: list[SequenceState] = []
    error: str | None = None


class Imported(Report, frozen=True, kw_only=True):
    """Answer to ImportRequests: the sequences run here from now on or, with ``error``, nothing is left of them.

    ``is_full``: It was for lack of free blocks.
    """

    handover: int
    error: str | None = None
    is_full: bool = False


class Fatal(Report, frozen=True, kw_only=True):
    """The replica cannot go on."""

    error: str


AnyCommand = (
    AddRequest
    | AbortRequest
    | ExportRequests
    | EndExport
    | ImportRequests
    | LoadAdapter
    | PinAdapter
    | PrefetchAdapter
    | UnloadAdapter
    | NameAdapters
    | KeepDrained
    | Shutdown
    | Fence
    | Welcome
    | Ping
    | Identify
    | Adopt
)
AnyReport = (
    Join
    | Leave
    | Identity
    | Ready
    | Started
    | Heartbeat
    | Warmth
    | Progress
    | AdapterResult
    | NamesKept
    | DrainKept
    | Exported
    | Imported
    | Fatal
)


class ProtocolError(PeftDistError):
    """Bytes that are not a message of this protocol version."""


class CommandEnvelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command on the wire, with the protocol's version, the epoch it is meant for, and its number there."""

    version: int
    epoch: int
    number: int
    message: AnyCommand


class ReportEnvelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A report on the wire, with the protocol's version, the epoch it comes from, and its number there."""

    version: int
    epoch: int
    number: int
    message: AnyReport


_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(CommandEnvelope)
_reports = msgspec.msgpack.Decoder(ReportEnvelope)


def encode_command(message: AnyCommand, epoch: int, number: int = UNNUMBERED) -> bytes:
    """A command as msgpack bytes in its envelope."""
    return _encoder.encode(CommandEnvelope(PROTOCOL_VERSION, epoch, number, message))


def encode_report(message: AnyReport, epoch: int, number: int = UNNUMBERED) -> bytes:
    """A report as msgpack bytes in its envelope."""
    return _encoder.encode(ReportEnvelope(PROTOCOL_VERSION, epoch, number, message))


def decode_command(data: bytes) -> CommandEnvelope:
    """Raises ProtocolError when ``data`` is no command of this version."""
    try:
        envelope = _commands.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a command of protocol version {PROTOCOL_VERSION}: {error}") from error
    _check_version(envelope.version)
    return envelope


def decode_report(data: bytes) -> ReportEnvelope:
    """Raises ProtocolError when ``data`` is no report of this version."""
    try:
        envelope = _reports.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a report of protocol version {PROTOCOL_VERSION}: {error}") from error
    _check_version(envelope.version)
    return envelope


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"message of protocol version {version}, this process speaks {PROTOCOL_VERSION}: "
            "run the same peft_dist release on both sides"
        )
