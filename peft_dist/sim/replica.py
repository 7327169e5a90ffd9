"""A replica in virtual time: what a worker does, without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import msgspec

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig, ModelInfo
from peft_dist.core.cost_model import CostModel
from peft_dist.core.messages import (
    AdapterResult,
    AnyCommand,
    AnyReport,
    LoadAdapter,
    Progress,
    Ready,
    ReplicaStats,
    SequenceProgress,
    UnloadAdapter,
)
from peft_dist.engine.assembly import assemble
from peft_dist.engine.driver import EngineDriver
from peft_dist.engine.handovers import Handovers
from peft_dist.sim.equal_run import EqualRun
from peft_dist.sim.events import OUTSIDE, Action, EventQueue
from peft_dist.sim.executor import SimExecutor
from peft_dist.sim.unread import EqualReports

# A round of a loop whose engine finds nothing to do.
_IDLE_ROUND = 1e-4


@dataclass(frozen=True)
class SimHardware:
    """What a simulated replica is made of.

    Attributes:
        config: As for a real one; sizes that a real one measures are below.
        truth: Seconds of everything it does.
        prior: What its engine believes before it has measured anything.
        num_blocks: Of KV memory, ``block_bytes`` each.
        num_held: Merged copies beside the base's weights.
        host_seconds: That scheduling and reporting add to a step where none is in flight.
        can_merge: Whether any adapter can be.
        held: Contents whose merged copies are there from the start.
        prompt_sizes, decode_sizes, context_token, context, loads_at_once: As of ``CostProfile``.
    """

    config: EngineConfig
    truth: CostModel
    prior: Callable[[], CostModel]
    num_blocks: int
    block_bytes: int
    num_held: int = 0
    host_seconds: float = 0.0
    can_merge: bool = True
    held: tuple[str, ...] = ()
    prompt_sizes: tuple[int, ...] = ()
    decode_sizes: tuple[int, ...] = ()
    context_token: float = 0.0
    context: float = 0.0
    loads_at_once: int = 0

    def model(self) -> ModelInfo:
        """What such a replica says of its model."""
        return self._model

    @cached_property
    def _model(self) -> ModelInfo:
        config = self.config
        return ModelInfo(
            model=config.model,
            served_model_name=config.served_model_name or config.model,
            max_model_len=config.max_model_len or self.num_blocks * config.block_size,
            vocab_size=1 << 31,
            eos_token_ids=(),
            num_blocks=self.num_blocks,
            num_host_blocks=config.num_host_blocks,
            block_size=config.block_size,
            block_bytes=self.block_bytes,
            device="simulated",
            dtype="simulated",
            depth=config.depth or 0,
            attention_backend="simulated",
            lora_backend="simulated",
            max_loras=config.max_loras,
        )


class SimReplica:
    """Takes commands when they arrive, and reports when its steps end.

    With ``advance``, decode steps that are certain to be alike are one event, which a command that comes meanwhile cuts
    short: the engine takes those that began before it, and is where it would be had they been taken one by one.
    """

    def __init__(
        self,
        hardware: SimHardware,
        queue: EventQueue,
        report: Callable[[list[AnyReport]], None],
        find_adapter: Callable[[LoadAdapter], AdapterSpec],
        lane: int = 0,
        equal: Callable[[EqualReports], None] | None = None,
        *,
        advance: bool = True,
    ) -> None:
        """
        Args:
            report: Told at the end of each round.
            find_adapter: What is at the path of a load.
            lane: Of its events.
            equal: Told of reports, also of those to come, that say nothing new; None: all are ``report``'s.
            advance: Take steps by the short way, many at once where they are equal.
        """
        self._queue = queue
        self._lane = lane
        self._report = report
        self._equal = equal
        self._advance = advance and equal is not None
        # Who is told of at the end of the round with nothing but one more token.
        self._plain: list[str] = []
        self._plain_stats: ReplicaStats | None = None
        # Of which its stats were told last.
        self._told_version = 0
        self._find = find_adapter
        self._host_seconds = hardware.host_seconds
        self._commands: list[AnyCommand] = []
        self._reports: list[AnyReport] = []
        self._is_running = False
        self._now = queue.now
        info = hardware.model()
        self.executor = SimExecutor(
            hardware.truth,
            self._clock,
            hardware.block_bytes,
            hardware.num_held,
            can_merge=hardware.can_merge,
            held=hardware.held,
            prompt_sizes=hardware.prompt_sizes,
            decode_sizes=hardware.decode_sizes,
            context_token=hardware.context_token,
            context=hardware.context,
            loads_at_once=hardware.loads_at_once,
        )
        self.engine = assemble(hardware.config, info, self.executor, hardware.prior(), page_rows=1, num_rows=None)
        # What is still learnt of costs is told when it is due.
        may_detail = self._is_news if self.engine.cost.fixed else None
        handovers = Handovers(self.engine)
        self._driver = EngineDriver(self.engine, handovers, self._reports.append, self._clock, may_detail)
        self.run = EqualRun(self.engine, self.executor, self._host_seconds, _IDLE_ROUND)
        self._reports.append(Ready(model=info, pid=0))
        self._wake()

    def take(self, command: AnyCommand) -> None:
        """A command arrives now."""
        self._commands.append(command)
        if not self.run.is_on:
            self._wake()
        elif self.run.cut(self._queue.now):
            self._await_run()

    @property
    def now(self) -> float:
        """The time by which its engine goes: when its last step began."""
        return self._now

    def _clock(self) -> float:
        return self._now

    def _at(self, time: float, action: Action) -> None:
        self._queue.at(time, action, self._lane)

    def _wake(self) -> None:
        if not self._is_running:
            self._is_running = True
            self._queue.at(self._queue.now, self._round, OUTSIDE + 1 + self._lane)

    def _round(self) -> None:
        began = self._now = self._queue.now
        commands, self._commands = self._commands, []
        for command in commands:
            self._handle(command)
        if self._advance and not self._reports and not self.executor.is_copying:
            reports = self.run.begin(began, self._driver.plain_until, self._driver.num_taken, self._told_version)
            if reports is not None:
                self._say(reports)
                self._await_run()
                return
        self.executor.collected_at = began
        self._driver.step(report=bool(commands))
        # With a step in flight, scheduling the next one takes no time of the device's.
        host = 0.0 if self.engine.depth else self._host_seconds
        self._sort()
        self._at(max(self.executor.collected_at + host, began + _IDLE_ROUND), self._end_round)

    def _is_news(self, progress: list[SequenceProgress]) -> bool:
        """Whether a report of this is no plain one."""
        return not progress or self.engine.residency_version != self._told_version or self.run.has_news(progress)

    def _say(self, reports: EqualReports) -> None:
        if self._equal is not None and reports.sequence_ids and reports.times:
            self._equal(reports)

    def _sort(self) -> None:
        """Part what is new in the reports of this round from what is one more token of the same sequences."""
        self._plain = []
        for index, report in enumerate(self._reports):
            if not isinstance(report, Progress):
                continue
            if self._equal is None:
                self.run.told(report.sequences)
                continue
            assert not self._plain, "a round has one step"
            self._plain, rest = self.run.parted(report.sequences)
            self.run.told(rest)
            is_news = rest or report.detail is not None or self.engine.residency_version != self._told_version
            self._told_version = self.engine.residency_version
            if self._plain and not is_news:
                self._plain_stats = report.stats
                del self._reports[index]
                break
            if self._plain:
                self._reports[index] = msgspec.structs.replace(report, sequences=rest)
            self._plain_stats = None

    def _await_run(self) -> None:
        self._at(self.run.ends_at, partial(self._end_run, self.run.number))

    def _end_run(self, number: int) -> None:
        if number == self.run.number:
            told = self.run.end()
            self._now = self.run.starts[-1]
            if told is None:
                self._driver.stepped(self.run.starts)
            else:
                self._driver.tell(told[0], self.run.starts)
                self.run.told(told[0])
                self._told_version = self.engine.residency_version
                self._say(told[1])
            self._end_round()

    def _end_round(self) -> None:
        if self._plain:
            plain, self._plain, stats = self._plain, [], self._plain_stats
            after = None if stats is None else lambda count, stats=stats: stats
            self._say(EqualReports(plain, [self._queue.now], after, self._driver.num_taken))
        if self._reports:
            reports, self._reports[:] = self._reports[:], []
            self._report(reports)
        self._is_running = False
        if self._commands or not self._driver.is_idle:
            self._wake()
            return
        if (end := self.executor.next_end()) is not None:
            self._at(end, self._wake)
        self._now = self._queue.now
        if (wait := self._driver.timeout_ms()) is not None:
            self._at(self._queue.now + max(1e-3 * wait, _IDLE_ROUND), self._wake)

    def _handle(self, command: AnyCommand) -> None:
        match command:
            case LoadAdapter():
                spec = self._find(command)
                self.engine.register_adapter(spec, pinned=command.pinned)
                self._driver.adapters[spec.content_hash] = spec
                self._reports.append(AdapterResult(call_id=command.call_id, spec=spec))
            case UnloadAdapter(call_id=call_id, content_hash=content_hash):
                self._driver.adapters.pop(content_hash, None)
                self.engine.forget_adapter(content_hash)
                self._reports.append(AdapterResult(call_id=call_id))
            case _:
                self._driver.handle(command)
