"""Which replica holds which adapter content."""

from __future__ import annotations

from collections.abc import Iterable, Set


class Holdings:
    """Content hashes by replica, as the replicas reported them."""

    def __init__(self) -> None:
        self._holders: dict[str, set[int]] = {}

    def add(self, replica_id: int, content_hash: str) -> None:
        self._holders.setdefault(content_hash, set()).add(replica_id)

    def holds(self, replica_id: int, content_hash: str) -> bool:
        """Whether a replica can run requests of a content; of "", the base, every one can."""
        return not content_hash or replica_id in self._holders.get(content_hash, ())

    def holders(self, content_hash: str) -> Set[int]:
        """Ids of the replicas that hold a content, not the base."""
        return self._holders.get(content_hash, frozenset())

    def of(self, replica_id: int) -> frozenset[str]:
        """What a replica holds."""
        return frozenset(content for content, holders in self._holders.items() if replica_id in holders)

    def drop(self, content_hash: str) -> list[int]:
        """Nobody holds it any more; returns who did."""
        return sorted(self._holders.pop(content_hash, ()))

    def lose(self, replica_id: int) -> None:
        """A replica is gone, with all that it held."""
        for holders in self._holders.values():
            holders.discard(replica_id)
        self._holders = {content: holders for content, holders in self._holders.items() if holders}

    def unneeded(self, needed: Iterable[str]) -> list[str]:
        """Held contents that are not among those ``needed``."""
        return sorted(self._holders.keys() - set(needed))
