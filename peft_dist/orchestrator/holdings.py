"""Which replica holds which adapter content."""

from __future__ import annotations

from collections.abc import Iterable, Set


class Holdings:
    """Content hashes by replica, as the replicas reported them."""

    def __init__(self) -> None:
        self._holders: dict[str, set[int]] = {}
        # Those that took a content and cannot run it: when nobody needs it, they are to drop it like the others.
        self._unable: dict[str, set[int]] = {}

    def add(self, replica_id: int, content_hash: str) -> None:
        self._holders.setdefault(content_hash, set()).add(replica_id)
        self._unable.get(content_hash, set()).discard(replica_id)

    def holds(self, replica_id: int, content_hash: str) -> bool:
        """Whether a replica can run requests of a content; of "", the base, every one can."""
        return not content_hash or replica_id in self._holders.get(content_hash, ())

    def holders(self, content_hash: str) -> Set[int]:
        """Ids of the replicas that can run requests of a content, not the base."""
        return self._holders.get(content_hash, frozenset())

    def is_unable(self, replica_id: int, content_hash: str) -> None:
        """A replica that took a content cannot run it after all, until it is added again."""
        self._holders.get(content_hash, set()).discard(replica_id)
        self._unable.setdefault(content_hash, set()).add(replica_id)

    def drop(self, content_hash: str) -> list[int]:
        """Nobody is to have it any more; returns who had taken it."""
        return sorted(self._holders.pop(content_hash, set()) | self._unable.pop(content_hash, set()))

    def lose(self, replica_id: int) -> None:
        """A replica is gone, with all that it had taken."""
        self._holders, self._unable = (
            {content: left for content, ids in table.items() if (left := ids - {replica_id})}
            for table in (self._holders, self._unable)
        )

    def unneeded(self, needed: Iterable[str]) -> list[str]:
        """Contents that were taken and are not among those ``needed``."""
        return sorted((self._holders.keys() | self._unable.keys()) - set(needed))
