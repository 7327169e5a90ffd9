"""How a loaded model is made fast before anything else is put around it."""

from __future__ import annotations

import logging

from torch import nn
from transformers import PreTrainedModel

from peft_dist.core.config import EngineConfig
from peft_dist.patches.fused_model import fuse
from peft_dist.patches.packed_linear import pack_linear, pack_linears
from peft_dist.patches.siblings import find_siblings
from peft_dist.runner.memory import free_memory

logger = logging.getLogger(__name__)


def prepare_layers(model: PreTrainedModel, config: EngineConfig) -> None:
    """On a CPU multiply with the library's own layout of the weights; elsewhere join weights and fuse kernels."""
    if model.device.type == "cpu":
        pack_weights(model, config.pack_weights)
    elif config.fuse:
        fuse(model)


def pack_weights(model: PreTrainedModel, wanted: bool | None) -> None:
    """Pack every nn.Linear; None packs when the copies fit into half of the memory that is free now."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    needed = sum(linear.weight.nbytes for linear in linears)
    if wanted is None:
        wanted = needed < free_memory() // 2
    if not wanted:
        return
    grouped = [group for group in find_siblings(model, nn.Linear) if pack_linears(group)]
    members = {id(member) for group in grouped for member in group}
    packed = len(members) + sum(pack_linear(linear) for linear in linears if id(linear) not in members)
    logger.info("packed %d of %d linear layers (%.0f MiB)", packed, len(linears), needed / 2**20)
