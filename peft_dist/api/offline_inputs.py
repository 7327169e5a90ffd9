"""The shapes in which offline users give prompts, parameters and adapter names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_dist.core.errors import InvalidRequestError
from peft_dist.core.sampling_params import SamplingParams

OnePrompt = str | Sequence[int] | Mapping[str, Any]
Prompts = OnePrompt | Sequence[OnePrompt]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, or a text that is still to be tokenised (then ``token_ids`` is None)."""

    token_ids: list[int] | None
    text: str | None = None


def is_one(value: Sequence[Any], kind: type) -> bool:
    """Whether a list holds items of ``kind``, and so stands for one thing rather than for several."""
    return len(value) > 0 and all(isinstance(item, kind) for item in value)


def split_prompts(prompts: Prompts) -> list[Prompt]:
    """One prompt or many, mixed freely, as a list.

    Raises:
        InvalidRequestError: something in it is no prompt.
    """
    if isinstance(prompts, (str, Mapping)) or is_one(prompts, int):
        return [_prompt(prompts)]
    return [_prompt(prompt) for prompt in prompts]


def _prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(None, prompt)
    if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
        return Prompt(list(prompt["prompt_token_ids"]), prompt.get("prompt"))
    if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt"), str):
        return Prompt(None, prompt["prompt"])
    if isinstance(prompt, Sequence) and all(isinstance(token, int) for token in prompt):
        return Prompt(list(prompt))
    raise InvalidRequestError(
        f"{prompt!r} is no prompt: give a string, a list of token ids, or a dict with prompt_token_ids", param="prompt"
    )


def align_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    _check_count("sampling_params", len(params), count)
    return list(params)


def align_adapter_names(names: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    if names is None or isinstance(names, str):
        return [names] * count
    _check_count("adapter_names", len(names), count)
    return list(names)


def _check_count(what: str, found: int, count: int) -> None:
    if found != count:
        raise InvalidRequestError(f"{found} {what} for {count} prompts: give one for all, or one for each", param=what)
