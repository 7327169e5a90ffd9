"""Queued requests as policies see them."""

from __future__ import annotations

from collections.abc import Iterable

from peft_dist.core.request import Request, RequestStatus
from peft_dist.engine.adapter_manager import AdapterManager
from peft_dist.engine.limits import SchedulerLimits
from peft_dist.policy.batching import Candidate


class Candidates:
    """Makes candidates, and keeps them: from step to step most are the same."""

    def __init__(self, limits: SchedulerLimits, adapters: AdapterManager) -> None:
        self._limits = limits
        self._adapters = adapters
        self._known: dict[str, Candidate] = {}

    def of(self, requests: Iterable[Request]) -> list[Candidate]:
        """One for each request, in their order."""
        known, longest, is_resident = self._known, self._limits.max_model_len, self._adapters.is_resident
        found = []
        for request in requests:
            adapter, num_new = request.adapter, num_runnable(request, longest)
            is_here = adapter is None or is_resident(adapter)
            candidate = known.get(request.request_id)
            if candidate is None or candidate.num_new_tokens != num_new or candidate.is_resident is not is_here:
                candidate = known[request.request_id] = Candidate(
                    request_id=request.request_id,
                    adapter=request.content_hash,
                    arrival_time=request.arrival_time,
                    num_new_tokens=num_new,
                    rank=adapter.num_rank_rows if adapter else 0,
                    is_resident=is_here,
                )
            found.append(candidate)
        return found

    def forget(self, request_id: str) -> None:
        """Another request may have this id from now on."""
        self._known.pop(request_id, None)


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
