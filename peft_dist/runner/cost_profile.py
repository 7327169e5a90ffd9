"""The cost model in a file, from which the next start of the same model on the same device goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_dist.core.config import ModelInfo
from peft_dist.core.cost_model import CostModel
from peft_dist.core.errors import ConfigError

logger = logging.getLogger(__name__)

KIND = "peft_dist cost profile"


def hash_shapes(model: nn.Module) -> str:
    """SHA-256 over names and shapes of the parameters: models with the same cost the same."""
    shapes = sorted((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    return hashlib.sha256(repr(shapes).encode()).hexdigest()


def identify(info: ModelInfo, shapes: str, device: torch.device) -> dict[str, str]:
    """Everything that seconds depend on and that is the same for all requests.

    Args:
        shapes: ``hash_shapes`` of the model as it was loaded.
    """
    is_gpu = device.type == "cuda"
    return {
        "shapes": shapes,
        "dtype": info.dtype,
        "device": torch.cuda.get_device_name(device) if is_gpu else _processor(),
        "threads": "" if is_gpu else str(torch.get_num_threads()),
        "attention": info.attention_backend,
        "lora": info.lora_backend,
        "merge": info.merge_way,
        **info.versions,
    }


def read_profile(path: Path, identity: Mapping[str, str]) -> CostModel | None:
    """The cost model in a file; None where there is no file yet, or one of another identity (logged as a warning).

    Raises:
        ConfigError: the file, or its folder, cannot be used, or holds something else, which must not be written over.
    """
    refusal = f"cost_profile={str(path)!r}"
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{refusal}: there is no folder {path.parent} that can be written to")
    try:
        content: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{refusal} cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{refusal} is no cost profile ({error}): name another file") from error
    if not isinstance(content, dict) or content.get("kind") != KIND or not isinstance(content.get("identity"), dict):
        raise ConfigError(f"{refusal} is no cost profile: name another file")
    found = content["identity"]
    if differing := sorted(key for key in found.keys() | identity.keys() if found.get(key) != identity.get(key)):
        told = ", ".join(f"{key} {found.get(key)!r}, here {identity.get(key)!r}" for key in differing)
        logger.warning("%s was measured elsewhere (%s): it is not used, and replaced when this ends", refusal, told)
        return None
    try:
        return CostModel.from_dict(content.get("cost") or {})
    except ConfigError as error:
        raise ConfigError(f"{refusal}: {error}, or remove the file") from error


def write_profile(path: Path, identity: Mapping[str, str], model: str, cost: CostModel) -> None:
    """Replace the file as a whole. A failure is logged: it costs the next start a few measured steps.

    Args:
        model: Its name, for people.
    """
    content = {"kind": KIND, "model": model, "identity": dict(identity), "cost": cost.to_dict()}
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(json.dumps(content, indent=1) + "\n")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        logger.warning("cost_profile=%r was not written: %s", str(path), error)


def _processor() -> str:
    """Its name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
