"""Which model was loaded, in a few letters: replicas that continue each other's requests must have the same."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from peft_dist.core.config import EngineConfig
from peft_dist.patches.sharding import ModulePart

Shrink = Callable[[PreTrainedModel], Mapping[str, ModulePart]]
# Values of each weight: of a fine-tune that changes some layers by little at least one differs.
_SAMPLES = 64
# What says where a model was found, or how it is run, and not which it is.
_OTHERWISE = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "use_cache", "auto_map")


class Fingerprint:
    """Of a model that is being loaded.

    Attributes:
        text: Equal for equal weights and settings, whatever the device, the dtype (float32 or bfloat16), the number of
            ranks and the files of the weights; empty until the model was seen.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.text = ""

    def before(self, shrink: Shrink) -> Shrink:
        """The same, which takes a whole model, having looked at it."""

        def shrunk(model: PreTrainedModel) -> Mapping[str, ModulePart]:
            self.see(model)
            return shrink(model)

        return shrunk

    def see(self, model: PreTrainedModel) -> None:
        """Take a whole model's fingerprint, unless it is taken: one of ranks is split later."""
        if self.text:
            return
        found = hashlib.sha256(json.dumps(_settings(self._read()), sort_keys=True, default=str).encode())
        if self._config.load_format == "dummy":  # They follow from these, and may not be there yet.
            found.update(f"dummy {self._config.seed or 0} {self._config.device} {model.dtype}".encode())
        else:
            for name, weight in sorted(model.named_parameters()):
                found.update(f"{name} {tuple(weight.shape)}".encode())
                found.update(_sample(weight))
        self.text = found.hexdigest()[:16]

    def _read(self) -> dict[str, Any]:
        """The settings as their file has them: a loaded configuration has all defaults of this transformers too."""
        # Of transformers, and without a name of its own for whoever only wants to read.
        found, _ = PreTrainedConfig.get_config_dict(self._config.model, revision=self._config.revision)
        return found


def _settings(told: Any) -> Any:
    if not isinstance(told, Mapping):
        return told
    return {key: _settings(value) for key, value in told.items() if key not in _OTHERWISE}


def _sample(weight: torch.Tensor) -> bytes:
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    while step > 1 and math.gcd(step, weight.shape[-1]) > 1:  # Or all of them would be of one column.
        step -= 1
    some = flat[::step][:_SAMPLES]
    # What is float32 in one process may be bfloat16 in another: rounded they are the same.
    some = some.to(torch.bfloat16).view(torch.int16) if some.is_floating_point() else some.to(torch.int64)
    return some.cpu().numpy().tobytes()
