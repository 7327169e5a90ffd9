"""A replica in virtual time: what a worker does, without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig, ModelInfo
from peft_dist.core.cost_model import CostModel
from peft_dist.core.messages import AdapterResult, AnyCommand, AnyReport, LoadAdapter, Progress, Ready, UnloadAdapter
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
    ) -> None:
        """
        Args:
            report: Told at the end of each round.
            find_adapter: What is at the path of a load.
            lane: Of its events.
            equal: Told of reports to come of equal steps; None: every step is taken by itself.
        """
        self._queue = queue
        self._lane = lane
        self._report = report
        self._equal = equal
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
        )
        self.engine = assemble(hardware.config, info, self.executor, hardware.prior(), page_rows=1, num_rows=None)
        self._driver = EngineDriver(self.engine, Handovers(self.engine), self._reports.append, self._clock)
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
        if self._equal is not None and not self._reports and self.executor.is_quiet:
            reports = self.run.begin(began, self._driver.plain_until, self._driver.num_taken)
            if reports is not None:
                self._equal(reports)
                self._await_run()
                return
        self.executor.collected_at = began
        self._driver.step(report=bool(commands))
        # With a step in flight, scheduling the next one takes no time of the device's.
        host = 0.0 if self.engine.depth else self._host_seconds
        self._told(self._reports)
        self._at(max(self.executor.collected_at + host, began + _IDLE_ROUND), self._end_round)

    def _told(self, reports: Iterable[AnyReport]) -> None:
        """Note whose tokens were reported."""
        for report in reports:
            if isinstance(report, Progress):
                self.run.told(report.sequences)

    def _await_run(self) -> None:
        self._at(self.run.ends_at, partial(self._end_run, self.run.number))

    def _end_run(self, number: int) -> None:
        if number == self.run.number:
            progress = self.run.end()
            self._now = self.run.last_start
            if progress:
                self._driver.tell(progress)
                self.run.told(progress)
            else:
                self._driver.stepped()
            self._end_round()

    def _end_round(self) -> None:
        reports, self._reports[:] = self._reports[:], []
        if reports:
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
