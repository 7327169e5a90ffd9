"""Steps from input ids to drawn tokens, captured once for each size and replayed."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from peft_dist.core.batch import NO_ADAPTER, Batch
from peft_dist.forward_context import ForwardContext
from peft_dist.kernels.capture import Capture
from peft_dist.kernels.few_rows import FewRows
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.kernels.lora_parts_beside import PartsBeside
from peft_dist.kernels.lora_plans import RANKS
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.products import Products
from peft_dist.patches.merged_layers import MergedLayers
from peft_dist.runner.capture_room import CaptureRoom
from peft_dist.runner.drawn_tokens import DrawnTokens
from peft_dist.runner.merge_state import MergeState
from peft_dist.runner.sampler import best_tokens
from peft_dist.runner.step_attention import attention_of
from peft_dist.runner.step_buffer import StepBuffer, StepShape
from peft_dist.runner.step_inputs import FindDraw, StepInputs
from peft_dist.runner.step_plans import plans_of
from peft_dist.runner.step_variants import CapturedStep, Variant, decode_sizes, mixed_sizes
from peft_dist.runner.swapped_models import SwappedModels

# How often a size is computed in a larger one before it is captured by itself.
_STAND_INS = 16


class StepGraphs:
    """Captured steps of one model, by rows and variant, made when they are first needed or ahead by ``capture``.

    Args:
        max_num_seqs, max_num_batched_tokens: Sequences and tokens of the largest step.
        max_blocks: Blocks of the longest sequence.
        lora_backend, attention_backend: Names for plans and metadata; theirs must read device tensors alone.
        capture: ``CudaCapture``, or a stand-in for tests.
        few_rows: For the products of decode steps; None leaves them to torch.
        parts_beside: For adapters' parts; None adds them behind each product.
        products: Which way products take, measured by ``capture`` and ``capture_next``; None: as is usual.
        merges_prompts: Adapters run merged: ``capture`` makes mixed steps under merged weights too, not
            ``capture_next`` alone, which makes no others.
        room: Which sizes have no memory; None: of one rank alone.

    Attributes:
        num_awaited: Steps that were captured, or found no memory, while a batch waited for them.
        gives_up: There was no memory for ``capture`` or ``capture_next``: nothing more is made ahead, until ``clear``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv: KVCachePool,
        pool: LoRAPool,
        drawn: DrawnTokens,
        merge: MergeState | SwappedModels | None,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_blocks: int,
        attention_backend: str,
        lora_backend: str,
        capture: Capture,
        few_rows: FewRows | None = None,
        parts_beside: PartsBeside | None = None,
        products: Products | None = None,
        merges_prompts: bool = False,
        room: CaptureRoom | None = None,
    ) -> None:
        slots = pool.num_slots or max_num_seqs
        self._decodes = [StepShape(rows, rows, max_blocks, slots) for rows in decode_sizes(max_num_seqs)]
        mixed = mixed_sizes(max_num_seqs, max_num_batched_tokens)
        self._mixed = [StepShape(tokens, rows, max_blocks, slots) for tokens, rows in mixed]
        self._model, self._kv, self._pool, self._drawn, self._merge = model, kv, pool, drawn, merge
        self._backends = attention_backend, lora_backend
        self._capture = capture
        self._few_rows, self._parts_beside, self._products = few_rows, parts_beside, products
        num_bytes = max(StepBuffer.num_bytes(shape) for shape in self._decodes + self._mixed)
        self._memory = torch.zeros(num_bytes, dtype=torch.uint8, device=model.device)
        self._inputs = StepInputs(num_bytes, max_blocks, kv.block_size, model.device)
        self._most_rows = max(shape.rows for shape in self._decodes + self._mixed)
        self._logits: torch.Tensor | None = None
        self._steps: dict[Variant, CapturedStep] = {}
        self._merges_prompts = merges_prompts
        self._room = room or CaptureRoom()
        # Captured when a batch came, with products as is usual.
        self._unmeasured: set[Variant] = set()
        self._stood_in: Counter[Variant] = Counter()
        self.num_awaited = 0
        self.gives_up = False

    def shape_for(self, batch: Batch) -> StepShape | None:
        """The smallest captured size that takes a batch; None when it has to run operator by operator."""
        sequences, tokens = batch.sequences, batch.num_tokens
        if not sequences or any(sequence.wants_prompt_logprobs for sequence in sequences):
            return None
        only_decodes = tokens == len(sequences) and all(sequence.samples for sequence in sequences)
        shapes = self._decodes if only_decodes else self._mixed
        first = bisect.bisect_left(shapes, tokens, key=lambda shape: shape.tokens)
        return next((shape for shape in shapes[first:] if len(sequences) <= shape.rows), None)

    def run(self, batch: Batch, shape: StepShape, find_draw: FindDraw, first: int) -> CapturedStep | None:
        """Queue a batch in the size that ``shape_for`` gave, or a larger one.

        Row i of the outputs is the i-th sequence that draws. They stand until the next run. None where there is no
        memory to capture such a step: nothing was done, and the batch has to run operator by operator.

        Args:
            find_draw: As in ``StepInputs.send``.
            first: Where the draws go (``DrawnTokens.begin``).
        """
        layers = self._merge.layers_for_context() if self._merge else None
        slots = {sequence.adapter_slot for sequence in batch.sequences}
        corrected = batch.merged_slot >= 0 and slots != {batch.merged_slot}
        lora = corrected or (batch.merged_slot < 0 and slots != {NO_ADAPTER})
        fuses = shape.decodes and lora and all(self._pool.is_finite(slot) for slot in slots if slot != NO_ADAPTER)
        few = self._has_many_ranks and lora and shape.decodes
        few = few and all(self._pool.max_rank(slot) <= RANKS for slot in slots if slot != NO_ADAPTER)
        variant = self._stand_in(self._variant(shape, lora, corrected, layers, fuses, few))
        step = self._step(variant, layers)
        if step is None:
            return None
        destinations = first, self._drawn.dump
        self._inputs.send(step.inputs, variant.shape, batch.sequences, batch.merged_slot, find_draw, destinations)
        step.replay()
        return step

    def forget(self, request_id: str) -> None:
        """A sequence has ended."""
        self._inputs.forget(request_id)

    def clear(self) -> None:
        """Drop the captured steps with adapters, because other layers have adapters now."""
        self._steps = {variant: step for variant, step in self._steps.items() if not variant.lora}
        # The others have no adapters' parts to put there.
        self._pool.workspace.forget_graphs()
        self._stood_in.clear()
        self._room.forget()
        self.gives_up = False

    def close(self) -> None:
        """Drop all captured steps: NCCL waits for those that use a group of ranks before it ends the group."""
        self._steps.clear()

    def capture(self, *, lora: bool, progress: bool = False) -> None:
        """Make steps ahead of time, the largest first, so that the smaller ones find memory in its pool.

        Args:
            lora: With those that adapters need, unmerged and merged.
        """
        wanted = [(self._variant(shape, False, False, None, False), None) for shape in self._largest_first()]
        if lora:
            wanted += [*self._unmerged(), *self._merged(self._merges_prompts)]
        wanted.sort(key=lambda one: (one[0].shape.decodes, -one[0].shape.tokens))
        # A bar in a terminal alone: in a worker's log its lines would be noise.
        bar = tqdm(wanted, desc="CUDA graphs", unit="graph", disable=None if progress else True)
        with self._measuring():
            for variant, merged in bar:
                # Where memory to measure ended, the rest keep usual plans: made again by one rank alone, they would
                # leave it and the others waiting for each other.
                if variant not in self._steps and not self._make(variant, merged):
                    # What is left is for batches, which have to run.
                    self.gives_up = True
                    break

    @property
    def lacks_steps(self) -> bool:
        """Whether there is anything for ``capture_next`` to do."""
        return not self.gives_up and self._next_missing() is not None

    def capture_next(self) -> None:
        """Make a step that adapters need, before it comes; or again, where it came before it was measured."""
        if (found := self._next_missing()) is not None:
            variant, merged = found
            self._unmeasured.discard(variant)
            with self._measuring():
                self.gives_up = not self._make(variant, merged)

    def _next_missing(self) -> tuple[Variant, MergedLayers | None] | None:
        unmerged = () if self._merges_prompts else self._unmerged()
        wanted = itertools.chain(unmerged, self._merged(with_prompts=True))
        return next((one for one in wanted if one[0] not in self._steps or one[0] in self._unmeasured), None)

    def _largest_first(self) -> Iterator[StepShape]:
        """Decodes before mixed steps."""
        return reversed(self._mixed + self._decodes)

    def _unmerged(self) -> Iterator[tuple[Variant, None]]:
        """Steps that adapters need where none is merged, and then those of adapters that all have few ranks."""
        for few in dict.fromkeys((False, self._has_many_ranks)):
            for shape in reversed(self._decodes) if few else self._largest_first():
                yield self._variant(shape, True, False, None, shape.decodes, few), None

    def _merged(self, with_prompts: bool) -> Iterator[tuple[Variant, MergedLayers]]:
        """Steps under merged weights, those of the merged adapter alone first; none where weights are merged in place.

        ``with_prompts``: Also the mixed ones, of the merged adapter alone: others join few of them.
        """
        layers = self._merge.layers_for_capture() if self._merge else None
        if layers is None:
            return
        for shape in self._largest_first() if with_prompts else reversed(self._decodes):
            yield self._variant(shape, False, False, layers, False), layers
        for shape in reversed(self._decodes):
            yield self._variant(shape, True, True, layers, False), layers

    def _measuring(self) -> AbstractContextManager[None]:
        return self._products.measuring() if self._products is not None else nullcontext()

    def _variant(
        self, shape: StepShape, lora: bool, corrected: bool, merged: MergedLayers | None, fuses: bool, few: bool = False
    ) -> Variant:
        """``few``: No adapter has more than ``RANKS`` ranks, though others have."""
        key = merged.key if merged is not None else None
        is_plain = not corrected and merged is None
        fuses = fuses and self._few_rows is not None and is_plain
        return Variant(shape, lora, corrected, key, fuses, few and is_plain)

    @property
    def _has_many_ranks(self) -> bool:
        """Whether launches are made for more ranks than most adapters have, who need not pay for them."""
        return self._pool.workspace.ranks > RANKS

    def _stand_in(self, variant: Variant) -> Variant:
        """What a batch is to run in: capturing takes some dozen times a step, while everybody waits.

        So a variant that is not there is computed in one of up to twice its tokens that is, unless it comes often and
        has memory.
        """
        if variant.few_ranks and variant not in self._steps:
            # Right for them too, and only slower: they are made when there is no work.
            variant = variant._replace(few_ranks=False)
        comes_often = self._stood_in[variant] >= _STAND_INS and not self._room.lacks(variant.shape)
        if variant in self._steps or comes_often:
            return variant
        least = variant.shape
        for shape in self._decodes if least.decodes else self._mixed:
            if least.tokens <= shape.tokens <= 2 * least.tokens and least.rows <= shape.rows:
                larger = variant._replace(shape=shape)
                if larger in self._steps:
                    self._stood_in[variant] += 1
                    return larger
        return variant

    def _step(self, variant: Variant, merged: MergedLayers | None) -> CapturedStep | None:
        """For a batch that is there."""
        if variant not in self._steps and not self._room.lacks(variant.shape):
            self.num_awaited += 1
            if self._make(variant, merged) and self._products is not None:
                self._unmeasured.add(variant)
        return self._steps.get(variant)

    def _make(self, variant: Variant, merged: MergedLayers | None) -> bool:
        """Capture a step, also in the place of one that is there; False: there is no memory for it."""
        made = self._room.attempt(variant.shape, lambda: self._build(variant, merged))
        if made is not None:
            self._steps[variant] = made
        return made is not None

    def _drop_outgrown(self, layers: MergedLayers) -> None:
        """Steps of these weights from when they were of fewer layers: no batch asks for them again."""
        self._steps = {v: step for v, step in self._steps.items() if not _is_older(v.merged, layers.key)}

    @torch.inference_mode()
    def _build(self, variant: Variant, merged: MergedLayers | None) -> CapturedStep:
        shape = variant.shape
        if merged is not None:
            self._drop_outgrown(merged)
        inputs = StepBuffer.over(self._memory, shape)
        # Until the first real batch arrives, nothing is written anywhere: no row has a place in the KV cache.
        inputs.memory.zero_()
        inputs.slot_mapping.fill_(-1)
        if shape.decodes:
            inputs.query_start_loc.copy_(torch.arange(shape.rows + 1))
        inputs.destinations.fill_(self._drawn.dump)
        inputs.sources.fill_(-1)
        outputs: list[torch.Tensor] = []

        def run() -> None:
            outputs[:] = self._forward(inputs, shape, self._context(inputs, variant, merged))

        workspace = self._pool.workspace
        with workspace.made_for(RANKS if variant.few_ranks else workspace.ranks):
            replay = self._capture(run)
        return CapturedStep(inputs, replay, outputs)

    def _forward(
        self, inputs: StepBuffer, shape: StepShape, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = self._drawn.fill_pending(inputs.input_ids, inputs.sources)
        with context:
            output = self._model(
                input_ids=ids[None],
                position_ids=inputs.positions[None],
                use_cache=False,
                logits_to_keep=0 if shape.decodes else inputs.logits_rows,
            )
        logits = self._kept(output.logits[0])
        tokens, status = best_tokens(logits)
        self._drawn.tokens.index_copy_(0, inputs.destinations, tokens)
        return logits, tokens, status

    def _kept(self, logits: torch.Tensor) -> torch.Tensor:
        """In memory that all steps share. Each step's own would stay as long as its graph: 6 GB for those of an 8B
        Llama with adapters, and who counts KV blocks knows nothing of it."""
        if self._logits is None:  # In the first run, which is no capture: what is made in one belongs to its graph.
            self._logits = logits.new_empty(self._most_rows, logits.shape[1])
        return self._logits[: len(logits)].copy_(logits)

    def _context(self, inputs: StepBuffer, variant: Variant, merged: MergedLayers | None) -> ForwardContext:
        """Fresh for each pass: what back ends derive once a pass must be derived inside of the graph."""
        tokens, rows = variant.shape.tokens, variant.shape.rows
        make = partial(plans_of, variant, self._pool.addressed_weights, self._backends[1])
        lora, correction = make(inputs.lora, tokens)
        of_logits = (lora, correction) if variant.shape.decodes else make(inputs.lora_logits, rows)
        return ForwardContext(
            attention=attention_of(inputs, variant.shape, self._kv.block_size, self._backends[0]),
            kv_caches=self._kv.caches,
            lora=lora,
            lora_logits=of_logits[0],
            lora_weights=self._pool.addressed_weights if variant.lora else (),
            few_rows=self._few_rows if variant.shape.decodes else None,
            parts_beside=self._parts_beside,
            products=self._products,
            merged=merged,
            lora_correction=correction,
            lora_logits_correction=of_logits[1],
        )


def _is_older(key: tuple[int, ...] | None, than: tuple[int, ...]) -> bool:
    """Of two ``MergedLayers.key``."""
    return key is not None and key != than and key[0] == than[0] and all(map(operator.le, key[1:], than[1:]))
