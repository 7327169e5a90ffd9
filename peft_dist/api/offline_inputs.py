"""The shapes in which offline users give prompts, conversations, parameters and adapters, and what is none of them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from peft_dist.api.content import joined_content
from peft_dist.api.structured import StructureChecks
from peft_dist.api.tokenizing import has_template
from peft_dist.core.errors import AdapterError, ConfigError, InvalidRequestError
from peft_dist.core.sampling_params import SamplingParams

OnePrompt = str | Sequence[int] | Mapping[str, Any]
Prompts = OnePrompt | Sequence[OnePrompt]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, or a text that is still to be tokenised (then ``token_ids`` is None)."""

    token_ids: list[int] | None
    text: str | None = None


def split_prompts(prompts: Prompts) -> list[Prompt]:
    """One prompt or many, mixed freely, as a list.

    Raises:
        InvalidRequestError: something in it is no prompt.
    """
    given: Any = _unpacked(prompts)
    if isinstance(given, (str, Mapping)) or _token_ids(given):
        return [_prompt(given)]
    must = "a prompt (a string, a list of token ids, a dict with prompt_token_ids) or a list of prompts"
    return [_prompt(prompt) for prompt in _as_list(given, "prompts", must, "prompt")]


def split_conversations(messages: Any) -> list[list[Mapping[str, Any]]]:
    """One conversation or several as a list; each message has a role, and a content or tool calls.

    Raises:
        InvalidRequestError: (param "messages") something in it is no message.
    """
    must = 'a conversation (a list of {"role": ..., "content": ...}) or a list of conversations'
    given = _as_list(messages, "messages", must)
    if given and all(isinstance(message, Mapping) for message in given):
        return [[_message(message, f"messages[{i}]") for i, message in enumerate(given)]]
    must = 'a non-empty list of {"role": ..., "content": ...}'
    conversations = [_as_list(own, f"messages[{i}]", must, "messages") for i, own in enumerate(given)]
    for i, own in enumerate(conversations):
        if not own:
            raise _no(f"messages[{i}]", own, must, "messages")
    return [
        [_message(message, f"messages[{i}][{j}]") for j, message in enumerate(own)]
        for i, own in enumerate(conversations)
    ]


def align_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """The parameters of each of ``count`` prompts. Raises InvalidRequestError, as for a dict in their place."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    must = "SamplingParams(temperature=...) or a list of them, one for each prompt"
    listed = _as_list(params, "sampling_params", must)
    _check_count("sampling_params", len(listed), count)
    for i, own in enumerate(listed):
        if not isinstance(own, SamplingParams):
            raise _no(f"sampling_params[{i}]", own, "SamplingParams(temperature=...)", "sampling_params")
    return listed


def check_params(params: Iterable[SamplingParams], tokenizer: Any | None, structures: StructureChecks) -> None:
    """Raises InvalidRequestError for stop strings without a tokenizer, and structured outputs that cannot be had."""
    for own in params:
        if own.stop and tokenizer is None:
            raise InvalidRequestError(
                "stop strings need a tokenizer, which this model lacks: use stop_token_ids", "stop"
            )
        if own.structured is not None:
            structures.check_now(own.structured)


def align_adapter_names(names: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """The adapter's name for each of ``count`` prompts. Raises InvalidRequestError for what is no name."""
    if names is None or isinstance(names, str):
        return [names] * count
    listed = _as_list(names, "adapter_names", "an adapter's name, None, or a list of them, one for each prompt")
    _check_count("adapter_names", len(listed), count)
    for i, name in enumerate(listed):
        if not (name is None or isinstance(name, str)):
            raise _no(f"adapter_names[{i}]", name, "an adapter's name, or None for the base", "adapter_names")
    return listed


def check_template(tokenizer: Any | None, model: str, chat_template: str | None) -> None:
    """Raises ConfigError without a tokenizer, InvalidRequestError where it has no chat template and none is given."""
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer, so no chat template: use generate with token ids")
    if not has_template(tokenizer, chat_template):
        raise InvalidRequestError(
            f"the tokenizer of {model} has no chat template: give chat_template=, or use generate", "chat_template"
        )


def check_adapter(path: object, name: object) -> None:
    """Raises AdapterError when these cannot be the path and the name of an adapter."""
    if not isinstance(path, (str, os.PathLike)):
        raise AdapterError(f"path={path!r:.200} must be a folder or a hub id: load_adapter(path, name)")
    if not isinstance(name, str):
        raise AdapterError(f"name={name!r:.200} must be a string: load_adapter(path, name)")


