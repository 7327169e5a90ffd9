"""How many rows a call has, and how its adapter names spread over them."""

from __future__ import annotations

from typing import Any

import torch


def call_batch_size(args: tuple[Any, ...], kwargs: dict[str, Any], generates: bool) -> int:
    """Rows that the caller passed; ``generate`` without inputs starts one row from the BOS token."""
    names = ("inputs", "input_ids", "inputs_embeds") if generates else ("input_ids", "inputs_embeds")
    candidates = (*args[:1], *(kwargs.get(name) for name in names))
    inputs = next((value for value in candidates if isinstance(value, torch.Tensor)), None)
    return 1 if inputs is None else len(inputs)


def expand_for_peft(names: Any, kwargs: dict[str, Any], default_config: Any) -> Any:
    """Names repeated row by row as ``generate`` repeats its inputs, less what PEFT repeats itself.

    PEFT repeats names only for ``num_beams`` given as an argument of the call.
    """
    if not isinstance(names, (list, tuple)):
        return names
    config = kwargs.get("generation_config") or default_config
    beams, sequences = (_setting(name, kwargs, config) for name in ("num_beams", "num_return_sequences"))
    by_peft = kwargs.get("num_beams") or 1
    return [name for name in names for _ in range(max(beams, sequences) // by_peft)]


def _setting(name: str, kwargs: dict[str, Any], config: Any) -> int:
    value = kwargs.get(name)
    return int(value if value is not None else getattr(config, name, None) or 1)
