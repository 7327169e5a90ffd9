"""An executor that spends virtual seconds and computes nothing."""

from __future__ import annotations

import bisect
import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import NO_ADAPTER, Batch, SequenceResult, StepResult
from peft_dist.core.cost_model import CostModel, StepFeatures
from peft_dist.core.handover import KVHandle
from peft_dist.core.messages import AdapterResidency
from peft_dist.engine.executor import LoadOutcome, TransferOutcome

TOKEN = 1
"""What every draw is: no prompt, stop token or text depends on it."""
LAYOUT = "simulated"
# What a sequence draws in a step: nobody changes it.
_DRAWN, _NOTHING = [TOKEN], list[int]()


class _Handle(NamedTuple):
    """A step: what it will have drawn, and when its last part ends."""

    result: StepResult
    ends: float


class _Ending(NamedTuple):
    ends: float
    spec: AdapterSpec
    began: float
    copy_seconds: float


class SimExecutor:
    """Steps, switches, loads and copies take what a cost model says; loads and copies run beside the steps.

    Args:
        truth: Seconds of everything. The engine has a model of its own, which learns from them.
        clock: The time, in seconds.
        block_bytes: Of one KV block.
        num_held: Merged copies that are kept beside the base ("shadow"); 0: weights are merged in place.
        held: Contents whose merged copies are there from the start, ``num_held`` at most.
        prompt_sizes, decode_sizes, context_token, context, loads_at_once: As of ``CostProfile``. The engine's own model
            knows nothing of them, as in the live system.
    """

    def __init__(
        self,
        truth: CostModel,
        clock: Callable[[], float],
        block_bytes: int,
        num_held: int,
        *,
        can_merge: bool = True,
        held: Sequence[str] = (),
        prompt_sizes: Sequence[int] = (),
        decode_sizes: Sequence[int] = (),
        context_token: float = 0.0,
        context: float = 0.0,
        loads_at_once: int = 0,
    ) -> None:
        self._can_merge = can_merge
        self._truth = truth
        self._clock = clock
        self._block_bytes = block_bytes
        self._num_held = num_held
        self._sizes = prompt_sizes, decode_sizes
        self._context_token = context_token
        self._context = context
        self._slots: dict[int, AdapterSpec] = {}
        # Of the last batch: slots and tokens of its sequences, what it was merged for, and its features.
        self._counted: tuple[list[int], list[int], str | None, StepFeatures] | None = None
        self._residency: list[AdapterResidency] | None = None
        self._loading: dict[int, _Ending] = {}
        # When each of those that load is free for the next one; empty where all loads run at once.
        self._loaders = [-math.inf] * loads_at_once
        self._copies: list[tuple[float, TransferOutcome]] = []
        self._merged: AdapterSpec | None = None
        self._held: OrderedDict[str, None] = OrderedDict.fromkeys(held)
        self._free_at = 0.0
        self.collected_at = 0.0
        """When the last step that was collected ended."""
        self.busy_seconds = 0.0
        """What all steps took, without switches and swaps."""

    @property
    def is_copying(self) -> bool:
        """Whether KV is on its way."""
        return bool(self._copies)

    def next_end(self) -> float | None:
        """When the next load or copy ends; None: none is under way."""
        ends = [load.ends for load in self._loading.values()] + [end for end, _ in self._copies]
        return min(ends, default=None)

    def submit(self, batch: Batch) -> _Handle:
        swapped = (len(batch.swap_outs) + len(batch.swap_ins)) * self._block_bytes
        swap_seconds = self._truth.swap_seconds(swapped) if swapped else None
        cached = sum(s.start for s in batch.sequences if len(s.token_ids) == 1) if self._context_token else 0
        seconds = self.step_seconds(self._features(batch), cached) if batch.sequences else 0.0
        self._free_at = max(self._free_at, self._clock()) + (swap_seconds or 0.0) + seconds
        self.busy_seconds += seconds
        results = [SequenceResult(s.request_id, _DRAWN if s.samples else _NOTHING, s.draw) for s in batch.sequences]
        result = StepResult(batch.step, results, seconds, swap_bytes=swapped, swap_seconds=swap_seconds)
        return _Handle(result, self._free_at)

    @property
    def counts_context(self) -> bool:
        """Whether decodes take longer the more tokens their sequences have."""
        return self._context_token > 0.0

    def step_seconds(self, features: StepFeatures, num_cached: int = 0) -> float:
        """Of a step without copies. ``num_cached``: Tokens in the KV cache before it, of all its decodes together."""
        features = padded(features, *self._sizes)
        seconds = self._truth.step_seconds(features)
        if not self._context_token:
            return seconds
        beyond = num_cached - self._context * features.decode_sequences
        return max(seconds + self._context_token * beyond, 0.0)

    @property
    def free_at(self) -> float:
        """When all that was submitted has ended."""
        return self._free_at

    def stepped(self, free_at: float, seconds: Iterable[float]) -> None:
        """Steps of so many seconds each were taken beside ``submit``; the last one ended then."""
        self._free_at = free_at
        for one in seconds:  # Not multiplied: the sum is what it is when they are taken one by one.
            self.busy_seconds += one

    def collect(self, handle: _Handle) -> StepResult:
        self.collected_at = handle.ends
        return handle.result

    def can_merge(self, spec: AdapterSpec) -> bool:
        return self._can_merge

    def can_host(self, spec: AdapterSpec) -> bool:
        return True

    def switch(self, spec: AdapterSpec | None) -> float | None:
        target = None if spec is None else spec.content_hash
        seconds = 0.0
        if target is None or target not in self._held:
            rows = 0 if spec is None else spec.num_rank_rows
            seconds = self._truth.switch_seconds(self.merged_adapter(), target, rows)
        self._merged = spec
        if target is not None and self._num_held:
            self._held[target] = None
            self._held.move_to_end(target)
            while len(self._held) > self._num_held:
                self._held.popitem(last=False)
        self._free_at = max(self._free_at, self._clock()) + seconds
        return seconds

    def merged_adapter(self) -> str | None:
        return None if self._merged is None else self._merged.content_hash

    def holds_merged(self, content_hash: str) -> bool:
        return content_hash in self._held or content_hash == self.merged_adapter()

    def residency(self) -> list[AdapterResidency]:
        if self._residency is None:
            self._residency = [
                AdapterResidency(spec.content_hash, "device", spec.num_rank_rows, spec.num_bytes)
                for spec in self._slots.values()
            ]
        return list(self._residency)

    def peak_memory_bytes(self) -> int:
        return 0

    def forget(self, request_ids: Sequence[str]) -> None:
        """Nothing is kept."""

    def start_load(self, spec: AdapterSpec, slot: int) -> None:
        now = self._clock()
        seconds = self._truth.load_seconds(spec.num_bytes)
        ends = now + seconds
        if self._loaders:
            ends = max(now, self._loaders[0]) + seconds
            heapq.heapreplace(self._loaders, ends)
        self._loading[slot] = _Ending(ends, spec, now, seconds)

    def take_loaded(self) -> list[LoadOutcome]:
        if not self._loading:
            return []
        now, outcomes = self._clock(), []
        for slot, load in [(slot, load) for slot, load in self._loading.items() if load.ends <= now]:
            del self._loading[slot]
            self._slots[slot], self._counted, self._residency = load.spec, None, None
            seconds = load.ends - load.began
            outcomes.append(LoadOutcome(load.spec.content_hash, slot, None, seconds, load.copy_seconds))
        return outcomes

    def fileno(self) -> int:
        return -1  # Nobody waits: ``next_end`` tells.

    def drop_adapter(self, slot: int) -> None:
        del self._slots[slot]
        self._counted = self._residency = None

    def keep_adapter(self, content_hash: str) -> None:
        """Host memory is not simulated: every load takes what one from there takes."""

    def release_adapter(self, content_hash: str) -> None:
        """As ``keep_adapter``."""

    def discard_adapter(self, content_hash: str) -> None:
        self._held.pop(content_hash, None)

    def start_export(self, key: int, blocks: Sequence[int], *, on_host: bool, ahead: bool = False) -> None:
        num_bytes = len(blocks) * self._block_bytes
        # A move is measured as one: half of it is the way out.
        seconds = self._truth.transfer_seconds(num_bytes) / 2
        kv = KVHandle(LAYOUT, len(blocks), num_bytes, str(key), 0, 0, seconds=seconds)
        self._copies.append((self._clock() + seconds, TransferOutcome(key, kv, None, seconds)))

    def start_import(self, key: int, kv: KVHandle, blocks: Sequence[int]) -> None:
        seconds = self._truth.transfer_seconds(kv.num_bytes) / 2
        self._copies.append((self._clock() + seconds, TransferOutcome(key, None, None, seconds)))

    def take_transfers(self) -> list[TransferOutcome]:
        if not self._copies:
            return []
        now = self._clock()
        ended = [outcome for end, outcome in self._copies if end <= now]
        self._copies = [copy for copy in self._copies if copy[0] > now]
        return ended

    def end_export(self, key: int) -> None:
        """Nothing is held."""

    def transfers_fileno(self) -> int:
        return -1

    def _features(self, batch: Batch) -> StepFeatures:
        slots = [sequence.adapter_slot for sequence in batch.sequences]
        tokens = [len(sequence.token_ids) for sequence in batch.sequences]
        last, merged = self._counted, batch.merged_adapter
        if last is None or last[0] != slots or last[1] != tokens or last[2] != merged:
            last = self._counted = slots, tokens, merged, self._count(slots, tokens, merged)
        return last[3]

    def _count(self, slots: list[int], num_tokens: list[int], merged: str | None) -> StepFeatures:
        rows = []
        for slot, tokens in zip(slots, num_tokens, strict=True):
            spec = None if slot == NO_ADAPTER else self._slots[slot]
            rows.append(("", tokens, 0) if spec is None else (spec.content_hash, tokens, spec.num_rank_rows))
        if merged is None:
            return StepFeatures.of(rows)
        present = any(adapter == merged for adapter, _, _ in rows)
        rank = self._merged.num_rank_rows if present and self._merged is not None else 0
        return StepFeatures.of(rows, merged, rank)


def padded(features: StepFeatures, prompt_sizes: Sequence[int], decode_sizes: Sequence[int] = ()) -> StepFeatures:
    """With the tokens of the captured step that takes it, of these sizes. Padding has no adapter, and no context."""
    sizes = prompt_sizes if features.prefill_tokens else decode_sizes
    tokens = features.decode_sequences + features.prefill_tokens
    found = bisect.bisect_left(sizes, tokens)
    if found == len(sizes) or sizes[found] == tokens:
        return features
    if not features.prefill_tokens:
        return msgspec.structs.replace(features, decode_sequences=sizes[found])
    more = sizes[found] - tokens
    return msgspec.structs.replace(features, prefill_tokens=features.prefill_tokens + more)
