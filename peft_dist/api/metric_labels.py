"""Which adapters have series of their own, and under which label."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from peft_dist.core.adapter import AdapterSpec
from peft_dist.orchestrator.observation import ReplicaView

BASE = "__base__"
OTHER = "__other__"
# Content without a name: it was unloaded or replaced while requests still run on it.
UNNAMED = "__unloaded__"


class AdapterLabels:
    """Labels for content hashes ("" is the base), at most ``limit`` of them beside the three above.

    Chosen are adapters that are merged, have the most requests, are on a device, or were asked for last, in
    this order. Content with several names goes by the first of them.

    Args:
        recent: Content hashes in order of use, the latest at the end.
    """

    def __init__(
        self, replicas: Iterable[ReplicaView], adapters: Iterable[AdapterSpec], recent: Sequence[str], limit: int
    ) -> None:
        self._names: dict[str, list[str]] = {}
        for spec in adapters:
            self._names.setdefault(spec.content_hash, []).append(spec.name)
        self.limit = limit
        self._chosen = self._choose([replica for replica in replicas if replica.is_ready], recent)
        self._always = [BASE, *sorted(self._chosen.values())]
        if len(self._names) > len(self._chosen):
            self._always.append(OTHER)

    def _choose(self, ready: Sequence[ReplicaView], recent: Sequence[str]) -> dict[str, str]:
        """Label of each chosen content hash."""
        merged = {replica.detail.merged_adapter for replica in ready}
        resident = {content_hash for replica in ready for content_hash in replica.stats.resident_adapters}
        num_requests: Counter[str] = Counter()
        for replica in ready:
            num_requests.update(replica.detail.running)
            num_requests.update(replica.detail.waiting)
        age = {content_hash: place for place, content_hash in enumerate(recent)}

        def importance(content_hash: str) -> tuple[bool, int, bool, int]:
            used = age.get(content_hash, -1)
            return content_hash in merged, num_requests[content_hash], content_hash in resident, used

        # Of thousands that are registered, few are in use: only these are compared.
        in_use = {*merged, *num_requests, *resident, *age}
        compared = [content_hash for content_hash in self._names if content_hash in in_use]
        chosen = heapq.nlargest(self.limit, compared, key=importance)
        unused = (content_hash for content_hash in self._names if content_hash not in in_use)
        chosen += islice(unused, self.limit - len(chosen))
        return {content_hash: readable(self._names[content_hash][0]) for content_hash in chosen}

    def of(self, content_hash: str) -> str:
        label = self._chosen.get(content_hash)
        if label is not None:
            return label
        if not content_hash:
            return BASE
        return OTHER if content_hash in self._names else UNNAMED

    def has_own(self, content_hash: str) -> bool:
        """Whether the adapter has a label that it shares with no other."""
        return content_hash in self._chosen

    def sums(self, values: Mapping[str, float], *, fill: bool = True) -> dict[str, float]:
        """Values by content hash as sums by label; with ``fill`` every label is there."""
        sums: dict[str, float] = dict.fromkeys(self._always, 0.0) if fill else {}
        for content_hash, value in values.items():
            label = self.of(content_hash)
            sums[label] = sums.get(label, 0.0) + value
        return sums

    def all_names(self, content_hashes: set[str]) -> list[str]:
        """Every name of those of the adapters that were chosen, sorted, ``limit`` at most."""
        chosen = self._chosen.keys() & content_hashes
        return sorted({readable(name) for content_hash in chosen for name in self._names[content_hash]})[: self.limit]


def readable(name: str) -> str:
    """A name as it can be written in UTF-8; bytes of a command line that are not UTF-8 arrive as surrogates."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
