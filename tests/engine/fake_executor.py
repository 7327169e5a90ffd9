"""An executor whose "model" reads its context through block tables, so that any bookkeeping mistake shows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import NO_ADAPTER, PLACEHOLDER, Batch, ScheduledSequence, SequenceResult, StepResult
from peft_dist.core.handover import KVHandle
from peft_dist.core.messages import AdapterResidency
from peft_dist.core.outputs import Logprob
from peft_dist.engine.executor import LoadOutcome, TransferOutcome

VOCAB = 97
EOS = 0


def next_token(context: list[tuple[int, str]], seed: int, sequence_index: int, draw: int) -> int:
    """The fake model: a function of all (token, adapter) pairs in the context and of the draw."""
    digest = hashlib.blake2b(repr((context, seed, sequence_index, draw)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


def tokens_alone(
    prompt: list[int], content: str, seed: int, index: int, max_tokens: int, ignore_eos: bool = False
) -> list[int]:
    """What a request draws when it has the machine for itself."""
    context = [(token, content) for token in prompt]
    drawn: list[int] = []
    while len(drawn) < max_tokens:
        token = next_token(context, seed, index, len(drawn))
        drawn.append(token)
        context.append((token, content))
        if token == EOS and not ignore_eos:
            break
    return drawn


class FakeExecutor:
    """Runs batches at once on a fake paged cache; results are handed out on ``collect``."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int = 0,
        load_delay: Callable[[AdapterSpec], int] = lambda spec: 0,
    ) -> None:
        """``load_delay``: How often ``take_loaded`` is asked in vain before it tells that an adapter has arrived."""
        self.block_size = block_size
        self.cache: list[list[tuple[int, str] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.host: list[list[tuple[int, str] | None]] = [[None] * block_size for _ in range(num_host_blocks)]
        self.slots: dict[int, str] = {}
        self.states: dict[str, tuple[int, int, list[int]]] = {}
        self.load_delay = load_delay
        self.loading: dict[int, tuple[AdapterSpec, int]] = {}
        self.failing_loads: dict[str, str] = {}
        self.num_loads = 0
        self.discarded: list[str] = []
        self.kept: set[str] = set()
        self.poisoned: set[str] = set()
        self.max_batch_tokens = 0
        self.merged = ""
        self.num_held = 1
        self.held: list[str] = []
        # On a GPU the seconds of a switch are known with the step after it.
        self.late_switches = False
        self.late_seconds: float | None = None
        self.failing_merges: set[str] = set()
        self.num_switches = 0
        self.modes: set[bool] = set()
        self.unmergeable: set[str] = set()
        self.no_hosts: set[str] = set()
        # What was exported, by token; executors that share it can import from one another.
        self.memory: dict[str, list[list[tuple[int, str] | None]]] = {}
        self.exports: dict[int, str] = {}
        self.copying: list[tuple[int, KVHandle, list[int] | None]] = []
        self.ahead: set[int] = set()
        # How often ``take_transfers`` is asked in vain before a copy has ended, and what is wrong with the next ones.
        self.copy_delay = 0
        self.failing_copies: list[str] = []
        self.polls = 0

    def submit(self, batch: Batch) -> StepResult:
        for device, host in batch.swap_outs:
            self.host[host] = list(self.cache[device])
        for host, device in batch.swap_ins:
            self.cache[device] = list(self.host[host])
        for start in batch.starts:
            known = start.prompt_token_ids + start.output_token_ids
            self.states[start.request_id] = (start.seed, start.sequence_index, list(known))
        if batch.sequences:
            assert (batch.merged_adapter or "") == self.merged, "the weights hold something else"
            if batch.merged_adapter is not None:
                assert self.slots[batch.merged_slot] == batch.merged_adapter
                if batch.merged_adapter in self.no_hosts:
                    assert {sequence.adapter_slot for sequence in batch.sequences} == {batch.merged_slot}
            self.modes.add(batch.merged_adapter is not None)
        self.max_batch_tokens = max(self.max_batch_tokens, batch.num_tokens)
        # Like the real model: every layer writes all keys and values before it reads any.
        for sequence in batch.sequences:
            self._write(sequence)
        # Steps and switches of a made-up machine, so that policies have something to learn from.
        seconds = 0.01 + 0.001 * len(batch.sequences) + (0.004 if not batch.merged_adapter else 0.0)
        late, self.late_seconds = self.late_seconds, None
        return StepResult(batch.step, [self._read(sequence) for sequence in batch.sequences], seconds, late)

    def collect(self, handle: StepResult) -> StepResult:
        return handle

    def can_merge(self, spec: AdapterSpec) -> bool:
        return spec.content_hash not in self.unmergeable

    def can_host(self, spec: AdapterSpec) -> bool:
        return spec.content_hash not in self.no_hosts

    def switch(self, spec: AdapterSpec | None) -> float | None:
        assert spec is None or spec.content_hash in self.slots.values()
        if spec is not None and spec.content_hash in self.failing_merges:
            self.merged, self.held = "", []
            raise MemoryError("no room for the merged weights")
        self.merged = spec.content_hash if spec else ""
        self.num_switches += 1
        seconds = 0.005 if spec and self.merged not in self.held else 0.0
        if spec:
            self.held = [*(key for key in self.held if key != self.merged), self.merged][-self.num_held :]
        self.late_seconds = seconds if self.late_switches else None
        return None if self.late_switches else seconds

    def merged_adapter(self) -> str | None:
        return self.merged or None

    def holds_merged(self, content_hash: str) -> bool:
        return content_hash in self.held

    def residency(self) -> list[AdapterResidency]:
        return [AdapterResidency(content_hash, "device", 4, 10) for content_hash in self.slots.values()]

    def peak_memory_bytes(self) -> int:
        return 1 << 20

    def forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.states.pop(request_id, None)

    def start_load(self, spec: AdapterSpec, slot: int) -> None:
        assert slot not in self.slots and slot not in self.loading, "a load over something"
        assert spec.content_hash not in self.slots.values(), "loaded twice"
        self.loading[slot] = (spec, self.load_delay(spec))

    def take_loaded(self) -> list[LoadOutcome]:
        outcomes = []
        for slot, (spec, polls_left) in list(self.loading.items()):
            if polls_left:
                self.loading[slot] = (spec, polls_left - 1)
                continue
            del self.loading[slot]
            error = self.failing_loads.get(spec.content_hash)
            if error is None:
                self.slots[slot] = spec.content_hash
                self.num_loads += 1
            outcomes.append(LoadOutcome(spec.content_hash, slot, error, 0.0))
        return outcomes

    def start_export(self, key: int, blocks: Sequence[int], *, on_host: bool, ahead: bool = False) -> None:
        if ahead:
            self.ahead.add(key)
        source = self.host if on_host else self.cache
        token = self.exports[key] = f"{id(self)}.{key}"
        self.memory[token] = [list(source[block]) for block in blocks]
        self.copying.append((key, KVHandle("fake", len(blocks), len(blocks), token, 0, 0), None))

    def start_import(self, key: int, kv: KVHandle, blocks: Sequence[int]) -> None:
        assert kv.num_blocks == len(blocks)
        self.copying.append((key, kv, list(blocks)))

    def take_transfers(self) -> list[TransferOutcome]:
        if self.copying and self.polls < self.copy_delay:
            self.polls += 1
            return []
        copying, self.copying, self.polls = self.copying, [], 0
        return [self._copy(*copy) for copy in copying]

    def _copy(self, key: int, kv: KVHandle, blocks: list[int] | None) -> TransferOutcome:
        error = self.failing_copies.pop() if self.failing_copies else None
        if blocks is None:
            return TransferOutcome(key, None if error else kv, error, 0.01)
        contents = self.memory.get(kv.token)
        if contents is None:
            error = "its process is gone"
        for block, content in zip(blocks, contents or [], strict=False):
            # Written only now: nobody else may have been given the block meanwhile.
            self.cache[block] = list(content)
        return TransferOutcome(key, None, error, 0.01)

    def end_export(self, key: int) -> None:
        self.memory.pop(self.exports.pop(key))

    def transfers_fileno(self) -> int:
        return -1  # Nobody waits for a fake copy.

    def fileno(self) -> int:
        raise AssertionError("nobody waits for a fake load")

    def drop_adapter(self, slot: int) -> None:
        del self.slots[slot]

    def keep_adapter(self, content_hash: str) -> None:
        assert content_hash not in self.kept, "kept twice"
        self.kept.add(content_hash)

    def release_adapter(self, content_hash: str) -> None:
        self.kept.remove(content_hash)

    def discard_adapter(self, content_hash: str) -> None:
        assert content_hash not in self.slots.values() and content_hash not in self.kept
        assert content_hash not in [spec.content_hash for spec, _ in self.loading.values()]
        self.discarded.append(content_hash)

    def _write(self, sequence: ScheduledSequence) -> None:
        content = self.slots[sequence.adapter_slot] if sequence.adapter_slot != NO_ADAPTER else ""
        known = self.states[sequence.request_id][2]
        for position, token in enumerate(sequence.token_ids, sequence.start):
            actual = known[position]
            assert token in (actual, PLACEHOLDER), f"{sequence.request_id} position {position}: {token} != {actual}"
            block = sequence.block_table[position // self.block_size]
            self.cache[block][position % self.block_size] = (actual, content)

    def _read(self, sequence: ScheduledSequence) -> SequenceResult:
        stop = sequence.start + sequence.num_tokens
        seed, index, known = self.states[sequence.request_id]
        context = [
            self.cache[sequence.block_table[position // self.block_size]][position % self.block_size]
            for position in range(stop)
        ]
        assert None not in context, "a key that nothing wrote"
        scores = None
        if sequence.wants_prompt_logprobs:
            positions = range(sequence.start + 1, min(stop + 1, len(known)))
            scores = [{known[position]: Logprob(-float(position), 1)} for position in positions]
        if sequence.request_id in self.poisoned:
            return SequenceResult(sequence.request_id, [], sequence.draw, error="logits are not finite")
        if not sequence.samples:
            return SequenceResult(sequence.request_id, [], sequence.draw, prompt_logprobs=scores)
        token = next_token(context, seed, index, sequence.draw)
        known.append(token)
        return SequenceResult(sequence.request_id, [token], sequence.draw, prompt_logprobs=scores)
