"""To which replica a request goes: where it and those already there are expected to end soonest (dLoRA, OSDI'24).

The paper estimates with the mean time of an adapter's requests; this does with the replica's own measured costs, what
is left of everything that was sent to it, whether it holds the adapter on its device, and how much of the prompt it
has computed before. A replica that has one adapter's requests alone runs them merged, and no longer once another's
comes: the seconds that this costs them count as if they were the request's own (dLoRA counts full batches of one
adapter at their merged speed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import msgspec

from peft_dist.core.step_costs import StepCosts
from peft_dist.policy.merging import own_slowdown, slowdown


class Work(msgspec.Struct, frozen=True):
    """What a request asks of a replica.

    Attributes:
        num_sequences: Sequences drawn from one prompt.
        prompt_tokens: Tokens whose KV is to be computed.
        output_tokens: Tokens that are expected to be drawn for each sequence.
        adapter: Content hash, "" for the base.
        rank_rows, num_bytes: Of the adapter.
    """

    num_sequences: int
    prompt_tokens: int
    output_tokens: float
    adapter: str = ""
    rank_rows: int = 0
    num_bytes: int = 0


class Outlook(NamedTuple):
    """What a replica's steps are once it has a request more.

    Attributes:
        step: Seconds of an unmerged one of so many sequences of each kind, in proportion.
        saved: What merging saves of them, if the adapter had the replica for itself.
        queue, own: What is left of the steps for which a queue waits, and of those of the request, once merged: a part.
        change: How much larger that part is for the others than without the request.
        wait: For how many steps each of them waits besides its own, as a multiple of these: half a queue.
    """

    step: float
    saved: float = 0.0
    queue: float = 1.0
    own: float = 1.0
    change: float = 0.0
    wait: float = 1.0


# Whatever a quotient is rounded to.
CERTAINLY = 1.0 + 1e-9
# Of a second, by which replicas are compared.
DIGITS = 9


@dataclass(slots=True)
class Backlog:
    """What is left of the work that was sent to one replica; kept up to date by who sends it.

    Attributes:
        num_sequences: Unfinished sequences, running or waiting.
        prefill_tokens: Prompt tokens of those that have drawn nothing yet.
        output_tokens: Tokens that all of them are expected to draw.
        adapters: Unfinished sequences and rank rows of each adapter, without the base.
        refresh: Brings ``output_tokens`` up to date, where somebody is late with it; to be called before it is read.
        costs, outlooks: What ``outlook`` has answered, by ``key``, with these costs.
    """

    num_sequences: int = 0
    prefill_tokens: int = 0
    output_tokens: float = 0.0
    adapters: dict[str, tuple[int, int]] = field(default_factory=dict)
    refresh: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    costs: StepCosts | None = field(default=None, repr=False, compare=False)
    outlooks: dict[tuple[object, ...], Outlook] = field(default_factory=dict, repr=False, compare=False)
    _leading: int | None = field(default=None, repr=False, compare=False)
    # Sequences with an adapter, rank rows of all adapters, and of all sequences; None: not counted yet.
    _sums: tuple[int, int, int] | None = field(default=None, repr=False, compare=False)

    @property
    def leading(self) -> int:
        """Sequences of the adapter that has most."""
        if self._leading is None:
            self._leading = max([number for number, _ in self.adapters.values()], default=0)
        return self._leading

    @property
    def tokens_left(self) -> float:
        """``output_tokens``, up to date."""
        if self.refresh is not None:
            self.refresh()
        return self.output_tokens

    def outlook(self, work: Work, costs: StepCosts, slots: int) -> Outlook:
        """What comes of sending a request here; ``slots``: Sequences that run at once."""
        before = self.adapters.get(work.adapter) if work.adapter else None
        if costs is not self.costs:
            self.outlooks.clear()
            self.costs = costs
        key = self.key(work, slots, before)
        known = self.outlooks.get(key)
        if known is None:
            known = self.outlooks[key] = self._outlook(work, costs, slots)
        return known

    def _outlook(self, work: Work, costs: StepCosts, slots: int) -> Outlook:
        same, num_adapters = 0, len(self.adapters)
        sums = self._sums = self._sums or self._counted()
        if work.adapter:
            known = self.adapters.get(work.adapter)
            same = (known[0] if known else 0) + work.num_sequences
            num_adapters += known is None
            sums = _changed(sums, known, (same, work.rank_rows))
        return _outlook(costs, self.num_sequences, work.num_sequences, num_adapters, sums, self.leading, same, slots)

    def _counted(self) -> tuple[int, int, int]:
        sums = 0, 0, 0
        for entry in self.adapters.values():
            sums = _changed(sums, None, entry)
        return sums

    @staticmethod
    def key(work: Work, slots: int, before: tuple[int, int] | None) -> tuple[object, ...]:
        """Of a request, as far as ``outlook`` depends on it; ``before``: What is there of its adapter."""
        return before, work.rank_rows if work.adapter else -1, work.num_sequences, slots

    def count(self, adapter: str, rank_rows: int, change: int) -> None:
        """Note that ``change`` sequences came (or went, if it is negative)."""
        self.num_sequences += change
        self.outlooks.clear()
        self._leading = None
        if not adapter:
            return
        before = self.adapters.get(adapter)
        entry = (before[0] if before else 0) + change, rank_rows
        if entry[0]:
            self.adapters[adapter] = entry
        else:
            entry = 0, 0
            self.adapters.pop(adapter, None)
        if self._sums is not None:
            self._sums = _changed(self._sums, before, entry)


@lru_cache(maxsize=1 << 14)
def _outlook(
    costs: StepCosts,
    before: int,
    num_new: int,
    num_adapters: int,
    sums: tuple[int, int, int],
    leading_before: int,
    same: int,
    slots: int,
) -> Outlook:
    """Where ``num_new`` sequences come to ``before`` others, and there are ``same`` of their adapter then.

    ``num_adapters`` and ``sums`` are of all, ``leading_before`` of the others. Replicas are alike more often than not.
    """
    total, (rows, rank_rows, products) = before + num_new, sums
    step = costs.counted_seconds(total, rows, num_adapters, rank_rows, products, min(1.0, slots / total))
    if costs.switch is None:
        return Outlook(step)
    ratio, leading = costs.merged_ratio(min(total, slots), step), max(leading_before, same)
    now = slowdown(leading, total, slots, ratio)
    own = own_slowdown(leading, total, ratio, leads=same == leading)
    change = now - slowdown(leading_before, before, slots, ratio) if before else 0.0
    return Outlook(step, (1.0 - ratio) * step, now, own, change, max(1.0, total / (2 * slots)))


def _changed(
    sums: tuple[int, int, int], before: tuple[int, int] | None, entry: tuple[int, int]
) -> tuple[int, int, int]:
    """Sums over sequences and rank rows of adapters where one of them has changed."""
    number, rank = entry
    rows, rank_rows, products = sums[0] + number, sums[1] + rank, sums[2] + number * rank
    if before is not None:
        number, rank = before
        return rows - number, rank_rows - rank, products - number * rank
    return rows, rank_rows, products


class Target(msgspec.Struct):
    """A replica that could take the request.

    ``resident`` are the adapters on its device, ``on_host`` those in its host memory; ``max_num_seqs`` and
    ``capacity_tokens`` bound what runs at once: the rest waits. ``cached_tokens`` of the prompt are expected in
    its prefix cache. ``pause``: Seconds for which it is likely to compile or capture before it computes.
    """

    replica_id: int
    costs: StepCosts
    backlog: Backlog
    resident: Set[str]
    max_num_seqs: int
    capacity_tokens: int
    on_host: Set[str] = frozenset()
    cached_tokens: int = 0
    pause: float = 0.0


class Estimates:
    """Seconds until the last token of one request, by where it is sent. Cheap: it is asked of every replica."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._size = max(work.prompt_tokens + work.output_tokens, 1.0)
        # Those that merging lasts, if the adapter had the replica for itself.
        self._steps = max(work.output_tokens, 1.0)
        # With so many slots, the key of what has no request of its adapter.
        self._slots = -1
        self._key: tuple[object, ...] = ()
        # Of the prompt on an idle replica with these costs, of bringing the adapter to its device, and of merging it.
        self._costs: StepCosts | None = None
        self._prefill = self._from_host = self._from_disk = self._switch = 0.0

    def finish_seconds(self, target: Target) -> float:
        """If it is sent there now, and nothing is merged there."""
        return self.total_seconds(target, merges=False)

    def total_seconds(self, target: Target, *, merges: bool = True) -> float:
        """If it is sent there now; with what it adds to the seconds of all others there, where it keeps their adapter
        from being merged, or lets it be merged for more."""
        return self.all_seconds((target,), merges=merges)[0]

    def all_seconds(self, targets: Sequence[Target], *, merges: bool = True) -> list[float]:
        """``total_seconds`` of each."""
        found = []
        work, size, key, key_slots = self._work, self._size, self._key, self._slots
        adapter, output_tokens, num_sequences = work.adapter, work.output_tokens, work.num_sequences
        for target in targets:
            backlog, costs = target.backlog, target.costs
            if costs is not self._costs:
                self._use(costs)
            slots = target.max_num_seqs
            # Where all slots are sure to fit in, the division need not be made.
            if target.capacity_tokens < CERTAINLY * slots * size:
                slots = max(1, min(slots, int(target.capacity_tokens / size)))
            # Most have no other request of its adapter.
            outlook = None
            if slots == key_slots and costs is backlog.costs and adapter not in backlog.adapters:
                outlook = backlog.outlooks.get(key)
            if outlook is None:
                outlook = backlog.outlook(work, costs, slots)
                self._slots, self._key = key_slots, key = slots, backlog.key(work, slots, None)
            step, saved, queue, own, change, wait = outlook
            ahead = output_tokens
            is_queue = backlog.num_sequences + num_sequences > slots
            if own == 1.0 and not change and not is_queue:
                pass  # With merging and without it is the same.
            elif merges and saved * self._steps > self._switch:
                ahead = ahead * own + (backlog.tokens_left * change * wait if change else 0.0)
                if is_queue:
                    ahead += backlog.tokens_left / slots * queue
            elif is_queue:
                ahead += backlog.tokens_left / slots
            if not adapter or adapter in target.resident:
                load = 0.0
            else:
                load = self._from_host if adapter in target.on_host else self._from_disk
            prefill = self._prefill
            if target.cached_tokens or backlog.prefill_tokens:
                prompt = max(work.prompt_tokens - target.cached_tokens, 0)
                prefill = costs.prefill_seconds(backlog.prefill_tokens + prompt)
            found.append(load + prefill + ahead * step + target.pause)
        return found

    def _use(self, costs: StepCosts) -> None:
        work = self._work
        self._costs, self._prefill = costs, costs.prefill_seconds(work.prompt_tokens)
        self._from_host = costs.load_seconds(work.num_bytes, on_host=True)
        self._from_disk = costs.load_seconds(work.num_bytes, on_host=False)
        self._switch = costs.switch_seconds(work.rank_rows)


def choose(work: Work, targets: Sequence[Target]) -> int:
    """The replica with the least ``Estimates.total_seconds``; of equals the one with fewer sequences, then the first.

    ``targets`` must not be empty."""
    best, least, limit = targets[0], math.inf, math.inf
    seconds = before = math.inf
    for target, exact in zip(targets, Estimates(work).all_seconds(targets), strict=True):
        if exact > limit:
            continue
        if exact != before:
            # Sums of floats depend on their order in the last bits; equals must be equals.
            seconds, before = round(exact, DIGITS), exact
        is_equal = seconds == least and target.backlog.num_sequences < best.backlog.num_sequences
        if seconds < least or is_equal:
            # What is above the limit is rounded to more than the least.
            best, least, limit = target, seconds, seconds * CERTAINLY + 1e-8
    return best.replica_id
