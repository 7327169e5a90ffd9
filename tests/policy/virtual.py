"""One replica in virtual time: a policy, a true cost model, and requests with known lengths. No clock, no threads."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from peft_dist.core.cost_model import CostModel, StepFeatures
from peft_dist.policy.batching import BatchingPolicy, Candidate, Choice, QueueState


@dataclass(frozen=True, slots=True)
class Job:
    """A request to come: times in seconds, lengths in tokens."""

    request_id: str
    adapter: str
    arrival_time: float
    prompt_tokens: int
    output_tokens: int
    rank: int = 16


@dataclass(slots=True)
class Progress:
    job: Job
    computed: int = 0
    outputs: int = 0
    candidate: Candidate = field(init=False)

    def __post_init__(self) -> None:
        self.candidate = self._candidate()

    def advance(self, tokens: int) -> bool:
        """Whether the request ends with this step."""
        self.computed += tokens
        if self.computed >= self.job.prompt_tokens + self.outputs:
            self.outputs += 1
        self.candidate = self._candidate()
        return self.outputs >= self.job.output_tokens

    def _candidate(self) -> Candidate:
        job = self.job
        new = max(1, job.prompt_tokens + self.outputs - self.computed)
        return Candidate(job.request_id, job.adapter, job.arrival_time, new, job.rank)


@dataclass(frozen=True, slots=True)
class Step:
    start: float
    seconds: float
    switch: float
    choice: Choice
    scheduled: dict[str, int]
    waiting: list[str]


@dataclass(slots=True)
class History:
    steps: list[Step] = field(default_factory=list)
    finished: dict[str, float] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)

    @property
    def seconds_per_token(self) -> list[float]:
        return [(self.finished[j.request_id] - j.arrival_time) / j.output_tokens for j in self.jobs]

    @property
    def mean(self) -> float:
        values = self.seconds_per_token
        return sum(values) / len(values)

    @property
    def num_switches(self) -> int:
        return sum(step.switch > 0 for step in self.steps)

    def share(self, reason: str) -> float:
        return sum(step.choice.reason == reason for step in self.steps) / len(self.steps)

    def longest_gap(self) -> float:
        """Longest time for which a request was overtaken without running, by the driver's own books."""
        overtaken: dict[str, float] = {}
        longest = 0.0
        for index, step in enumerate(self.steps):
            end = self.steps[index + 1].start if index + 1 < len(self.steps) else step.start + step.seconds
            youngest = max((step.waiting.index(i) for i in step.scheduled), default=-1)
            for position, request_id in enumerate(step.waiting):
                if request_id in step.scheduled:
                    overtaken.pop(request_id, None)
                elif position < youngest:
                    overtaken[request_id] = overtaken.get(request_id, 0.0) + end - step.start
                    longest = max(longest, overtaken[request_id])
        return longest


