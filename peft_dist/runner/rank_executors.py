"""Executors of a replica whose weights are split: rank 0's tells what it does, the others' do what they are told.

Every rank draws every token itself: the logits are gathered, so all have the same bits, and a draw is a function of
them and of the request's seed. Sending rank 0's draws would put another meeting into each step.
"""

from __future__ import annotations

import logging
import select
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import Batch, StepResult
from peft_dist.core.handover import KVHandle
from peft_dist.engine.executor import LoadOutcome, TransferOutcome
from peft_dist.runner import rank_messages as messages
from peft_dist.runner.executor import Submitted, TorchExecutor
from peft_dist.runner.model_runner import ModelRunner
from peft_dist.runner.rank_group import RankGroup, leave_ranks
from peft_dist.runner.rank_messages import RankChannel, RankMessage
from peft_dist.runner.step_graphs import StepGraphs

logger = logging.getLogger(__name__)


class _RankExecutor(TorchExecutor):
    """What all ranks do alike."""

    def __init__(self, runner: ModelRunner, load_timeout: float | None, ranks: RankGroup) -> None:
        super().__init__(runner, load_timeout)
        self.transfers.rank, self.transfers.num_ranks = ranks.rank, ranks.size
        self._ranks = ranks
        self._channel = RankChannel(ranks)

    def _meet_for_merge(self, spec: AdapterSpec) -> str | None:
        # Before one takes memory that another lacks: with merged weights of other layers, ranks would capture other
        # steps than each other.
        merge = self.runner.merge
        reasons = self._ranks.agree(None if merge is None else merge.reason_against(spec.ranks.keys()))
        if reasons.count(None) == len(reasons):
            reasons = self._ranks.agree(TorchExecutor.prepare_merge(self, spec))
        elif self._ranks.rank == 0:
            logger.warning("adapter %r cannot be merged on all ranks: %s", spec.name, reasons)
        reason = next((reason for reason in reasons if reason is not None), None)
        self._mergeable[spec.content_hash] = reason is None
        return reason

    def _meet_for_switch(self, spec: AdapterSpec | None) -> tuple[float | None, Exception | None]:
        """Seconds, or what failed on this rank or another: all go back to the base then."""
        seconds: float | None = None
        failure: Exception | None = None
        try:
            seconds = TorchExecutor.switch(self, spec)
        except (RuntimeError, MemoryError, ValueError) as error:
            failure = error
        failures = self._ranks.agree(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failures.count(None) == len(failures):
            return seconds, None
        TorchExecutor.switch(self, None)
        rank = next(rank for rank, found in enumerate(failures) if found is not None)
        return None, failure or RuntimeError(f"rank {rank} could not change its weights: {failures[rank]}")

    def _meet_for_load(self, outcome: LoadOutcome) -> LoadOutcome:
        """The outcome on all ranks, of which this one's is given."""
        errors = self._ranks.agree(outcome.error)
        error = next((error for error in errors if error is not None), None)
        if error is not None and outcome.error is None:
            TorchExecutor.drop_adapter(self, outcome.slot)
        return replace(outcome, error=error)

    def _meet_for_transfer(self, outcome: TransferOutcome) -> TransferOutcome:
        """The outcome on all ranks, of which this one's is given: with an export's parts, unless one has none."""
        found: list[TransferOutcome] = self._ranks.agree(outcome)
        seconds = max(each.seconds for each in found)
        error = next((each.error for each in found if each.error is not None), None)
        parts = [each.kv for each in found if each.kv is not None]
        if error is not None or outcome.kv is None or len(parts) < len(found):
            return replace(outcome, kv=None, error=error, seconds=seconds)
        kv = msgspec.structs.replace(outcome.kv, others=parts[1:], seconds=seconds)
        return replace(outcome, kv=kv, seconds=seconds)

    def close(self) -> None:
        super().close()
        self._channel.close()
        leave_ranks()


class LeadingExecutor(_RankExecutor):
    """Rank 0's."""

    def submit(self, batch: Batch) -> Submitted:
        self._channel.tell(messages.Submit(batch))
        return super().submit(batch)

    def collect(self, handle: Submitted) -> StepResult:
        self._channel.tell(messages.Collect())
        return super().collect(handle)

    def register(self, spec: AdapterSpec, *, allow_pickle: bool) -> None:
        self._channel.tell(messages.Register(spec, allow_pickle))
        super().register(spec, allow_pickle=allow_pickle)

    def capture(self, *, progress: bool = False) -> None:
        self._channel.tell(messages.Capture())
        super().capture(progress=progress)

    def _capture_next(self, graphs: StepGraphs) -> bool:
        # All ranks have captured the same steps.
        self._channel.tell(messages.CaptureNext())
        return super()._capture_next(graphs)

    def rehearse(self, lengths: Sequence[int], tile_rows: int, *, corrected: bool = False) -> None:
        self._channel.tell(messages.Rehearse(list(lengths), tile_rows, corrected))
        super().rehearse(lengths, tile_rows, corrected=corrected)

    def prepare_merge(self, spec: AdapterSpec) -> str | None:
        self._channel.tell(messages.PrepareMerge(spec))
        return self._meet_for_merge(spec)

    def switch(self, spec: AdapterSpec | None) -> float | None:
        self._channel.tell(messages.Switch(spec))
        seconds, failure = self._meet_for_switch(spec)
        if failure is not None:
            raise failure
        return seconds

    def forget(self, request_ids: Sequence[str]) -> None:
        self._channel.tell(messages.Forget(list(request_ids)))
        super().forget(request_ids)

    def start_load(self, spec: AdapterSpec, slot: int) -> None:
        self._channel.tell(messages.StartLoad(spec, slot))
        super().start_load(spec, slot)

    def take_loaded(self) -> list[LoadOutcome]:
        outcomes = []
        for outcome in super().take_loaded():
            self._channel.tell(messages.Settle(outcome.slot))
            outcomes.append(self._meet_for_load(outcome))
        return outcomes

    def drop_adapter(self, slot: int) -> None:
        self._channel.tell(messages.Drop(slot))
        super().drop_adapter(slot)

    def keep_adapter(self, content_hash: str) -> None:
        self._channel.tell(messages.Keep(content_hash))
        super().keep_adapter(content_hash)

    def release_adapter(self, content_hash: str) -> None:
        self._channel.tell(messages.Release(content_hash))
        super().release_adapter(content_hash)

    def discard_adapter(self, content_hash: str) -> None:
        self._channel.tell(messages.Discard(content_hash))
        super().discard_adapter(content_hash)

    def start_export(self, key: int, blocks: Sequence[int], *, on_host: bool, ahead: bool = False) -> None:
        self._channel.tell(messages.StartExport(key, list(blocks), on_host, ahead))
        super().start_export(key, blocks, on_host=on_host, ahead=ahead)

    def start_import(self, key: int, kv: KVHandle, blocks: Sequence[int]) -> None:
        self._channel.tell(messages.StartImport(key, kv, list(blocks)))
        super().start_import(key, kv, blocks)

    def take_transfers(self) -> list[TransferOutcome]:
        outcomes = []
        for outcome in super().take_transfers():
            self._channel.tell(messages.SettleTransfer(outcome.key))
            outcomes.append(self._meet_for_transfer(outcome))
        return outcomes

    def end_export(self, key: int) -> None:
        self._channel.tell(messages.EndExport(key))
        super().end_export(key)

    def clear(self) -> None:
        self._channel.tell(messages.Clear())
        super().clear()

    def close(self) -> None:
        self._channel.tell(messages.Stop())
        super().close()


class FollowingExecutor(_RankExecutor):
    """Every other rank's."""

    def __init__(self, runner: ModelRunner, load_timeout: float | None, ranks: RankGroup) -> None:
        super().__init__(runner, load_timeout, ranks)
        self._started: deque[Submitted] = deque()
        self._ended: dict[int, LoadOutcome] = {}
        self._copied: dict[int, TransferOutcome] = {}

    def follow(self) -> None:
        """Do what rank 0 does until it is closed. Raises whatever it would raise there, or there alone not."""
        while not isinstance(message := self._channel.hear(), messages.Stop):
            self._do(message)
        self.close()

    def _do(self, message: RankMessage) -> None:
        match message:
            case messages.Submit(batch=batch):
                self._started.append(self.submit(batch))
            case messages.Collect():
                self.collect(self._started.popleft())
            case messages.Switch(spec=spec):
                # A failure is rank 0's to deal with.
                self._meet_for_switch(spec)
            case messages.Forget(request_ids=request_ids):
                self.forget(request_ids)
            case messages.Register(spec=spec, allow_pickle=allow_pickle):
                self.register(spec, allow_pickle=allow_pickle)
            case messages.Capture():
                self.capture()
            case messages.CaptureNext():
                self.capture_some()
            case messages.Rehearse(lengths=lengths, tile_rows=tile_rows, corrected=corrected):
                self.rehearse(lengths, tile_rows, corrected=corrected)
            case messages.PrepareMerge(spec=spec):
                self._meet_for_merge(spec)
            case messages.StartLoad(spec=spec, slot=slot):
                self.start_load(spec, slot)
            case messages.Settle(slot=slot):
                self._meet_for_load(self._wait_for_load(slot))
            case messages.Drop(slot=slot):
                self.drop_adapter(slot)
            case messages.Keep(content_hash=content_hash):
                self.keep_adapter(content_hash)
            case messages.Release(content_hash=content_hash):
                self.release_adapter(content_hash)
            case messages.Discard(content_hash=content_hash):
                self.discard_adapter(content_hash)
            case messages.StartExport(key=key, blocks=blocks, on_host=on_host, ahead=ahead):
                self.start_export(key, blocks, on_host=on_host, ahead=ahead)
            case messages.StartImport(key=key, kv=kv, blocks=blocks):
                self.start_import(key, kv, blocks)
            case messages.SettleTransfer(key=key):
                self._meet_for_transfer(self._wait_for_transfer(key))
            case messages.EndExport(key=key):
                self.end_export(key)
            case messages.Clear():
                self.clear()

    def _wait_for_load(self, slot: int) -> LoadOutcome:
        # The reading has its own limit of time, which ends it too.
        while slot not in self._ended:
            select.select([self.fileno()], [], [])
            self._ended.update({outcome.slot: outcome for outcome in self.take_loaded()})
        return self._ended.pop(slot)

    def _wait_for_transfer(self, key: int) -> TransferOutcome:
        # Copies of memory that is open are short, and waits for a server have their limits.
        while key not in self._copied:
            select.select([self.transfers_fileno()], [], [])
            self._copied.update({outcome.key: outcome for outcome in self.take_transfers()})
        return self._copied.pop(key)


def make_executor(runner: ModelRunner, load_timeout: float | None, ranks: RankGroup) -> TorchExecutor:
    """Of this rank."""
    if not ranks.is_split:
        return TorchExecutor(runner, load_timeout)
    return (LeadingExecutor if ranks.rank == 0 else FollowingExecutor)(runner, load_timeout, ranks)
