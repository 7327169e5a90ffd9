"""Where adapters are and to whom requests go by the rules of dLoRA's artifact (Wu et al., OSDI'24), for comparison.

Written from a description of it. Adapters are placed once, as if all were asked for alike; replicas have as many slots
as that gave them; requests go to the host with the fewest batches before it. What the description leaves open, and is
chosen here: the rotation of extra copies begins with the first adapter, memory is what the placed adapters leave, and
a request that swaps an adapter out takes the place of the first idle one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from peft_dist.placement.placing import Hosts

Extra = Literal["rotating", "common"]
# A full batch of one adapter runs merged, and counts for less than one that does not.
MERGED_BATCH = 0.6
# Bytes a second between host and device.
BUS = 32 * 2**30
# The mean seconds of an adapter's requests before any has ended.
FIRST_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ArtifactSettings:
    """
    Attributes:
        extra: Copies beside one of each adapter, replicas - 1 of them: one more on each replica, another one each time
            ("rotating", the artifact's migration types 1 and 2), or one drawn at random on all ("common", type 3).
        swaps: Whether a request may go to a replica that can put out an idle adapter for its own (type 2).
        seats: Sequences in a batch.
        seed: Of the draw.
    """

    extra: Extra
    swaps: bool = False
    seats: int = 16
    seed: int = 0


class ArtifactTable:
    """Which replica has which adapter, and what was asked of each: the artifact's manager.

    Args:
        sizes: Bytes of each adapter, in the order in which they are placed.
        room: Bytes of each replica for adapters and KV.

    Attributes:
        slots: Adapters that each replica has room for, from the first placement on.
        shares: Of each adapter: an even part, and 1 more for each request that came.
    """

    def __init__(self, sizes: Mapping[str, int], room: Sequence[int], settings: ArtifactSettings) -> None:
        self.settings = settings
        self._sizes = dict(sizes)
        self._room = list(room)
        self._hosts: dict[str, set[int]] = {adapter: set() for adapter in sizes}
        self.shares = {adapter: 1 / len(sizes) for adapter in sizes}
        self._seconds: dict[str, tuple[int, float]] = {}
        self._fill(None)
        self._add_copies()
        self.slots = tuple(max(1, len(self.on(replica))) for replica in range(len(room)))

    def hosts(self, adapter: str) -> frozenset[int]:
        return frozenset(self._hosts.get(adapter, ()))

    def all_hosts(self) -> Hosts:
        return {adapter: frozenset(own) for adapter, own in self._hosts.items()}

    def on(self, replica: int) -> list[str]:
        """Adapters of a replica."""
        return [adapter for adapter, own in self._hosts.items() if replica in own]

    def choose(self, adapter: str, counts: Mapping[int, Mapping[str, int]]) -> int:
        """The replica that a request goes to, of those in ``counts``: their requests by adapter ("" is the base)."""
        if adapter in self.shares:
            self.shares[adapter] += 1
        here = [replica for replica in sorted(counts) if replica in self._hosts.get(adapter, ())]
        if not here:
            return min(sorted(counts), key=lambda replica: sum(counts[replica].values()))
        costs: dict[int, float] = {replica: batches(counts[replica].values(), self.settings.seats) for replica in here}
        idle = self._idle(adapter, counts) if self.settings.swaps else {}
        for replica in idle:
            load = self._sizes[adapter] / BUS
            costs[replica] = batches(counts[replica].values(), self.settings.seats) + load
        best = min(sorted(costs), key=costs.__getitem__)
        if best in idle:
            self._hosts[idle[best]].discard(best)
            self._hosts[adapter].add(best)
        return best

    def _idle(self, adapter: str, counts: Mapping[int, Mapping[str, int]]) -> dict[int, str]:
        """Replicas without an adapter, and what each could put out: what nobody asks it for and others have."""
        found = {}
        for replica, own in counts.items():
            if replica not in self._hosts[adapter]:
                free = (one for one in self.on(replica) if not own.get(one) and len(self._hosts[one]) > 1)
                if (victim := next(free, None)) is not None:
                    found[replica] = victim
        return found

    def ended(self, adapter: str, seconds: float) -> None:
        """A request of an adapter ran for so long."""
        number, total = self._seconds.get(adapter, (0, 0.0))
        self._seconds[adapter] = number + 1, total + seconds

    def seconds(self, adapter: str) -> float:
        """Mean of an adapter's requests that have ended."""
        number, total = self._seconds.get(adapter, (0, 0.0))
        return total / number if number else FIRST_SECONDS

    def rearrange(self, gone: Iterable[tuple[str, int]], come: Iterable[tuple[str, int]]) -> None:
        """Adapters leave replicas and come to others; slots that are free then are filled by what was asked for."""
        for adapter, replica in gone:
            self._hosts[adapter].discard(replica)
        for adapter, replica in come:
            self._hosts[adapter].add(replica)
        self._fill(self.slots)

    def _fill(self, slots: Sequence[int] | None) -> None:
        """Place what has no host, then what has the fewest for its share, while that lowers no burst tolerance."""
        while (adapter := self._next()) is not None:
            number = [len(self.on(replica)) for replica in range(len(self._room))]
            free = [0] * len(number) if slots is None else [s - n for s, n in zip(slots, number, strict=True)]
            order = sorted(range(len(number)), key=lambda r: (-free[r], number[r], r))
            able = [r for r in order if r not in self._hosts[adapter] and (slots is None or free[r] > 0)]
            if not any(self._accepts(adapter, replica) for replica in able):
                return

    def _next(self) -> str | None:
        unplaced = (adapter for adapter, own in self._hosts.items() if not own)
        if (adapter := next(unplaced, None)) is not None:
            return adapter
        copies = sum(map(len, self._hosts.values()))
        asked = sum(self.shares.values())
        lacking = {a: len(own) / copies - self.shares[a] / asked for a, own in self._hosts.items()}
        return min(lacking, key=lacking.__getitem__, default=None)

    def _accepts(self, adapter: str, replica: int) -> bool:
        """Place it there unless the least burst tolerance falls, or there is no room."""
        before = self._tolerance()
        self._hosts[adapter].add(replica)
        if self._left(replica) >= 0 and self._tolerance() >= before:
            return True
        self._hosts[adapter].discard(replica)
        return False

    def _left(self, replica: int) -> float:
        return self._room[replica] - sum(self._sizes[adapter] for adapter in self.on(replica))

    def _tolerance(self) -> float:
        """The least, over adapters, of the memory of its hosts over its share."""
        left = [self._left(replica) for replica in range(len(self._room))]
        return min(sum(left[r] for r in own) / self.shares[adapter] for adapter, own in self._hosts.items())

    def _add_copies(self) -> None:
        """Until there are replicas - 1 more than adapters, tolerance or not."""
        names, replicas = list(self._hosts), range(len(self._room))
        if self.settings.extra == "common":
            if names:
                self._hosts[random.Random(self.settings.seed).choice(names)].update(replicas)
            return
        wanted, start = len(names) + len(replicas) - 1, 0
        for replica in replicas:
            if sum(map(len, self._hosts.values())) >= wanted:
                return
            turn = [*names[start:], *names[:start]]
            if (adapter := next((one for one in turn if replica not in self._hosts[one]), None)) is not None:
                self._hosts[adapter].add(replica)
                start = names.index(adapter) + 1


def batches(counts: Iterable[int], seats: int) -> float:
    """What a replica has before it: full batches of one adapter, which run merged, and batches of the rest."""
    own = list(counts)
    return MERGED_BATCH * sum(count // seats for count in own) + sum(count % seats for count in own) // seats
