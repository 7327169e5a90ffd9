"""What a batching policy sees, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import msgspec

from peft_dist.core.cost_model import StepFeatures

BASE = ""
"""The base model's place among adapters, as in ``Request.content_hash``."""


class Candidate(msgspec.Struct, frozen=True):
    """One unfinished request.

    Attributes:
        request_id: Unique among the unfinished.
        adapter: Content hash of its adapter, "" for the base.
        arrival_time: Seconds.
        num_new_tokens: 1 for a decode, else the prompt (or recomputed) tokens still to compute; 0 when it has nothing
            to run now.
        rank: Rank rows of its adapter, 0 for the base.
        is_resident: Whether its adapter can run in this step.
    """

    request_id: str
    adapter: str
    arrival_time: float
    num_new_tokens: int
    rank: int = 0
    is_resident: bool = True


def _any_adapter(adapter: str) -> bool:
    return True


def _no_adapter(adapter: str) -> bool:
    return False


class QueueState(msgspec.Struct, frozen=True):
    """Everything a policy may decide from.

    Attributes:
        candidates: All unfinished requests, oldest first.
        now: Seconds.
        max_num_seqs: Seats of one step.
        max_num_batched_tokens: Tokens of one step; prompts are cut to what is left.
        max_loras: Distinct adapters, the base not counted, that one batch may read through the LoRA kernel.
        merged_adapter: What the weights hold; None when unmerged.
        mergeable: Whether an adapter can be merged into this base.
        can_host: Whether others may run, corrected, in a batch that it is merged for: one that is too large against the
            base leaves them too few digits.
        holds_merged: Whether a switch to an adapter costs nothing, because its merged weights are still there.
    """

    candidates: Sequence[Candidate]
    now: float
    max_num_seqs: int
    max_num_batched_tokens: int
    max_loras: int
    merged_adapter: str | None = None
    mergeable: Callable[[str], bool] = _any_adapter
    can_host: Callable[[str], bool] = _any_adapter
    holds_merged: Callable[[str], bool] = _no_adapter


class Choice(msgspec.Struct, frozen=True):
    """The next step.

    Attributes:
        merged_adapter: What the weights must hold, None for unmerged; never "" (the base runs on unmerged weights).
        candidates: Who runs, in order of priority, at most one a seat: the scheduler takes them while seats, tokens and
            blocks last, and takes blocks from the last of them, or from requests not named, when they do not.
        reason: Which branch decided.
        urgent: Ids of those who must not be overtaken: they get the blocks of whoever is younger.
        features: Of the step, if it holds the tokens of all; None where the policy has not looked.
    """

    merged_adapter: str | None
    candidates: list[Candidate]
    reason: str
    urgent: frozenset[str] = frozenset()
    features: StepFeatures | None = None


class BatchingPolicy(Protocol):
    """Decides mode and members of every step. ``choose`` and ``ran`` alternate; neither needs the step's result."""

    def choose(self, state: QueueState) -> Choice:
        """The next step; depends on nothing but ``state`` and the calls so far, and changes nothing that counts."""
        ...

    def ran(self, state: QueueState, choice: Choice, scheduled: Collection[str]) -> None:
        """``choice``, the answer to ``state``, was submitted with the requests ``scheduled`` (none: nothing could run).

        Raises ValueError when ``choice`` is not what ``choose`` answered last.
        """
        ...

    def stable_steps(self, seconds: float) -> float:
        """For how many steps after the one that was chosen last the answer is certain to be the same again.

        That is, if ``choose`` is asked every ``seconds``, all that were chosen compute one token each time, and nothing
        but the time changes in the queue. 0 is always right. Asked between ``choose`` and ``repeat``.
        """
        ...

    def repeat(self, scheduled: Collection[str], starts: Sequence[float]) -> None:
        """The last choice was submitted, with the requests ``scheduled``, at each of these times.

        The first is that of ``choose``; the same as ``ran``, and ``choose`` and ``ran`` again for each of the others.
        """
        ...

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests ended, or left for another replica."""
        ...

    def forget_adapter(self, adapter: str) -> None:
        """No request of this adapter is left, nor will come soon: drop what is kept for it."""
        ...

    @property
    def merges(self) -> bool:
        """Whether it merges an adapter as long as that gains time, and runs others with it where it does not."""
        ...

    @property
    def credits(self) -> dict[str, float]:
        """What each adapter is owed; empty for a policy without credits."""
        ...

    def report(self) -> dict[str, float]:
        """Numbers for metrics and the decision log, by name."""
        ...
