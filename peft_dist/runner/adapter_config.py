"""adapter_config.json: what it says of ranks, scalings and targets, and the kinds of adapter refused for it."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from peft_dist.core.errors import AdapterError
from peft_dist.runner.adapter_fields import BOOLEAN_FIELDS, IGNORED_FIELDS, READ_FIELDS, refuse_unsupported
from peft_dist.runner.adapter_files import CONFIG_NAME, open_regular
from peft_dist.runner.adapter_patterns import ALL_LINEAR, LayerRule, NameSet, PatternMap, TargetRule

MAX_CONFIG_BYTES = 16 << 20
MAX_ALPHA = 1e30

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The part of an adapter's configuration that decides its answers.

    Attributes:
        r: Rank of modules that no entry of ``ranks`` matches.
        lora_alpha: Likewise for ``alphas``.
        use_rslora: Scale by ``alpha / sqrt(r)`` and not ``alpha / r``.
        rule: Which modules the configuration adapts.
        ties_head: The output head shares the embedding's adapter (``ensure_weight_tying``).
        base_model: What the adapter was trained on, as far as the configuration tells.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    ranks: PatternMap[int]
    alphas: PatternMap[float]
    rule: TargetRule
    ties_head: bool
    base_model: str | None

    def rank(self, path: str) -> int:
        return self.ranks.get(path, self.r)

    def scaling(self, path: str) -> float:
        rank = self.rank(path)
        return self.alphas.get(path, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def read_settings(folder: Path) -> LoraSettings:
    """Parse ``adapter_config.json``.

    Raises:
        AdapterError: the file is missing, too large, no JSON object, holds a value of the wrong type, or describes
            a kind of adapter that cannot be served.
    """
    config = _read_json(folder / CONFIG_NAME)
    for field in BOOLEAN_FIELDS:
        if not isinstance(config.get(field), (bool, NoneType)):
            raise _wrong(field, config[field], "true or false")
    refuse_unsupported(config)
    if unknown := sorted(config.keys() - READ_FIELDS - IGNORED_FIELDS):
        logger.warning("%s: fields unknown to this release are ignored, as PEFT does: %s", folder, ", ".join(unknown))
    return LoraSettings(
        r=_rank(config.get("r", 8), "r"),
        lora_alpha=_number(config.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=bool(config.get("use_rslora")),
        ranks=_pattern_map(config, "rank_pattern", _rank),
        alphas=_pattern_map(config, "alpha_pattern", _number),
        rule=_target_rule(config),
        ties_head=bool(config.get("ensure_weight_tying")),
        base_model=_base_model(config),
    )


def _read_json(path: Path) -> dict[str, Any]:
    with open_regular(path, "give the folder that PEFT's save_pretrained wrote") as (file, size):
        if size > MAX_CONFIG_BYTES:
            raise AdapterError(f"{CONFIG_NAME} has {size} bytes, more than {MAX_CONFIG_BYTES}: this is no adapter's")
        data = file.read(size)
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG_NAME} is no valid JSON ({error}): save the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG_NAME} holds a {type(config).__name__}, not an object: save the adapter again")
    return config


def _wrong(field: str, value: object, must: str) -> AdapterError:
    return AdapterError(f"{CONFIG_NAME}: {field}={value!r:.200} must be {must}: correct it")


def _rank(value: object, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(field, value, "a rank, an integer from 1")
    return value


def _number(value: object, field: str) -> float:
    # A comparison, because math.isfinite overflows on the endless integers that JSON may hold.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= MAX_ALPHA:
        raise _wrong(field, value, f"a number of at most {MAX_ALPHA:g}")
    return value


def _pattern_map(config: dict[str, Any], field: str, check: Any) -> PatternMap[Any]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise _wrong(field, patterns, "an object from module patterns to numbers")
    return PatternMap({text: check(value, f"{field}[{text!r}]") for text, value in patterns.items()}, field)


def _target_rule(config: dict[str, Any]) -> TargetRule:
    targets = _names(config, "target_modules")
    all_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    excluded = _names(config, "exclude_modules")
    layers = _layers(config)
    if isinstance(targets, str) and layers is not None:
        raise _wrong("layers_to_transform", config["layers_to_transform"], "absent when target_modules is a string")
    return TargetRule(
        targets=None if targets is None or all_linear else NameSet(targets, "target_modules"),
        all_linear=all_linear,
        excluded=NameSet(excluded or (), "exclude_modules"),
        layers=layers,
    )


def _names(config: dict[str, Any], field: str) -> str | list[str] | None:
    names = config.get(field)
    if names is None or isinstance(names, str) or _is_list_of(names, str):
        return names
    raise _wrong(field, names, "a list of module names or one regular expression")


def _layers(config: dict[str, Any]) -> LayerRule | None:
    layers, containers = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None or layers == []:
        return None
    layers = [layers] if isinstance(layers, int) else layers
    containers = [containers] if isinstance(containers, str) else containers
    if not _is_list_of(layers, int):
        raise _wrong("layers_to_transform", layers, "a list of layer numbers")
    if not _is_list_of(containers, str):
        raise _wrong("layers_pattern", containers, "a list of names")
    return LayerRule(layers, containers)


def _base_model(config: dict[str, Any]) -> str | None:
    name = config.get("base_model_name_or_path")
    if name is None or isinstance(name, str):
        return name
    raise _wrong("base_model_name_or_path", name, "a name or a path")


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
