"""Placement and dispatch by the rules of dLoRA's artifact, in terms of the orchestrator's tables (for comparison)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from peft_dist.orchestrator.hosting import Hosting
from peft_dist.orchestrator.records import Outgoing, Replica, RequestRecord
from peft_dist.orchestrator.requests import RequestTable
from peft_dist.placement.artifact import ArtifactTable
from peft_dist.placement.placing import Placement
from peft_dist.placement.types import AdapterStep

# Of sequences that were sent: more than any replica takes in late.
_REMEMBERED = 4096


class ArtifactHosting(Hosting):
    """A table of hosts in place of placements that are searched for.

    Requests are counted as the artifact's dispatcher sees them: those that a replica had taken in when it last told of
    a step; where an idle adapter may be put out for a request, all that were sent.
    """

    def __init__(self, table: ArtifactTable, requests: RequestTable, *args: Any, **options: Any) -> None:
        """Further arguments: as of ``Hosting``."""
        super().__init__(*args, **options)
        self._table = table
        self._requests = requests
        self._given: dict[int, deque[str]] = {}
        self.num_placements = 1
        self._take_over()

    def among(self, record: RequestRecord, able: Sequence[Replica], now: float) -> list[Replica]:
        """The one that the table chooses."""
        counts = {replica.replica_id: self._counts(replica) for replica in able}
        chosen = self._table.choose(record.content_hash, counts)
        if self._table.settings.swaps:
            self._take_over()
        return [replica for replica in able if replica.replica_id == chosen]

    def given(self, record: RequestRecord, replica: Replica) -> None:
        given = self._given.setdefault(replica.epoch, deque(maxlen=_REMEMBERED))
        given.extend([record.content_hash] * len(record.unfinished))

    def check(self, now: float) -> list[Outgoing]:
        """Send ahead what is to be there; nothing is looked for."""
        return self._send_ahead(now)

    def carry_out(self, steps: Sequence[AdapterStep]) -> list[Outgoing]:
        """Change the table."""
        changes: dict[str, list[tuple[str, int]]] = {"evict": [], "load": [], "copy": []}
        for step in steps:
            changes[step.kind].append((step.adapter, step.replica))
        self._table.rearrange(changes["evict"], changes["load"] + changes["copy"])
        self._take_over()
        return super().carry_out(steps)

    def _counts(self, replica: Replica) -> Mapping[str, int]:
        backlog = self._requests.backlog(replica.replica_id)
        counts = {adapter: number for adapter, (number, _) in backlog.adapters.items()}
        base = backlog.num_sequences - sum(counts.values())
        counts |= {"": base} if base else {}
        unseen = 0 if self._table.settings.swaps else replica.num_sent - replica.num_taken
        if not unseen:
            return counts
        given = self._given.get(replica.epoch, deque())
        late = Counter(given[index] for index in range(max(0, len(given) - unseen), len(given)))
        return {adapter: max(number - late[adapter], 0) for adapter, number in counts.items()}

    def _take_over(self) -> None:
        hosts = self._table.all_hosts()
        self._placer.placement = Placement(hosts, 0.0)
        hosted: dict[int, set[str]] = {}
        for content, own in hosts.items():
            for replica_id in own:
                hosted.setdefault(replica_id, set()).add(content)
        self._hosted = {replica_id: frozenset(contents) for replica_id, contents in hosted.items()}
