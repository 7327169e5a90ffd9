"""When what a replica refused is brought to it again."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

from peft_dist.core.restarts import RestartPolicy
from peft_dist.orchestrator.records import Replica

AGAIN = RestartPolicy(first=5.0, longest=300.0, max_failures=10)
"""Files that are being copied are whole in seconds, those that somebody must mend in minutes: 20 in all."""


@dataclass(slots=True)
class _Retry:
    """``failures`` in a row; ``at``: When to try next, infinity for never or while it is tried."""

    failures: int = 0
    at: float = math.inf


class AdapterRetries:
    """Of each incarnation of a replica, the contents that it refused."""

    def __init__(self) -> None:
        self._by_epoch: dict[int, dict[str, _Retry]] = {}
        # Of what was taken and could not be loaded: failures one soon after another, and when the last one was.
        self._lacks: dict[tuple[int, str], tuple[int, float]] = {}

    def refused(self, replica: Replica, content_hash: str, now: float, *, is_final: bool) -> float | None:
        """A replica refused a content, once more or for the first time. Returns the seconds until it is tried again;
        None for never, as with ``is_final``."""
        retry = self._by_epoch.setdefault(replica.epoch, {}).setdefault(content_hash, _Retry())
        retry.failures += 1
        wait = None if is_final else AGAIN.wait(retry.failures)
        retry.at = math.inf if wait is None else now + wait
        return wait

    def lacked(self, replica: Replica, content_hash: str, now: float) -> float:
        """A replica could not load what it had taken. Returns the seconds until it is to take it anew.

        That it takes it does not say that it can load it, so it is later each time, until it went well for long.
        """
        failures, last = self._lacks.get((replica.epoch, content_hash), (0, -math.inf))
        failures = 1 if now - last > 2 * AGAIN.longest else failures + 1
        self._lacks[replica.epoch, content_hash] = failures, now
        wait = AGAIN.wait(min(failures, AGAIN.max_failures - 1)) or AGAIN.longest
        self._by_epoch.setdefault(replica.epoch, {})[content_hash] = _Retry(failures=1, at=now + wait)
        return wait

    def lose(self, replica: Replica) -> None:
        """A replica is gone."""
        self._by_epoch.pop(replica.epoch, None)
        self._lacks = {key: value for key, value in self._lacks.items() if key[0] != replica.epoch}

    def keep(self, replica: Replica, contents: Container[str]) -> None:
        """Forget all that a replica refused but these."""
        retries = self._by_epoch.pop(replica.epoch, {})
        if left := {content: retry for content, retry in retries.items() if content in contents}:
            self._by_epoch[replica.epoch] = left

    def take_due(self, replica: Replica, now: float) -> list[str]:
        """What is to be tried on a replica by now; each is given out once."""
        due = [content for content, retry in self._of(replica).items() if retry.at <= now]
        for content in due:
            self._by_epoch[replica.epoch][content].at = math.inf
        return due

    def next_at(self, replica: Replica) -> float:
        """When ``take_due`` has something of a replica; infinity for never."""
        return min((retry.at for retry in self._of(replica).values()), default=math.inf)

    @property
    def has_some(self) -> bool:
        """Whether any replica refused something."""
        return bool(self._by_epoch)

    def _of(self, replica: Replica) -> dict[str, _Retry]:
        return self._by_epoch.get(replica.epoch, {})
