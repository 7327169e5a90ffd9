"""How many rows a call has, and how its adapter names spread over them."""

from __future__ import annotations

from typing import Any

import torch

# Hugging Face's.
_DEFAULT_NEW_TOKENS = 20


def call_batch_size(args: tuple[Any, ...], kwargs: dict[str, Any], generates: bool) -> int:
    """Rows that the caller passed; ``generate`` without inputs starts one row from the BOS token."""
    inputs = next(iter(_tensors(args, kwargs, generates)), None)
    return 1 if inputs is None else len(inputs)


def prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Padded positions that ``generate`` was given; None where there is no telling them from its inputs' shapes."""
    inputs = _tensors(args, kwargs, generates=True)
    return inputs[0].shape[1] if len(inputs) == 1 and inputs[0].dim() > 1 else None


def longest_length(prompt: int, kwargs: dict[str, Any], default_config: Any) -> int:
    """Positions after which ``generate`` stops at the latest, as far as its settings tell."""
    config = kwargs.get("generation_config") or default_config
    for source in (kwargs.get, lambda name: getattr(config, name, None)):
        if new := source("max_new_tokens"):
            return prompt + int(new)
        if length := source("max_length"):
            return int(length) if length > prompt else prompt + _DEFAULT_NEW_TOKENS
    return prompt + _DEFAULT_NEW_TOKENS


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


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any], generates: bool) -> list[torch.Tensor]:
    names = ("inputs", "input_ids", "inputs_embeds") if generates else ("input_ids", "inputs_embeds")
    candidates = (*args[:1], *(kwargs.get(name) for name in names))
    return [value for value in candidates if isinstance(value, torch.Tensor)]


def _setting(name: str, kwargs: dict[str, Any], config: Any) -> int:
    value = kwargs.get(name)
    return int(value if value is not None else getattr(config, name, None) or 1)