def check_adapters(adapters: object, check_exists: Callable[[str], None]) -> None:
    """What can be known before the model is loaded.

    Args:
        check_exists: Raises AdapterError where no adapter is.

    Raises:
        ConfigError: this is no map from names to paths.
        AdapterError: one of them is not there.
    """
    if adapters is not None and not isinstance(adapters, Mapping):
        raise ConfigError(
            f"adapters={adapters!r:.200} must map names to folders or hub ids: adapters={{'sql': 'adapters/sql'}}"
        )
    for name, path in (adapters or {}).items():
        check_adapter(path, name)
        check_exists(os.fspath(path))


# Options of other engines, with what stands for them here.
_OTHERWISE = {
    "enable_lora": "leave it out, adapters are given as adapters={name: folder}",
    "max_lora_rank": "leave it out, any rank is taken",
    "lora_modules": "adapters are given as adapters={name: folder}",
    "max_cpu_loras": "adapter_host_memory says how many bytes of them host memory keeps",
    "swap_space": "use num_host_blocks",
    "max_seq_len": "use max_model_len",
    "max_batch_size": "use max_num_seqs",
    "quantization": "leave it out: models run as their files have them, or as dtype says",
}


def check_options(given: Iterable[str], known: Sequence[str]) -> None:
    """Raises ConfigError for a name that is not among the known ones, with the one that may have been meant."""
    for name in given:
        if name in _OTHERWISE and name not in known:
            raise ConfigError(f"LLM has no option {name!r}: {_OTHERWISE[name]}")
        if name not in known:
            meant = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {meant[0]!r}?" if meant else f"there are {', '.join(sorted(known))}"
            raise ConfigError(f"LLM has no option {name!r}: {hint}")


def _unpacked(value: Any) -> Any:
    """Arrays and tensors as lists; both have this method, so that neither library need be known here."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _as_list(value: Any, name: str, must: str, param: str | None = None) -> list[Any]:
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return list(value)
    remedy = "" if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__") else f": list({name})"
    raise InvalidRequestError(f"{name} must be {must}, not of type {type(value).__name__}{remedy}", param or name)


def _token_ids(value: Any) -> list[int] | None:
    """A list of integers of any kind as plain ones; None for everything else, booleans included."""
    value = _unpacked(value)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        return None
    if all(type(token) is int for token in value):
        return list(value)
    if all(isinstance(token, Integral) and not isinstance(token, bool) for token in value):
        return [int(token) for token in value]
    return None


def _prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(None, prompt)
    if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
        ids, text = _token_ids(prompt["prompt_token_ids"]), prompt.get("prompt")
        if ids is None:
            raise _no("prompt_token_ids", prompt["prompt_token_ids"], "a list of token ids", "prompt")
        if not (text is None or isinstance(text, str)):
            raise _no("prompt", text, "a string or None beside prompt_token_ids", "prompt")
        return Prompt(ids, text)
    if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt"), str):
        return Prompt(None, prompt["prompt"])
    ids = _token_ids(prompt)
    if ids is None:
        raise InvalidRequestError(
            f"{prompt!r:.200} is no prompt: give a string, a list of token ids, or a dict with prompt_token_ids",
            "prompt",
        )
    return Prompt(ids)


def _message(message: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        raise _no(where, message, '{"role": ..., "content": ...}', "messages")
    if not isinstance(message.get("role"), str):
        raise _no(f"{where}['role']", message.get("role"), "a string such as 'user'", "messages")
    if "content" not in message and "tool_calls" not in message:
        raise InvalidRequestError(f"{where} has no 'content': give it a string", "messages")
    content = message.get("content")
    if content is None and "tool_calls" in message:
        return {**message, "content": ""}
    try:
        return {**message, "content": joined_content(content)}
    except ValueError as error:
        problem = f"{where}['content']={content!r:.200} is not valid: {error}"
        raise InvalidRequestError(problem, "messages") from error


def _check_count(what: str, found: int, count: int) -> None:
    if found != count:
        raise InvalidRequestError(f"{found} {what} for {count} prompts: give one for all, or one for each", param=what)


def _no(name: str, value: object, must: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}={value!r:.200} must be {must}", param)
