"""What the orchestrator remembers of replicas and requests, and the commands that it hands out."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import PeftDistError
from peft_dist.core.messages import AnyCommand, ReplicaDetail, ReplicaStats
from peft_dist.core.numbering import Inbox
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator.observation import ReplicaTotals
from peft_dist.orchestrator.untaken import Untaken, most_bytes


class Outgoing(NamedTuple):
    """A command and the incarnation of the replica it is meant for."""

    replica_id: int
    epoch: int
    command: AnyCommand


class Fault(NamedTuple):
    """Why a replica is given up. ``hangs``, ``by_link``: As in ``Orchestrator.lose_replica``.

    ``is_unseen``: Only that nothing is heard of it, over a network: its process may be well. ``is_misfit``: It has
    another model, and so would the next one of its kind.
    """

    reason: str
    hangs: bool = False
    by_link: bool = False
    is_unseen: bool = False
    is_misfit: bool = False


class ReplicaState(enum.Enum):
    """Where an incarnation of a replica is in its life; DEAD is for good.

    A DRAINING one takes no new requests, and a DRAINED one has none left either.
    """

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    DEAD = "dead"


@dataclass(slots=True)
class Replica:
    """One replica; ``epoch`` counts incarnations over all replicas, so that no two are alike.

    Attributes:
        start_deadline: The time by which a starting replica must be ready, None for no limit.
        capacity_tokens: That its KV blocks hold.
        resident: Content hashes on its device by its ``stats``.
        measured_steps, measured_at: How many steps it had run, and when, when its costs last were of many new ones.
        on_host: Content hashes whose weights were in its host memory when it told details last.
        is_warm, pause: As in ``Warmth``, as it said last.
        last_heard: When it said anything last.
        inbox: The numbers of what it has said.
        num_sent, num_taken: Sequences that it was sent, and those of them that it said it has taken in.
        untaken: The others.
        ready_since: When it became ready, None before.
        num_restarts: Incarnations of this replica before this one.
        num_failures: Incarnations of this replica that died early, one after another, up to now.
        restart_at: When a dead replica is started again, None for never.
        leaves: A draining one ends when it is empty, and is started again at once if this process had started it.
        is_guest: It joined, and is started and ended by somebody else.
        is_survivor: It ran before this orchestrator did, and has not told yet what it has.
        was_adopted: It did, and has.
        is_renewed: It goes on in the process of the incarnation before it, whose connection failed; until it is ready
            it is a survivor of that one.
        stays_drained: Somebody drained it, not to restart it, and nobody has resumed it since: whatever incarnation of
            it comes waits for that.
        coming: Content hashes of adapters that are on their way to it.
        refused: Content hashes of named adapters that it did not take when they were brought to it, and why.
        num_drains_told, num_drains_kept: How often it was told whether it is drained, and said that it remembers that.
        names_version: The last version of the names that it is known to remember.
        earlier: What the incarnations before this one counted.
    """

    replica_id: int
    epoch: int
    state: ReplicaState = ReplicaState.STARTING
    start_deadline: float | None = None
    model: ModelInfo | None = None
    capacity_tokens: int = 1
    pid: int | None = None
    stats: ReplicaStats = field(default_factory=ReplicaStats)
    resident: frozenset[str] = frozenset()
    detail: ReplicaDetail = field(default_factory=ReplicaDetail)
    costs: StepCosts | None = None
    measured_steps: int = 0
    measured_at: float = 0.0
    on_host: frozenset[str] = frozenset()
    is_warm: bool = False
    pause: float = 0.0
    last_heard: float = 0.0
    inbox: Inbox = field(default_factory=Inbox)
    num_sent: int = 0
    num_taken: int = 0
    untaken: Untaken = field(default_factory=Untaken)
    ready_since: float | None = None
    num_restarts: int = 0
    num_failures: int = 0
    restart_at: float | None = None
    leaves: bool = False
    is_guest: bool = False
    is_survivor: bool = False
    was_adopted: bool = False
    is_renewed: bool = False
    stays_drained: bool = False
    coming: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    num_drains_told: int = 0
    num_drains_kept: int = 0
    names_version: int = 0
    earlier: ReplicaTotals = field(default_factory=ReplicaTotals)
    error: PeftDistError | None = None

    def tell(self, stats: ReplicaStats) -> None:
        """What it said of itself last."""
        if stats.resident_adapters != self.stats.resident_adapters:
            self.resident = frozenset(stats.resident_adapters)
        self.stats = stats

    def was_sent(self, request: RequestRecord) -> None:
        """It is on its way there, each of its sequences by itself."""
        for sequence in request.unfinished.values():
            num_tokens = len(request.prompt_token_ids) + len(sequence.output_token_ids)
            self.untaken.add(most_bytes(num_tokens, request.params))
        self.num_sent += len(request.unfinished)

    def has_taken(self, number: int | None) -> None:
        """So many sequences are no longer on their way; None: all that were sent."""
        if number == self.num_taken:
            return
        self.num_taken = self.num_sent if number is None else number
        self.untaken.keep(self.num_sent - self.num_taken)

    @property
    def is_alive(self) -> bool:
        return self.state is not ReplicaState.DEAD

    @property
    def is_unreached(self) -> bool:
        """Whether its process was heard, and has not yet heard that it is this incarnation."""
        return self.is_renewed and self.state is ReplicaState.STARTING

    @property
    def will_be_ready(self) -> bool:
        """Whether it starts, or is going to be started again, and takes requests then."""
        return self.will_come and not self.stays_drained

    @property
    def will_come(self) -> bool:
        """Whether it starts, or is going to be started again."""
        return self.state is ReplicaState.STARTING or self.restart_at is not None or (self.leaves and not self.is_guest)


class SequenceRecord(msgspec.Struct):
    """One sequence of a request.

    Attributes:
        sequence_id: What the replica that owns it knows it as; another one on every replica it was on.
        started: Whether its replica said that it is in a batch.
        drew: Whether its replica reported tokens of it.
        num_deaths: Replicas that died with it in a batch, one after another, without a token of it between.
        num_early_deaths: Of these, those that had reported no token of it.
        num_silences: Replicas that fell silent so, of which nothing more was seen.
        owed_prefill, owed_output: What it counts for in its replica's backlog, in tokens.
    """

    sequence_id: str
    index: int
    started: bool = False
    drew: bool = False
    num_deaths: int = 0
    num_early_deaths: int = 0
    num_silences: int = 0
    owed_prefill: int = 0
    owed_output: float = 0.0
    output_token_ids: list[int] = []


class RequestRecord(msgspec.Struct):
    """All that any replica needs to go on with a request: prompt, parameters, seed, tokens so far.

    Attributes:
        number: Of its admission, counted over all requests.
        replica_id: The replica that has all its sequences (they share the prompt's KV), None while there is none.
        num_moves: How often its sequences were given other ids, for another replica.
        waits_since: Since when it has no replica.
        is_suspect: It, or another request beside it, made replicas die: until it draws a token, it runs without other
            suspects.
        prompt_hashes: Names of the blocks of its prompt, once somebody asked (``prefixes.py``).
        prefix_uses: What its replica is to have found of them, until it has said what it did; None: nobody asks.
        num_import_deaths: Replicas that died while it was brought to them with its KV, one after another.
        num_lacks: How often a replica could not load its adapter.
        unfinished: The sequences that still run, by index.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    adapter: AdapterSpec | None
    arrival_time: float
    number: int = 0
    replica_id: int | None = None
    num_moves: int = 0
    waits_since: float = 0.0
    is_suspect: bool = False
    prompt_hashes: list[bytes] | None = None
    prefix_uses: list[int] | None = None
    num_import_deaths: int = 0
    num_lacks: int = 0
    unfinished: dict[int, SequenceRecord] = {}

    @property
    def has_started(self) -> bool:
        """Whether one of its sequences is in a batch of its replica."""
        # A list: it is asked of all requests, once a second, and most have one sequence.
        return True in [sequence.started for sequence in self.unfinished.values()]

    @property
    def content_hash(self) -> str:
        """Of its adapter, "" for the base."""
        return self.adapter.content_hash if self.adapter else ""
