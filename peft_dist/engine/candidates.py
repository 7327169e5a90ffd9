"""Queued requests as policies see them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from peft_dist.core.request import Request, RequestStatus
from peft_dist.engine.adapter_manager import AdapterManager
from peft_dist.engine.limits import SchedulerLimits
from peft_dist.policy.batching import Candidate


class Candidates:
    """Makes candidates, and keeps them: from step to step most are the same.

    The list is the same object while nothing in it changes, and no list is ever changed.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._known: dict[str, Candidate] = {}
        self._list: list[Candidate] | None = None
        self._version = 0
        # Steps after which somebody who decodes can draw no more; and whether somebody cannot before a step in flight
        # has ended.
        self._left = 0
        self._has_late = False
        # Whether all adapters are on the device.
        self._are_here = False

    def of(self, requests: Iterable[Request], adapters: AdapterManager) -> list[Candidate]:
        """One for each request, in their order."""
        if self._list is None or self._version != adapters.version:
            # Written out: it is asked of every request whenever one has come or gone.
            known, longest, on_device = self._known, self._limits.max_model_len, adapters.on_device
            found: list[Candidate] = []
            self._list, self._version, self._has_late, self._are_here = found, adapters.version, False, True
            left = longest
            for request in requests:
                adapter = request.adapter
                num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
                num_new = num_tokens - request.num_computed_tokens
                if request.num_in_flight:
                    num_new = num_runnable(request, longest)
                    self._has_late |= not num_new
                if num_new == 1:
                    pending = request.num_in_flight
                    num_drawn = len(request.output_token_ids) + pending
                    left = min(left, request.max_output_tokens - num_drawn, longest - num_tokens - pending)
                is_here = adapter is None or adapter.content_hash in on_device
                self._are_here &= is_here
                candidate = known.get(request.request_id)
                if candidate is None or candidate.num_new_tokens != num_new or candidate.is_resident is not is_here:
                    candidate = known[request.request_id] = _candidate(request, num_new, is_here)
                found.append(candidate)
            self._left = left
        return self._list

    def are_here(self, adapters: AdapterManager) -> bool:
        """Whether their adapters are all known to be on the device."""
        return self._are_here and self._list is not None and self._version == adapters.version

    def look_again(self) -> None:
        """Anything may have changed."""
        self._list = None

    def stepped(self, *, goes_on: bool) -> None:
        """A step took some of them. ``goes_on``: All of these were decoding before."""
        self._left -= 1
        if not goes_on or self._has_late or self._left <= 0:
            self._list = None

    def add(self, request: Request, adapters: AdapterManager) -> None:
        """A request has come, the youngest of all, with no step in flight."""
        if request.status is RequestStatus.RUNNING:
            self._list = None  # It may have few tokens left.
        if self._list is not None:
            is_here = request.adapter is None or request.adapter.content_hash in adapters.on_device
            candidate = _candidate(request, num_runnable(request, self._limits.max_model_len), is_here)
            self._known[request.request_id] = candidate
            self._list = [*self._list, candidate]
            self._are_here &= is_here

    def decode(self, request_ids: Collection[str]) -> None:
        """The prompts of these have been computed, and nothing else has changed."""
        if self._list is None or not request_ids:
            return
        for request_id in request_ids:
            one = self._known[request_id]
            self._known[request_id] = Candidate(request_id, one.adapter, one.arrival_time, 1, one.rank, True)
        known = self._known
        self._list = [known[one.request_id] if one.request_id in request_ids else one for one in self._list]

    def forget(self, request_id: str) -> None:
        """Another request may have this id from now on."""
        if self._known.pop(request_id, None) is not None and self._list is not None:
            self._list = [one for one in self._list if one.request_id != request_id]


def _candidate(request: Request, num_new: int, is_here: bool) -> Candidate:
    adapter = request.adapter
    rank = adapter.num_rank_rows if adapter else 0
    return Candidate(request.request_id, request.content_hash, request.arrival_time, num_new, rank, is_here)


def num_runnable(request: Request, max_model_len: int) -> int:
    """Tokens whose KV is still to be computed and worth it."""
    num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids) + request.num_in_flight
    if request.num_in_flight:
        # Without blocks it has to wait: what it drew must be known to be computed again.
        if request.status is not RequestStatus.RUNNING:
            return 0
        if num_tokens >= max_model_len or request.num_output_tokens >= request.max_output_tokens:
            return 0
    return num_tokens - request.num_computed_tokens
