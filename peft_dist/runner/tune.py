"""Measure plans of the LoRA kernels for a model's layers on the present GPU, and keep them as a table."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from peft_dist.core.errors import ConfigError
from peft_dist.kernels.backend import has_triton
from peft_dist.kernels.lora_plans import (
    GroupPlan,
    GroupShape,
    default_plan,
    read_table,
    table_name,
    user_folder,
    write_table,
)
from peft_dist.patches.siblings import find_siblings

if TYPE_CHECKING:
    from peft_dist.kernels.lora_bench import GroupBench

logger = logging.getLogger(__name__)

Sizes = tuple[int, tuple[int, ...]]


def group_sizes(model: nn.Module) -> list[Sizes]:
    """(inputs, outputs of each) of the linear layers that are launched together, each size once; no output layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    groups = find_siblings(model, nn.Linear)
    joined = {id(layer) for group in groups for layer in group}
    alone = [m for m in model.modules() if type(m) is nn.Linear and id(m) not in joined and m is not head]
    sizes = [(group[0].in_features, tuple(layer.out_features for layer in group)) for group in groups]
    return list(dict.fromkeys([*sizes, *((layer.in_features, (layer.out_features,)) for layer in alone)]))


def model_sizes(name: str) -> list[Sizes]:
    """Of a model that is built from its configuration alone, without weights.

    Raises:
        ConfigError: there is no such model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r} is no model that can be tuned for: {error}") from error
    return group_sizes(model)


def tune(
    sizes: list[Sizes],
    *,
    rank: int,
    max_loras: int,
    max_num_seqs: int,
    max_tokens: int,
    tile_rows: tuple[int, ...] = (16, 32, 64, 128),
    dtype: torch.dtype = torch.bfloat16,
    folder: Path | None = None,
    seconds: float = math.inf,
) -> Path:
    """Measure, and write each plan into the card's table as soon as it is known; others in the table stay.

    Args:
        sizes: Of ``group_sizes``.
        folder: None takes that of the user (``lora_plans.user_folder``).
        seconds: Within so many. Each shape has a share of what is left; the most frequent come first, with larger ones.

    Raises:
        ConfigError: there is no GPU, or no Triton.
    """
    if not torch.cuda.is_available() or not has_triton():
        raise ConfigError("plans of GPU kernels are measured on a GPU with Triton, and this machine lacks one of them")
    from peft_dist.kernels import lora_tune
    from peft_dist.kernels.lora_bench import GroupBench

    name = torch.cuda.get_device_name()
    path = (folder or user_folder()) / table_name(name)
    plans: dict[GroupShape, GroupPlan] = dict(read_table(path)) if path.is_file() else {}
    about = {"device": name, "torch": torch.__version__, "rank": rank, "dtype": str(dtype).removeprefix("torch.")}
    every = [shape for size in sizes for shape in lora_tune.shapes_of(*size, max_num_seqs, max_loras, max_tokens, rank)]
    work = lora_tune.in_order([shape for shape in every if shape.tile_rows in tile_rows])
    benches: dict[Sizes, GroupBench] = {}
    end = time.monotonic() + seconds
    with torch.inference_mode(), tqdm(work, desc="LoRA plans", unit="shape") as progress:
        for index, shape in enumerate(progress):
            left = end - time.monotonic()
            if left <= 0:
                logger.warning("time is up: %d of %d shapes keep the plans that they had", len(work) - index, len(work))
                break
            until = time.monotonic() + left * lora_tune.share_of(shape) / sum(map(lora_tune.share_of, work[index:]))
            progress.set_postfix_str(f"{shape.max_tiles} tiles of {shape.tile_rows} rows, {left:.0f} s left")
            bench = benches.get(shape[2:4]) or benches.setdefault(shape[2:4], GroupBench(*shape[2:4], rank, dtype))
            plans[shape] = find_plan(bench, shape, until)
            write_table(path, list(plans.items()), about)
            logger.info("%s: %s", shape, plans[shape])
    return path


def find_plan(bench: GroupBench, shape: GroupShape, until: float) -> GroupPlan:
    """The best that is found for a shape by this time of ``time.monotonic``."""
    from peft_dist.kernels import lora_tune

    fields = lora_tune.fields_of(shape, bench.has_gate)
    measure = partial(bench.measure, shape)
    return lora_tune.descend(shape, default_plan(shape), fields, measure, lambda: time.monotonic() >= until)
