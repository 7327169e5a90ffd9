"""Hugging Face's decoder modules with fewer and larger kernels: joined weights, and fused norms, gates and rotary.

Modules are recognised by their code, not by their names, and those that are not are left as they are. Outside of a
ForwardContext, with gradients, and where no kernel fits the original code runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peft_dist.kernels.glue import implementation
from peft_dist.patches.catalog import FUSED_ATTENTION, FUSED_LAYER, FUSED_MLP, FUSED_NORM
from peft_dist.patches.forms import is_known
from peft_dist.patches.fused_attention import FusedAttention, match_attention
from peft_dist.patches.fused_layer import FusedLayer, following_norms, match_layer
from peft_dist.patches.fused_mlp import FusedMLP, match_mlp
from peft_dist.patches.fused_norm import FusedNorm, match_norm
from peft_dist.patches.fusion import Fusion, is_fused, put_on, take_off
from peft_dist.patches.joined_linear import JoinedLinear
from peft_dist.patches.joining import join_weights, part_weights
from peft_dist.patches.registry import Patch, UnsupportedVersionError

logger = logging.getLogger("peft_dist.patches")

_Match = Callable[[nn.Module], dict[str, Any] | None]
_KINDS: dict[str, tuple[Patch, type[nn.Module], _Match]] = {
    "norms": (FUSED_NORM, FusedNorm, match_norm),
    "mlps": (FUSED_MLP, FusedMLP, match_mlp),
    "attention": (FUSED_ATTENTION, FusedAttention, match_attention),
    "layers": (FUSED_LAYER, FusedLayer, match_layer),
}


@dataclass(frozen=True, slots=True)
class Fused:
    """What of a model is fused.

    Attributes:
        joined: Groups of layers whose weights lie in one buffer.
        modules: How many modules of each kind run fused code ("norms", "mlps", "attention", "layers").
        notes: Why a kind was not tried.
    """

    joined: int = 0
    modules: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {kind}" for kind, number in self.modules.items())
        return "; ".join([f"{self.joined} groups of weights joined, fused: {counts}", *self.notes])


def fuse(model: nn.Module, backend: str | None = None) -> Fused:
    """Join weights and fuse what is recognised, in place. Idempotent; on an error nothing has changed.

    The modules, Parameters, ``state_dict`` and files of the model stay what they are; a copy of it is not fused.
    To be called before LoRA layers are put around modules, or after.

    Args:
        model: Any model; one without a match is left as it is.
        backend: None runs the kernels for tensors on a GPU where Triton is installed, and the original code elsewhere.
            "triton" runs them for all tensors (on a CPU that takes Triton's interpreter), "reference" their plain
            twins, for tests.

    Returns:
        What is fused now.
    """
    if backend is not None:
        implementation(backend)
    notes = []
    with ExitStack() as undo:
        if join_weights(model):
            undo.callback(part_weights, model)
        for kind, (patch, mixin, match) in _KINDS.items():
            reason = _reason_against(patch)
            if reason is not None:
                notes.append(f"no {kind}: {reason}")
                continue
            for module, options in list(_found(model, match)):
                undo.callback(take_off, module)
                put_on(module, mixin, Fusion(backend, options))
        _hand_to_next(model)
        undo.pop_all()
    report = fused_of(model, tuple(notes))
    logger.info("%s: %s", type(model).__name__, report)
    return report


def unfuse(model: nn.Module) -> None:
    """Undo ``fuse``: every class and attribute is the identical object again, every Parameter has its own memory.

    No adapter may be merged beside the weights while this is called.
    """
    for module in list(model.modules()):
        take_off(module)
    part_weights(model)


def fused_of(model: nn.Module, notes: tuple[str, ...] = ()) -> Fused:
    """What of a model is fused."""
    kinds = {mixin: kind for kind, (_, mixin, _) in _KINDS.items()}
    counts = dict.fromkeys(_KINDS, 0)
    joints = set()
    for module in model.modules():
        if is_fused(module):
            counts[kinds[type(module).__mro__[1]]] += 1
        elif type(module) is JoinedLinear:
            joints.add(module._joint)
    return Fused(len(joints), counts, notes)


def _found(model: nn.Module, match: _Match) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    for module in model.modules():
        if not is_fused(module) and (options := match(module)) is not None:
            yield module, options


def _hand_to_next(model: nn.Module) -> None:
    norms = following_norms(model)
    for module in model.modules():
        if is_fused(module) and isinstance(module, FusedLayer):
            module.__dict__["_fusion"].options["next_norm"] = norms.get(module)


def _reason_against(patch: Patch) -> str | None:
    try:
        patch.check_version()
    except UnsupportedVersionError as error:
        return str(error)
    if not is_known(patch):
        return f"{patch.file} does not know the code of the installed {patch.library}"
    return None
