"""Models with LoRA layers around everything, adapters for them, and a digest of their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from peft_dist.forward_context import ForwardContext
from peft_dist.kernels.lora_pool import LayerTensors, LoRAPool
from peft_dist.patches.host_merger import HostMerger
from peft_dist.patches.lora_layers import SelectiveEmbedding, SelectiveLayer, join_siblings
from peft_dist.patches.lora_wrapping import can_wrap, wrap_module
from peft_dist.patches.merging import Merger
from peft_dist.patches.shadow_merger import ShadowMerger
from peft_dist.runner.merge_state import plans_for

WAYS = {"shadow": ShadowMerger, "host": HostMerger}


def wrap_all(
    model: PreTrainedModel, names: Collection[str], pool: LoRAPool | None = None
) -> tuple[dict[str, SelectiveLayer], LoRAPool]:
    """LoRA layers by path around the modules whose last path part is in ``names``, and a pool that knows them."""
    paths = [n for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in names and can_wrap(m)]
    pool = pool or LoRAPool(model.device, torch.float32)
    layers = {path: wrap_module(model, path) for path in paths}
    for layer in layers.values():
        is_embedding = isinstance(layer, SelectiveEmbedding)
        layer.lora_index = pool.add_layer(layer.in_features, layer.out_features, embedding=is_embedding)
    join_siblings(model)
    return layers, pool


def random_tensors(layers: Mapping[str, SelectiveLayer], rank: int, seed: int) -> dict[str, LayerTensors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (
            torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5,
            torch.randn(layer.out_features, rank, generator=generator) / rank,
            1.5,
        )
        for path, layer in layers.items()
    }


def run(
    model: nn.Module, pool: LoRAPool, merger: Merger, slots: Sequence[int], merged: int | None, ids: torch.Tensor
) -> torch.Tensor:
    """Logits of a batch in which row i wants the adapter in slot ``slots[i]``."""
    lora, correction = plans_for(np.repeat(slots, ids.shape[1]), merged)
    context = ForwardContext(
        merged=merger.layers,
        lora=lora,
        lora_logits=lora,
        lora_correction=correction,
        lora_logits_correction=correction,
        lora_weights=pool.weights,
    )
    with torch.no_grad(), context:
        logits: torch.Tensor = model(ids).logits
    assert not context.shared, "outputs that nobody took"
    return logits


def digest(model: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, the same with and without LoRA layers around some."""
    sha = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        sha.update(f"{name.replace('.base_layer', '')} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()
