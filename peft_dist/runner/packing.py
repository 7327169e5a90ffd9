"""Whether a model's weights are multiplied from the CPU library's own layout."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from peft_dist.patches.packed_linear import pack_linear, pack_linears
from peft_dist.patches.siblings import find_siblings

logger = logging.getLogger(__name__)


def pack_weights(model: PreTrainedModel, wanted: bool | None) -> None:
    """Pack every nn.Linear; None packs when the copies fit into half of the memory that is free now."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    needed = sum(linear.weight.nbytes for linear in linears)
    if wanted is None:
        wanted = needed < _free_memory() // 2
    if not wanted:
        return
    grouped = [group for group in find_siblings(model, nn.Linear) if pack_linears(group)]
    members = {id(member) for group in grouped for member in group}
    packed = len(members) + sum(pack_linear(linear) for linear in linears if id(linear) not in members)
    logger.info("packed %d of %d linear layers (%.0f MiB)", packed, len(linears), needed / 2**20)


def _free_memory() -> int:
    """Bytes that can still be allocated; 0 where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (FileNotFoundError, KeyError):
        return 0
