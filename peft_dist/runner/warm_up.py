"""What runs before the first request: the largest batch, and whatever has kernels compiled that later steps launch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from peft_dist.core.batch import Batch, ScheduledSequence, SequenceStart
from peft_dist.core.config import EngineConfig
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.kernels import attention_backends
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.kernels.lora_tiles import DECODE_TILE_ROWS, TILE_ROWS
from peft_dist.runner.adapter_store import AdapterStore
from peft_dist.runner.model_runner import ModelRunner
from peft_dist.runner.step_variants import MOST_MIXED_TOKENS

_CHUNK = 128
# Kernels of fewer decodes are the same ones.
_FEW_DECODES = 64


def run_largest_batch(
    model: PreTrainedModel,
    shapes: list[tuple[int, int]],
    store: AdapterStore,
    config: EngineConfig,
    lora_backend: str,
    attention_backend: str,
) -> None:
    """Run it on a KV pool just big enough, so that the model's peak memory is known."""
    blocks = -(-config.max_num_batched_tokens // config.block_size)
    kv = KVCachePool(shapes, blocks, config.block_size, model.dtype, model.device)
    runner = ModelRunner(model, kv, store, (), lora_backend, attention_backend)
    start = SequenceStart("warm-up", [0] * config.max_num_batched_tokens, [], SamplingParams(temperature=0.0), 0, 0)
    sequence = ScheduledSequence("warm-up", start.prompt_token_ids, 0, list(range(blocks)), samples=True)
    runner.finish(runner.start(Batch(0, [sequence], [start])))


class Rehearsal(NamedTuple):
    """A batch that launches one kind of kernels (``ModelRunner.rehearse``): tokens of its sequences, rows of tiles."""

    lengths: tuple[int, ...]
    tile_rows: int


def rehearsals(config: EngineConfig, max_model_len: int, *, captured: bool) -> Iterator[Rehearsal]:
    """One of each kind of steps with adapters that are not captured, the largest first.

    Left out is what few batches have: prompts whose tokens are scored where all else is captured, and outputs of
    adapters that target the output layer.

    Args:
        captured: Batches of decodes, and mixed ones of up to ``MOST_MIXED_TOKENS``, are captured steps.
    """
    tokens = config.max_num_batched_tokens
    if captured and tokens <= MOST_MIXED_TOKENS:
        return
    chunks = _chunks(tokens, config.max_num_seqs, max_model_len)
    for tile_rows in reversed(TILE_ROWS):
        yield Rehearsal(chunks, tile_rows)
    if captured:
        return
    # A decode beside chunks, and fewer tiles and sequences, each a quarter of the former.
    yield Rehearsal((*chunks[:-1], 1), DECODE_TILE_ROWS)
    tiles = sum(chunks) // DECODE_TILE_ROWS
    while tiles > 1:
        tiles = max(tiles // 4, 1)
        yield Rehearsal(_chunks(tiles * DECODE_TILE_ROWS, config.max_num_seqs, max_model_len), DECODE_TILE_ROWS)
    decodes = min(config.max_num_seqs, tokens)
    while decodes > _FEW_DECODES:
        yield Rehearsal((1,) * decodes, DECODE_TILE_ROWS)
        decodes //= 2
    yield Rehearsal((1,) * decodes, DECODE_TILE_ROWS)
    yield Rehearsal((1,), DECODE_TILE_ROWS)


def _chunks(tokens: int, max_num_seqs: int, max_model_len: int) -> tuple[int, ...]:
    """Lengths of up to ``max_num_seqs`` sequences that have so many tokens together, as far as they can."""
    each = min(max(_CHUNK, -(-tokens // max_num_seqs)), max_model_len)
    whole, rest = divmod(tokens, each)
    return ((each,) * whole + (rest,) * (rest > 0))[:max_num_seqs]


class Rehearse(Protocol):
    """``ModelRunner.rehearse``."""

    def __call__(self, lengths: Sequence[int], tile_rows: int, *, corrected: bool = False) -> None: ...


class KernelWarmUp:
    """Has the kernels compiled that steps with adapters launch operator by operator, before such a step comes.

    Which those are is known when adapters have been registered. Compiled kernels stay on disk, where later processes
    find them. Does nothing for replicas that have no kernels of Triton for adapters, or no use for them.
    """

    def __init__(
        self, runner: ModelRunner, config: EngineConfig, max_model_len: int, rehearse: Rehearse | None = None
    ) -> None:
        """``rehearse``: The runner's, where that is not all there is to it."""
        self._runner, self._config, self._max_model_len = runner, config, max_model_len
        self._rehearse: Rehearse = rehearse or runner.rehearse
        self._todo: deque[Rehearsal] = deque()

    def begin(self) -> None:
        """Other layers have adapters from now on: start over."""
        if self.is_of_use:
            captured = self._runner.graphs is not None
            self._todo = deque(rehearsals(self._config, self._max_model_len, captured=captured))

    @property
    def are_left(self) -> bool:
        """Whether ``go_on`` has something to do."""
        return bool(self._todo)

    def go_on(self) -> bool:
        """One batch more; False: there was none left. For the thread that runs the model, between any two steps."""
        if not self._todo:
            return False
        self._rehearse(*self._todo.popleft(), corrected=self._config.merged_minority)
        return True

    def finish(self, *, progress: bool = False) -> None:
        """All that are left."""
        if not self._todo:
            return
        with tqdm(
            total=len(self._todo), desc="adapter kernels", unit="batch", disable=None if progress else True
        ) as bar:
            while self.go_on():
                bar.update()

    @property
    def is_of_use(self) -> bool:
        """Whether this replica has kernels of Triton for adapters, and runs batches that use them."""
        config = self._config
        return self.are_steps_of_use and config.exec_type == "dlora" and config.policy != "merge"

    @property
    def are_steps_of_use(self) -> bool:
        """Whether steps that adapters need can be captured before they come, unmerged ones or merged ones alone."""
        runner, config = self._runner, self._config
        if runner.lora_backend != "triton" or config.exec_type == "vllm":
            return False
        found = attention_backends.load(runner.attention_backend, runner.device)
        # Those that captured steps may have know padding, which is what a rehearsal's rows are to the cache.
        return not isinstance(found, str) and found.graph_capturable
