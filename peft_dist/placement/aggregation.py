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


def aggregate(
    requests: Iterable[RequestLoad], max_classes: int = 1500, ratio: float = RATIO
) -> tuple[list[RequestClass], list[list[str]]]:
    """Classes of requests, and the ids of the members of each in the order given: the first ones are moved first.

    Token counts are the members' means, KV blocks and bytes their maximum, so that no plan promises room that is not
    there. Where there were more than ``max_classes``, wider buckets are used; requests on different replicas, of
    different adapters, or with and without KV are never in one class.
    """
    requests = list(requests)
    groups = _groups(requests, ratio)
    while len(groups) > max_classes and ratio < 1e6:
        ratio *= ratio
        groups = _groups(requests, ratio)
    classes = [_class(members) for members in groups]
    return classes, [[one.request_id for one in members] for members in groups]


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


def _groups(requests: list[RequestLoad], ratio: float) -> list[list[RequestLoad]]:
    groups: dict[tuple[object, ...], list[RequestLoad]] = {}
    unit = math.log(ratio)
    for one in requests:
        work = one.prefill_tokens + DECODE_WEIGHT * one.decode_tokens
        bucket = math.floor(math.log1p(work) / unit)
        groups.setdefault((one.replica, one.adapter, one.context_tokens > 0, bucket), []).append(one)
    return list(groups.values())


def _class(members: list[RequestLoad]) -> RequestClass:
    first, count = members[0], len(members)
    return RequestClass(
        source=first.replica,
        adapter=first.adapter,
        count=count,
        prefill_tokens=sum(one.prefill_tokens for one in members) / count,
        decode_tokens=sum(one.decode_tokens for one in members) / count,
        context_tokens=sum(one.context_tokens for one in members) / count,
        kv_blocks=max(one.kv_blocks for one in members),
        kv_bytes=max(one.kv_bytes for one in members),
    )
