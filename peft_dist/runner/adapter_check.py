"""Whether an adapter's tensors fit the base model and its configuration, decided from names and shapes alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peft_dist.core.errors import UnfitAdapterError
from peft_dist.runner.adapter_config import LoraSettings
from peft_dist.runner.adapter_modules import ModuleShape

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."
_LINEAR_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.(.+))?\.weight")
_EMBEDDING_KEY = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.(.+))?")
_COPY_KEY = re.compile(r"(.+?)(?:\.base_layer)?\.weight")
_FOREIGN = {
    "lora_magnitude_vector": "DoRA",
    "lora_diag": "KaSA",
    "trainable_tokens": "trained token embeddings",
    "modules_to_save": "trained copies of whole modules",
    "original_module": "trained copies of whole modules",
}

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Names of the two tensors of one module."""

    A: str
    B: str


@dataclass(frozen=True, slots=True)
class TensorMap:
    """What each tensor of the file is.

    Attributes:
        pairs: The adapter, by module path in sorted order.
        copies: Tensor name -> module path of saved base weights, which change nothing when they equal the base.
    """

    pairs: dict[str, Pair]
    copies: dict[str, str]


def map_tensors(shapes: Shapes, modules: Mapping[str, ModuleShape], settings: LoraSettings) -> TensorMap:
    """Assign every tensor to a module and check all shapes and ranks.

    Args:
        shapes: Shape of each tensor in the file, by name.
        modules: The base model.
        settings: The adapter's configuration.

    Raises:
        UnfitAdapterError: a tensor lands nowhere, lacks its partner, or has the wrong shape or rank; or it belongs to a
            module that the configuration does not name, so that PEFT would leave it out.
    """
    sides, copies = _sort_tensors(shapes, modules, settings)
    if not sides:
        raise UnfitAdapterError("the file holds no LoRA tensors: save the adapter with PEFT's save_pretrained")
    pairs = {path: _pair(path, sides[path]) for path in sorted(sides)}
    for path, pair in pairs.items():
        _check_shapes(path, shapes[pair.A], shapes[pair.B], modules[path], settings.rank(path))
    _check_targets(pairs, modules, settings)
    return TensorMap(pairs, copies)


def _sort_tensors(
    shapes: Shapes, modules: Mapping[str, ModuleShape], settings: LoraSettings
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Tensor names by module path and side ("A", "B"), and the saved base weights."""
    sides: dict[str, dict[str, str]] = {}
    copies: dict[str, str] = {}
    adapter_names: set[str | None] = set()
    homeless: list[str] = []
    for name, shape in shapes.items():
        if located := _locate(name, modules):
            path, side, adapter_name = located
            adapter_names.add(adapter_name)
            sides.setdefault(path, {})[side] = name
        elif (copied := _copied_module(name, modules)) is not None:
            _check_copy(name, shape, modules[copied])
            copies[name] = copied
        else:
            homeless.append(name)
    if homeless:
        raise _homeless(homeless, settings)
    if len(adapter_names) > 1:
        raise UnfitAdapterError(f"the file mixes adapters {_some(map(str, adapter_names))}: save each one by itself")
    return sides, copies


def _locate(name: str, modules: Mapping[str, ModuleShape]) -> tuple[str, str, str | None] | None:
    """Module path, "A" or "B", and the adapter's name where (as older PEFT wrote) the key holds one."""
    match = _LINEAR_KEY.fullmatch(name) or _EMBEDDING_KEY.fullmatch(name)
    if match is None or not name.startswith(PREFIX):
        return None
    path = match[1].removeprefix(PREFIX)
    module = modules.get(path)
    if module is None or (module.kind == "embedding") != (match.re is _EMBEDDING_KEY):
        return None
    return path, match[2], match[3]


def _copied_module(name: str, modules: Mapping[str, ModuleShape]) -> str | None:
    match = _COPY_KEY.fullmatch(name.removeprefix(PREFIX))
    return match[1] if match and match[1] in modules else None


def _check_copy(name: str, shape: Sequence[int], module: ModuleShape) -> None:
    if tuple(shape) != module.weight_shape:
        raise UnfitAdapterError(
            f"tensor {name} is a whole base weight of shape {list(shape)} where this base has "
            f"{list(module.weight_shape)} (a resized vocabulary?): merge the adapter into the base it was trained on "
            "with PEFT's merge_and_unload and serve that model"
        )


def _homeless(names: list[str], settings: LoraSettings) -> UnfitAdapterError:
    for mark, kind in _FOREIGN.items():
        if foreign := [name for name in names if mark in name]:
            return UnfitAdapterError(f"{kind} ({_some(foreign)}) is not supported: train a plain LoRA adapter")
    if biases := [name for name in names if name.endswith("bias")]:
        return UnfitAdapterError(f"biases ({_some(biases)}) are not supported: train with bias='none', lora_bias=False")
    trained_on = f", it was trained on {settings.base_model!r}" if settings.base_model else ""
    return UnfitAdapterError(
        f"these tensors land nowhere in the base model: {_some(names)}: serve the adapter with the model it was "
        f"trained on{trained_on}"
    )


def _pair(path: str, sides: Mapping[str, str]) -> Pair:
    if len(sides) < 2:
        missing = "B" if "A" in sides else "A"
        raise UnfitAdapterError(
            f"{path} has no lora_{missing} to its {next(iter(sides.values()))}: save the adapter again"
        )
    return Pair(A=sides["A"], B=sides["B"])


def _check_shapes(path: str, a: Sequence[int], b: Sequence[int], module: ModuleShape, rank: int) -> None:
    if len(a) != 2 or len(b) != 2 or a[1] != module.in_features or b[0] != module.out_features:
        raise UnfitAdapterError(
            f"{path} has lora_A {list(a)} and lora_B {list(b)}, but the base has {module.in_features} inputs and "
            f"{module.out_features} outputs there (so [r, {module.in_features}] and [{module.out_features}, r]): "
            "serve the adapter with the model it was trained on"
        )
    if a[0] == 0 or b[1] == 0:
        raise UnfitAdapterError(f"{path} has rank 0: its tensors were saved before they were gathered, save them again")
    if a[0] != b[1] or a[0] != rank:
        raise UnfitAdapterError(
            f"{path} has rank {a[0]} in lora_A and {b[1]} in lora_B where adapter_config.json says {rank} "
            "(r, rank_pattern): correct the configuration (of overlapping patterns the first in the file counts, and "
            "PEFT sorts them when it saves)"
        )


def _check_targets(pairs: Iterable[str], modules: Mapping[str, ModuleShape], settings: LoraSettings) -> None:
    present, rule = set(pairs), settings.rule
    strays = [path for path in present if not rule.allows(path, modules[path].kind)]
    if strays and not settings.ties_head:
        raise UnfitAdapterError(
            f"there are tensors for {_some(sorted(strays))}, which adapter_config.json does not name (PEFT would drop "
            "them): correct target_modules, exclude_modules or layers_to_transform"
        )
    if lost := [path for path, module in modules.items() if path not in present and rule.requires(path, module.kind)]:
        logger.warning("the adapter's file has no tensors for %s: as in PEFT, the base answers there", _some(lost))


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
