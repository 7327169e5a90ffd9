"""Whether steps are captured as CUDA graphs, with which attention, and the memory that this takes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.kernels import attention_backends
from peft_dist.kernels.attention_interface import BackendUnavailableError
from peft_dist.kernels.backend import has_triton
from peft_dist.kernels.capture import CudaCapture
from peft_dist.kernels.cpu_build import cache_dir
from peft_dist.kernels.few_rows import FewRows
from peft_dist.kernels.graph_timing import graph_milliseconds
from peft_dist.kernels.lora_fused_plans import chooser_for
from peft_dist.kernels.lora_parts_beside import PartsBeside
from peft_dist.kernels.lora_plans import table_name
from peft_dist.kernels.product_bench import SPARED
from peft_dist.kernels.product_plans import WAYS_VERSION, ProductPlans, shipped_plans
from peft_dist.kernels.products import Products
from peft_dist.runner.capture_room import make_room
from peft_dist.runner.model_runner import ModelRunner
from peft_dist.runner.rank_group import RankGroup
from peft_dist.runner.step_graphs import StepGraphs
from peft_dist.runner.step_variants import MOST_MIXED_TOKENS, decode_sizes, mixed_sizes

logger = logging.getLogger(__name__)

# What the driver keeps of each of a model's layers in a captured step: of some ten kernels; and where ranks add up, of
# all-reduces, each of which NCCL keeps more for.
_BYTES_PER_LAYER, _BYTES_PER_SPLIT_LAYER = 200 << 10, 800 << 10
_KINDS_OF_DECODES, _KINDS_OF_MIXED, _KINDS_OF_MERGED_MIXED = 5, 2, 1
# Replays of a product's way.
_ROUNDS = 3
# Of a device's multiprocessors.
_MOST_SPARED = 0.6


def choose_attention(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]
) -> str:
    """As ``attention_backends.choose``, for a model with these (num_kv_heads, head_dim) of layers.

    Raises:
        ConfigError: what was asked for cannot run.
    """
    blocks, wanted, captured = config.block_size, config.attention_backend, _wants_captures(config, device)
    try:
        return attention_backends.choose(device, dtype, shapes, blocks, wanted, config.compile_kernels, captured)
    except BackendUnavailableError as error:
        raise ConfigError(f"attention_backend={wanted!r}: {error}") from error


def are_captured(config: EngineConfig, device: torch.device, attention_backend: str) -> bool:
    """Whether the steps of this replica can be captured, and shall be."""
    if not _wants_captures(config, device):
        return False
    found = attention_backends.load(attention_backend, device)
    if isinstance(found, str) or not found.graph_capturable:
        logger.warning("attention by %r cannot be captured: steps run operator by operator", attention_backend)
        return False
    return True


def graph_bytes(config: EngineConfig, vocab_size: int, num_layers: int, activation_bytes: int) -> int:
    """Device bytes to leave for captured steps.

    Args:
        num_layers: Of the model.
        activation_bytes: What the largest batch, of ``max_num_batched_tokens``, takes while it runs.
    """
    share = min(MOST_MIXED_TOKENS / config.max_num_batched_tokens, 1.0)
    logits = 4 * config.max_num_seqs * vocab_size
    mixed = mixed_sizes(config.max_num_seqs, config.max_num_batched_tokens)
    merges = config.merge in ("auto", "shadow") and config.policy != "fcfs"
    of_mixed = _KINDS_OF_MIXED + _KINDS_OF_MERGED_MIXED * merges
    graphs = _KINDS_OF_DECODES * len(decode_sizes(config.max_num_seqs)) + of_mixed * len(mixed)
    of_layer = _BYTES_PER_SPLIT_LAYER if config.tensor_parallel_size > 1 else _BYTES_PER_LAYER
    return int(activation_bytes * share) + logits + graphs * num_layers * of_layer


def make_graphs(config: EngineConfig, runner: ModelRunner, max_model_len: int, ranks: RankGroup) -> StepGraphs:
    """Nothing is captured yet."""
    few_rows, parts_beside = make_few_rows(config, runner.device), make_parts_beside(runner.device)
    beside = [runner.store.pool.workspace.stream, parts_beside.stream if parts_beside is not None else None]
    return StepGraphs(
        runner.model,
        runner.kv,
        runner.store.pool,
        runner.drawn,
        runner.merge,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_blocks=-(-max_model_len // config.block_size),
        attention_backend=runner.attention_backend,
        lora_backend=runner.lora_backend,
        capture=CudaCapture(runner.device, (stream for stream in beside if stream is not None)),
        few_rows=few_rows,
        parts_beside=parts_beside,
        products=make_products(runner.device, few_rows, parts_beside),
        merges_prompts=config.policy == "merge" or config.exec_type == "peft",
        room=make_room(ranks, runner.device),
    )


def make_parts_beside(device: torch.device) -> PartsBeside | None:
    """Adapters' parts are computed beside products on the cards that this was measured on."""
    return PartsBeside(device) if _is_measured(device) else None


def make_few_rows(config: EngineConfig, device: torch.device) -> FewRows | None:
    """Decode steps of few rows multiply by our kernel on the cards that it was measured on, of a whole model."""
    if not _is_measured(device) or config.tensor_parallel_size > 1:
        return None
    return FewRows(device, chooser_for(torch.cuda.get_device_name(device)))


def make_products(device: torch.device, few_rows: FewRows | None, parts_beside: PartsBeside | None) -> Products | None:
    """Products are measured on the cards whose ways these are; what was found is kept in the user's cache."""
    if not _is_measured(device):
        return None
    name = torch.cuda.get_device_name(device)
    about = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "ways": WAYS_VERSION}
    plans = ProductPlans(cache_dir() / "products" / table_name(name), about, shipped_plans(name))
    most = _MOST_SPARED * torch.cuda.get_device_properties(device).multi_processor_count
    spared = [count for count in SPARED if count <= most]
    return Products(plans, few_rows, parts_beside, partial(graph_milliseconds, rounds=_ROUNDS), spared)


def _wants_captures(config: EngineConfig, device: torch.device) -> bool:
    return device.type == "cuda" and not config.enforce_eager


def _is_measured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0) and has_triton()
