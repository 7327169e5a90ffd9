"""Requests that are about alike become one class, so that a plan needs one number for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

from peft_dist.placement.types import MigrationPlan, Move, PlanError, RequestClass, Way

# Requests of one class differ in work by no more than this factor, where the number of classes allows it.
RATIO = 2.0
# A decode step computes one token for a request where a prefill step computes many: about what one costs in the other.
DECODE_WEIGHT = 10.0
# After which all work is in one bucket.
_MAX_WIDENINGS = 6


class RequestLoad(msgspec.Struct, frozen=True):
    """One request, or one sequence of it, as a planner sees it; the fields are those of ``RequestClass``."""

    request_id: str
    replica: int
    adapter: str
    prefill_tokens: int
    decode_tokens: float
    context_tokens: int = 0
    kv_blocks: int = 0
    kv_bytes: int = 0


class RequestMove(msgspec.Struct, frozen=True):
    """One request goes from one replica to another, with its KV or to be computed again."""

    request_id: str
    source: int
    target: int
    way: Way


def expected_tokens(done: int, max_tokens: int, mean: float) -> float:
    """Output tokens that a request still has to draw, if outputs of its adapter have ``mean`` tokens on average.

    Lengths are taken to have no memory (a geometric distribution): who has drawn many is as far from its end as who has
    drawn few, but for ``max_tokens``.
    """
    left = max_tokens - done
    if left <= 0:
        return 0.0
    if mean <= 1:
        return 1.0
    stop = 1.0 / mean
    # Mean of a geometric length cut off at ``left``.
    return float(-math.expm1(left * math.log1p(-stop)) / stop)


class Grouping:
    """Classes of requests that are added one at a time, so that nobody waits while thousands are counted."""

    def __init__(self, max_classes: int = 1500, ratio: float = RATIO) -> None:
        """Where there would be more than ``max_classes``, wider buckets are used."""
        self._max_classes = max_classes
        self._unit = math.log(ratio)
        self._groups: dict[tuple[int, str, bool, int], _Group] = {}

    def add(self, one: RequestLoad) -> None:
        """Put one more request into its class."""
        work = one.prefill_tokens + DECODE_WEIGHT * one.decode_tokens
        key = one.replica, one.adapter, one.context_tokens > 0, math.floor(math.log1p(work) / self._unit)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
        group.add(one)

    def result(self) -> tuple[list[RequestClass], list[list[str]]]:
        """As ``aggregate``."""
        groups, widenings = self._groups, 0
        while len(groups) > self._max_classes and widenings < _MAX_WIDENINGS:
            groups, widenings = _widened(groups), widenings + 1
        classes = [group.as_class(key[0], key[1]) for key, group in groups.items()]
        return classes, [group.members for group in groups.values()]


def aggregate(
    requests: Iterable[RequestLoad], max_classes: int = 1500, ratio: float = RATIO
) -> tuple[list[RequestClass], list[list[str]]]:
    """Classes of requests, and the ids of the members of each in the order given: the first ones are moved first.

    Token counts are the members' means, KV blocks and bytes their maximum, so that no plan promises room that is not
    there. Where there were more than ``max_classes``, wider buckets are used. Requests on different replicas, of
    different adapters, or with and without KV are never in one class.
    """
    grouping = Grouping(max_classes, ratio)
    for one in requests:
        grouping.add(one)
    return grouping.result()


def pick(plan: MigrationPlan, members: Sequence[Sequence[str]]) -> list[RequestMove]:
    """The requests that a plan moves, each at most once. Raises PlanError when a class has fewer members than moves."""
    used = [0] * len(members)
    found = []
    for move in plan.moves:
        start = used[move.index]
        chosen = members[move.index][start : start + move.count]
        if len(chosen) < move.count:
            raise PlanError(f"class {move.index} has {len(members[move.index])} members, and more of them would move")
        used[move.index] += move.count
        found += [_moved(request_id, move) for request_id in chosen]
    return found


def _moved(request_id: str, move: Move) -> RequestMove:
    return RequestMove(request_id, move.source, move.target, move.way)


class _Group:
    """Members of one class, and the sums of their figures."""

    __slots__ = ("context", "decode", "kv_blocks", "kv_bytes", "members", "prefill")

    def __init__(self) -> None:
        self.members: list[str] = []
        self.prefill = self.context = self.kv_blocks = self.kv_bytes = 0
        self.decode = 0.0

    def add(self, one: RequestLoad) -> None:
        self.members.append(one.request_id)
        self.prefill += one.prefill_tokens
        self.decode += one.decode_tokens
        self.context += one.context_tokens
        self.kv_blocks = max(self.kv_blocks, one.kv_blocks)
        self.kv_bytes = max(self.kv_bytes, one.kv_bytes)

    def take_in(self, other: _Group) -> None:
        self.members = self.members + other.members
        self.prefill += other.prefill
        self.decode += other.decode
        self.context += other.context
        self.kv_blocks = max(self.kv_blocks, other.kv_blocks)
        self.kv_bytes = max(self.kv_bytes, other.kv_bytes)

    def as_class(self, source: int, adapter: str) -> RequestClass:
        count = len(self.members)
        return RequestClass(
            source=source,
            adapter=adapter,
            count=count,
            prefill_tokens=self.prefill / count,
            decode_tokens=self.decode / count,
            context_tokens=self.context / count,
            kv_blocks=self.kv_blocks,
            kv_bytes=self.kv_bytes,
        )


def _widened(groups: dict[tuple[int, str, bool, int], _Group]) -> dict[tuple[int, str, bool, int], _Group]:
    """Two neighbouring buckets are one: what a class spans in work is squared."""
    wider: dict[tuple[int, str, bool, int], _Group] = {}
    for (replica, adapter, has_kv, bucket), group in groups.items():
        wider.setdefault((replica, adapter, has_kv, bucket // 2), _Group()).take_in(group)
    return wider