@dataclass(slots=True)
class Replica:
    """Runs a policy's choices. With ``depth`` 1 each step is chosen when the one before it starts."""

    policy: BatchingPolicy
    truth: CostModel
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 4096
    max_loras: int = 64
    depth: int = 0
    mergeable: Callable[[str], bool] = lambda adapter: True
    can_host: Callable[[str], bool] = lambda adapter: True
    learner: CostModel | None = None

    def run(self, jobs: Sequence[Job], max_steps: int = 1_000_000) -> History:
        jobs = sorted(jobs, key=lambda job: (job.arrival_time, job.request_id))
        history = History(jobs=list(jobs))
        queue: list[Progress] = []
        arrived, free, decided, merged = 0, 0.0, 0.0, None
        while arrived < len(jobs) or queue:
            assert len(history.steps) < max_steps, "requests are left over"
            if not queue:
                free = decided = max(free, jobs[arrived].arrival_time)
            while arrived < len(jobs) and jobs[arrived].arrival_time <= decided:
                queue.append(Progress(jobs[arrived]))
                arrived += 1
            state = self._state(queue, decided, merged)
            choice = self.policy.choose(state)
            self._check(state, choice)
            scheduled = self._schedule(choice)
            self.policy.ran(state, choice, scheduled)
            assert scheduled, "a step without requests"
            seconds, switch = self._seconds(state, choice, scheduled)
            history.steps.append(Step(free, seconds, switch, choice, scheduled, [p.job.request_id for p in queue]))
            merged = choice.merged_adapter
            start, free = free, free + seconds
            decided = start if self.depth else free
            decided = max(decided, state.now)
            took_part = [p for p in queue if scheduled.get(p.job.request_id)]
            for progress in [p for p in took_part if p.advance(scheduled[p.job.request_id])]:
                queue.remove(progress)
                history.finished[progress.job.request_id] = free
                self.policy.forget([progress.job.request_id])
                if all(p.job.adapter != progress.job.adapter for p in queue):
                    self.policy.forget_adapter(progress.job.adapter)
        return history

    def _state(self, queue: list[Progress], now: float, merged: str | None) -> QueueState:
        return QueueState(
            candidates=[p.candidate for p in queue],
            now=now,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_loras=self.max_loras,
            merged_adapter=merged,
            mergeable=self.mergeable,
            can_host=self.can_host,
        )

    def _check(self, state: QueueState, choice: Choice) -> None:
        ids = [c.request_id for c in choice.candidates]
        known = {c.request_id for c in state.candidates}
        assert len(ids) == len(set(ids)) <= self.max_num_seqs and set(ids) <= known
        merged = choice.merged_adapter
        assert merged != "" and (merged is None or self.mergeable(merged))
        others = {c.adapter for c in choice.candidates} - {"", merged}
        # A correction reads the merged adapter's rows too.
        corrected = merged is not None and any(c.adapter != merged for c in choice.candidates)
        assert len(others) + corrected <= self.max_loras
        assert not corrected or self.can_host(str(merged))

    def _schedule(self, choice: Choice) -> dict[str, int]:
        tokens, scheduled = self.max_num_batched_tokens, {}
        for candidate in choice.candidates:
            num_tokens = min(candidate.num_new_tokens, tokens)
            if num_tokens:
                scheduled[candidate.request_id] = num_tokens
                tokens -= num_tokens
        return scheduled

    def _seconds(self, state: QueueState, choice: Choice, scheduled: dict[str, int]) -> tuple[float, float]:
        rows = [(c.adapter, scheduled[c.request_id], c.rank) for c in choice.candidates if c.request_id in scheduled]
        rank = max((r for a, _, r in rows if a == choice.merged_adapter), default=0)
        features = StepFeatures.of(rows, choice.merged_adapter, rank)
        step = self.truth.step_seconds(features)
        switch = self.truth.switch_seconds(state.merged_adapter, choice.merged_adapter, rank)
        if self.learner is not None:
            self.learner.observe_step(features, step)
            if switch:
                self.learner.observe_switch("merge" if choice.merged_adapter else "unmerge", switch, rank)
        return step + switch, switch


def poisson_jobs(
    seed: int,
    seconds: float,
    rate: float,
    num_adapters: int,
    hot_share: float,
    *,
    mean_output: float = 64.0,
    prompt_tokens: int = 32,
    rank: int = 16,
    with_base: bool = False,
) -> list[Job]:
    """Poisson arrivals at ``rate`` requests a second, with geometric output lengths.

    The share ``hot_share`` goes to the first adapter, the rest evenly to the others. The same seed gives the same
    arrivals and lengths at any share.
    """
    rng = random.Random(seed)
    jobs: list[Job] = []
    now = rng.expovariate(rate)
    while now < seconds:
        draw, which, length = rng.random(), rng.randrange(max(1, num_adapters - 1)), rng.expovariate(1 / mean_output)
        index = 0 if draw < hot_share or num_adapters == 1 else 1 + which
        adapter = "" if with_base and index == num_adapters - 1 else f"adapter-{index:04d}"
        jobs.append(Job(f"r{len(jobs):06d}", adapter, now, prompt_tokens, 1 + int(length), rank if adapter else 0))
        now += rng.expovariate(rate)
    return jobs
