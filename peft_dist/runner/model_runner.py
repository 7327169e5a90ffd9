"""The only place where a Batch runs through the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from peft_dist.core.batch import NO_ADAPTER, Batch, ScheduledSequence, SequenceResult, SequenceStart, StepResult
from peft_dist.core.grammars import Grammars
from peft_dist.core.outputs import PositionLogprobs
from peft_dist.forward_context import ForwardContext
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.kernels.lora_group import make_tiles
from peft_dist.kernels.lora_tiles import DECODE_TILE_ROWS
from peft_dist.kernels.transfer import to_device
from peft_dist.kernels.types import LoRAPlan
from peft_dist.patches.sharding import num_outputs
from peft_dist.runner.adapter_store import AdapterStore
from peft_dist.runner.drawn_tokens import DrawnTokens
from peft_dist.runner.host_copy import HostCopy
from peft_dist.runner.inputs import PackedInputs, pack
from peft_dist.runner.merge_state import MergeState
from peft_dist.runner.sampler import SampledTokens, SamplerState, sample
from peft_dist.runner.sampler_edits import AllowedTokens
from peft_dist.runner.sampler_grammar import allowed_tokens
from peft_dist.runner.sampler_logprobs import NonFiniteLogitsError, prompt_logprobs
from peft_dist.runner.step_graphs import StepGraphs
from peft_dist.runner.swapped_models import SwappedModels


@dataclass(slots=True)
class SequenceRecord:
    """What the runner keeps of a sequence: its sampling state, and the last draw that has arrived."""

    prompt_token_ids: list[int]
    scored_top: int
    sampler: SamplerState
    last_token: int | None


@dataclass(slots=True)
class PendingStep:
    """A step whose tokens may still be on their way from the device.

    Attributes:
        first: Where in ``DrawnTokens`` the draw of row 0 is.
        rows: Row of each sequence that draws.
        copy: Of ``sampled``, to the host.
        was_captured: It waited for its capture, or for one that found no memory: how long it took says nothing of the
            next one like it.
    """

    batch: Batch
    first: int
    sampled: SampledTokens | None = None
    copy: HostCopy | None = None
    rows: dict[str, int] = field(default_factory=dict)
    scores: dict[str, list[PositionLogprobs]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    was_captured: bool = False
    result: StepResult | None = None


class ModelRunner:
    """Packed forwards of one model, and the sampling state of its sequences.

    Draws stay on the device until ``finish``: the next step takes the ids it needs from there, unless a
    sequence's sampling depends on the values of earlier draws (penalties, grammars), which must then be known first.

    Attributes:
        grammars: What reads structured outputs for this model's tokens; whoever knows the tokenizer puts it here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv: KVCachePool,
        store: AdapterStore,
        eos_token_ids: tuple[int, ...],
        lora_backend: str = "torch",
        attention_backend: str = "torch",
        merge: MergeState | SwappedModels | None = None,
        max_num_seqs: int = 256,
        depth: int = 1,
    ) -> None:
        """
        Args:
            merge: What changes the weights between batches; None: they are always the base's.
            max_num_seqs: Most sequences that draw in one step.
            depth: Steps in flight while the next one is started.
        """
        self.model = model
        self.kv = kv
        self.store = store
        self.merge = merge
        self.device = model.device
        self.lora_backend, self.attention_backend = lora_backend, attention_backend
        self.eos_token_ids = eos_token_ids
        self.vocab_size = num_outputs(model)
        self.records: dict[str, SequenceRecord] = {}
        self.drawn = DrawnTokens(max_num_seqs, depth + 2, self.device)
        self.graphs: StepGraphs | None = None
        self.grammars = Grammars(lambda: None, self.vocab_size, eos_token_ids)
        self._unfinished: deque[PendingStep] = deque()

    @torch.inference_mode()
    def start(self, batch: Batch) -> PendingStep:
        """Run the forward pass and sample; ``copy_blocks`` comes before. Does not wait for the device."""
        for begin in batch.starts:
            self.records[begin.request_id] = self._record(begin)
        step = PendingStep(batch, self.drawn.begin())
        if batch.sequences:
            self._forward(step)
        self._unfinished.append(step)
        return step

    @torch.inference_mode()
    def rehearse(self, lengths: Sequence[int], tile_rows: int, *, corrected: bool = False) -> None:
        """Run sequences of so many tokens as a batch with adapters, to no other effect than that kernels are compiled.

        Nothing is cached or drawn, and every row is the base's, so that it may come between any two steps. For
        attention back ends that let padding (slot -1) write nothing, and LoRA by Triton.

        Args:
            tile_rows: Of the rows' ``LoRATiles``.
            corrected: As a merged batch in which some rows have the merged adapter's part taken away.
        """
        block_size = self.kv.block_size
        sequences = [
            ScheduledSequence("rehearsal", [0] * length, 0, [0] * -(-length // block_size), samples=True)
            for length in lengths
        ]
        inputs = pack(Batch(0, sequences), {}, block_size, self.device, self.lora_backend, self.attention_backend)
        inputs.attention.slot_mapping_t.fill_(-1)
        inputs.lora = self._base_plan(sum(lengths), tile_rows)
        inputs.lora_logits = self._base_plan(len(lengths), DECODE_TILE_ROWS)
        if corrected:
            inputs.lora_correction, inputs.lora_logits_correction = inputs.lora, inputs.lora_logits
        self._logits(inputs)

    def copy_blocks(self, batch: Batch) -> int:
        """Copy the batch's KV blocks between device and host; the bytes that are copied."""
        self.kv.swap_out(batch.swap_outs)
        self.kv.swap_in(batch.swap_ins)
        return (len(batch.swap_outs) + len(batch.swap_ins)) * self.kv.bytes_per_block

    def finish(self, step: PendingStep) -> StepResult:
        """Wait for a step's tokens. Steps finish in the order in which they were started."""
        while step.result is None:
            self._resolve(self._unfinished.popleft())
        return step.result

    def forget(self, request_id: str) -> None:
        """Drop the sampling state of a sequence that has ended."""
        self.records.pop(request_id, None)
        if self.graphs is not None:
            self.graphs.forget(request_id)

    def _record(self, begin: SequenceStart) -> SequenceRecord:
        spec = begin.params.structured
        grammar = self.grammars.state(spec, begin.output_token_ids) if spec is not None else None
        return SequenceRecord(
            prompt_token_ids=begin.prompt_token_ids,
            scored_top=begin.params.prompt_logprobs or 0,
            sampler=SamplerState(begin, self.vocab_size, self.eos_token_ids, grammar),
            last_token=begin.output_token_ids[-1] if begin.output_token_ids else None,
        )

    def _forward(self, step: PendingStep) -> None:
        batch = step.batch
        if self.graphs is not None and (shape := self.graphs.shape_for(batch)) is not None:
            awaited = self.graphs.num_awaited
            captured = self.graphs.run(batch, shape, self._find_draw, step.first)
            step.was_captured = self.graphs.num_awaited > awaited
            if captured is not None:
                if sampled := [sequence for sequence in batch.sequences if sequence.samples]:
                    self._sample(step, captured.logits[: len(sampled)], sampled, captured.best(len(sampled)))
                return
        scored = (sequence.request_id for sequence in batch.sequences if sequence.wants_prompt_logprobs)
        prompts = {request_id: self.records[request_id].prompt_token_ids for request_id in scored}
        backends = self.lora_backend, self.attention_backend
        inputs = pack(batch, prompts, self.kv.block_size, self.device, *backends)
        self._fill_pending(inputs)
        logits = self._logits(inputs)
        if inputs.sampled:
            self._sample(step, logits[: len(inputs.sampled)], inputs.sampled)
        for sequence, first, following in inputs.scored:
            self._score_prompt(step, sequence.request_id, logits[first : first + len(following)], following)

    def _sample(
        self,
        step: PendingStep,
        logits: torch.Tensor,
        sequences: Sequence[ScheduledSequence],
        best: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Draw for these rows; ``best`` is known, and its tokens are in ``drawn``, where the step was captured."""
        states = [self.records[sequence.request_id].sampler for sequence in sequences]
        allowed: AllowedTokens | None = None
        if any(state.needs_tokens for state in states):
            self._resolve_all()
            allowed, failed = allowed_tokens(states, self.grammars)
            step.errors |= {sequences[row].request_id: str(error) for row, error in failed.items()}
        draws = [sequence.draw for sequence in sequences]
        step.sampled = sample(logits, states, draws, allowed, best)
        if best is None or not all(state.greedy for state in states) or any(map(SamplerState.is_edited, states, draws)):
            self.drawn.write(step.first, step.sampled.token_ids)
        step.rows = {sequence.request_id: row for row, sequence in enumerate(sequences)}
        step.copy = step.sampled.send()

    def _score_prompt(self, step: PendingStep, request_id: str, logits: torch.Tensor, following: list[int]) -> None:
        try:
            step.scores[request_id] = prompt_logprobs(logits, following, self.records[request_id].scored_top)
        except NonFiniteLogitsError as error:
            step.errors[request_id] = str(error)

    def _logits(self, inputs: PackedInputs) -> torch.Tensor:
        """``[L, vocab]`` of the rows in ``inputs.logits_rows``."""
        pool = self.store.pool
        context = ForwardContext(
            attention=inputs.attention,
            kv_caches=self.kv.caches,
            lora=inputs.lora,
            lora_logits=inputs.lora_logits,
            # Triton's kernels skip what no adapter adapts; without it they would be others, to be compiled first.
            lora_weights=pool.addressed_weights if self.lora_backend == "triton" else pool.weights,
            merged=self.merge.layers_for_context() if self.merge else None,
            lora_correction=inputs.lora_correction,
            lora_logits_correction=inputs.lora_logits_correction,
        )
        with context:
            output = self.model(
                input_ids=inputs.input_ids,
                position_ids=inputs.position_ids,
                use_cache=False,
                logits_to_keep=inputs.logits_rows,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _base_plan(self, rows: int, tile_rows: int) -> LoRAPlan:
        slots = np.full(rows, NO_ADAPTER, np.int32)
        tiles = make_tiles(slots, self.device, tile_rows, has_base=True)
        return LoRAPlan(slots[:1], np.array([0, rows], np.int32), backend=self.lora_backend, tiles=tiles)

    def _fill_pending(self, inputs: PackedInputs) -> None:
        """Put ids that an unfinished step draws where the batch only has placeholders."""
        if not inputs.pending:
            return
        sources = torch.full(inputs.input_ids.shape, -1, dtype=torch.int64)
        ids = torch.zeros_like(sources)
        for row, request_id in inputs.pending:
            sources[0, row], ids[0, row] = self._find_draw(request_id)
        known = torch.where(inputs.input_ids < 0, to_device(ids, self.device), inputs.input_ids)
        inputs.input_ids = self.drawn.fill_pending(known, to_device(sources, self.device))

    def _find_draw(self, request_id: str) -> tuple[int, int]:
        """Where in ``drawn`` a sequence's latest draw is, or -1 and the token."""
        for step in reversed(self._unfinished):
            row = step.rows.get(request_id)
            if row is not None:
                return step.first + row, 0
        # The draw arrived early because another sequence of its step had to know its own.
        token = self.records[request_id].last_token
        assert token is not None, f"{request_id}: a placeholder without a draw"
        return -1, token

    def _resolve_all(self) -> None:
        while self._unfinished:
            self._resolve(self._unfinished.popleft())

    def _resolve(self, step: PendingStep) -> None:
        sampled = step.sampled.arrived(step.copy) if step.sampled is not None and step.copy is not None else None
        drawn = sampled.collect() if sampled is not None else []
        outcomes = []
        for sequence in step.batch.sequences:
            request_id = sequence.request_id
            row = step.rows.get(request_id)
            token = drawn[row] if row is not None else None
            error = step.errors.get(request_id) or (token.error if token else None)
            tokens = [token.token_id] if token and not error else []
            self._note(request_id, tokens)
            outcomes.append(
                SequenceResult(
                    request_id=request_id,
                    token_ids=tokens,
                    first_draw=sequence.draw,
                    logprobs=[token.logprobs] if token and token.logprobs is not None else None,
                    prompt_logprobs=step.scores.get(request_id),
                    error=error,
                )
            )
        step.result = StepResult(step.batch.step, outcomes)

    def _note(self, request_id: str, tokens: list[int]) -> None:
        record = self.records.get(request_id)
        if record is not None and tokens:
            record.sampler.append(tokens)
            record.last_token = tokens[-1]
