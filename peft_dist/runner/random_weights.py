"""A model with random weights, drawn where they are to be, a module at a time."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_dist.core.config import EngineConfig
from peft_dist.patches.sharding import ModulePart


def random_model(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    options: EngineConfig,
    shrink: Callable[[PreTrainedModel], Mapping[str, ModulePart]] | None = None,
) -> PreTrainedModel:
    """The model as it initialises itself before training, made on ``device`` in ``dtype``.

    Weights depend on the seed and the module's path alone, so that ranks have parts of what one process has. Beside its
    part a rank never holds more than one whole weight.

    Args:
        shrink: Drops other ranks' weights from a model that has none yet, and tells what is left of each module.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=options.trust_remote_code)
    whole = {path: (m.weight.shape, getattr(m, "padding_idx", None)) for path, m in _plain_modules(model)}
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = output is not None and output.weight is embedding.weight
    parts = {} if shrink is None else shrink(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for path, module in model.named_modules():
            module.to_empty(device=device, recurse=False)
            torch.manual_seed(zlib.crc32(path.encode(), options.seed or 0))
            if path in parts:
                (shape, padding), turned = whole[path], isinstance(module, nn.Embedding)
                module.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
                model._init_weights(module)
                if padding is not None:
                    # Not the part's any more, whose rows have other numbers.
                    nn.init.zeros_(module.weight[padding])
                module.weight = nn.Parameter(parts[path].of_weight(module.weight, turned=turned).clone())
            else:
                model._init_weights(module)
    if is_tied:
        output.weight = embedding.weight
    return model


def _plain_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding))
