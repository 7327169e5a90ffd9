"""Fields that others implement and we do not: refused by name unless they hold a value that changes nothing.

Fields that nobody knows are ignored, and named in the log once, since they may be misspelt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from peft_dist.api.errors import ApiError
from peft_dist.api.validation import shorten

logger = logging.getLogger("peft_dist.serve")

# Field to the values that are as good as leaving it out; null always is.
_COMMON: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "detokenize": (True,),
    "early_stopping": (False,),
    "ebnf": (),
    "grammar": (),
    "guided_decoding_backend": ("auto",),
    "guided_whitespace_pattern": ("",),
    "json_schema": (),
    "kv_transfer_params": ({},),
    "length_penalty": (1, 1.0),
    "logit_processors": ([],),
    "logprob_token_ids": ([],),
    "logits_processors": ([],),
    "num_beams": (1,),
    "priority": (0,),
    "regex": (),
    "repetition_detection": (),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
_COMPLETION: dict[str, tuple[Any, ...]] = {
    "prompt_embeds": ([],),
    "suffix": ("",),
}
_CHAT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"], []),
    "prediction": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "thinking_token_budget": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Names that other servers and libraries have for what is here, with the name that it has here.
_NAMED_OTHERWISE: dict[str, str] = {
    **dict.fromkeys(
        ("adapter_id", "adapter_name", "adapter_names", "lora_name", "lora_path", "lora_request"),
        "name the adapter in 'model'",
    ),
    "do_sample": "use temperature, where 0 is greedy",
    "max_new_tokens": "use max_tokens",
    "num_return_sequences": "use n",
    "stop_sequences": "use stop",
    "top_n_tokens": "use logprobs",
}
# What completions call otherwise than chat.
_NAMED_OTHERWISE_IN_CHAT = {"max_completion_tokens": "use max_tokens", "top_logprobs": "use logprobs"}
# Known elsewhere, and without influence on the answer.
_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
    }
)
# More names than this are no slips of the pen.
_MOST_TOLD = 100
_told: set[str] = set()
_MESSAGE: dict[str, tuple[Any, ...]] = {"audio": (), "function_call": ()}
# Within structured_outputs, and within response_format.
_STRUCTURED: dict[str, tuple[Any, ...]] = {
    "_backend": ("auto",),
    "_backend_was_auto": (True, False),
    "backend": ("auto",),
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (False,),
    "disable_fallback": (False,),
    "ebnf": (),
    "structural_tag": (),
    "whitespace_pattern": ("",),
}
_RESPONSE_FORMAT: dict[str, tuple[Any, ...]] = {
    "format": (),
    "grammar": (),
    "pattern": (),
    "regex": (),
    "schema": (),
    "structures": ([],),
    "triggers": ([],),
    "value": (),
}
_RESPONSE_TYPES = ("text", "json_object", "json_schema")
_LOAD: dict[str, tuple[Any, ...]] = {"is_3d_lora_weight": (False,), "trust_remote_code": (False,)}


def refuse_in_completion(extra: Mapping[str, Any], n: int) -> None:
    """Raises ApiError (400) naming the first field of ``extra`` that asks for what is not implemented."""
    _refuse_names(extra, {**_NAMED_OTHERWISE, **_NAMED_OTHERWISE_IN_CHAT})
    _refuse({**_COMMON, **_COMPLETION, "best_of": (1, n)}, extra, is_told=True)


def refuse_in_chat(extra: Mapping[str, Any], n: int) -> None:
    """Raises ApiError (400), see ``refuse_in_completion``."""
    _refuse_names(extra)
    _refuse({**_COMMON, **_CHAT, "best_of": (1, n)}, extra, is_told=True)


def refuse_in_tokenize(extra: Mapping[str, Any]) -> None:
    """Raises ApiError (400), see ``refuse_in_completion``: what neither a completion nor a chat may hold."""
    _refuse_names(extra)
    _refuse({**_COMMON, **_COMPLETION, **_CHAT}, extra, is_told=True)


def refuse_in_message(extra: Mapping[str, Any], index: int) -> None:
    """Raises ApiError (400) with a name like ``messages[2].audio``."""
    _refuse(_MESSAGE, extra, f"messages[{index}].")


def refuse_in_response_format(kind: str, extra: Mapping[str, Any]) -> None:
    """Raises ApiError (400) for another ``type`` than those implemented; see ``refuse_in_completion``."""
    if kind not in _RESPONSE_TYPES:
        raise ApiError(
            400,
            f"response_format.type={shorten(kind)} is not implemented by this server: use one of "
            + ", ".join(_RESPONSE_TYPES),
            param="response_format",
            code="unsupported_parameter",
        )
    _refuse(_RESPONSE_FORMAT, extra, "response_format.", is_told=True)


def refuse_in_structured_outputs(extra: Mapping[str, Any]) -> None:
    """Raises ApiError (400), see ``refuse_in_completion``."""
    _refuse(_STRUCTURED, extra, "structured_outputs.", is_told=True)


def refuse_in_load(extra: Mapping[str, Any]) -> None:
    """Raises ApiError (400), see ``refuse_in_completion``."""
    _refuse(_LOAD, extra)


def _refuse_names(extra: Mapping[str, Any], table: Mapping[str, str] = _NAMED_OTHERWISE) -> None:
    for name, remedy in table.items():
        if extra.get(name) is not None:
            problem = f"{name}={shorten(extra[name])} is not a field of this server: {remedy}"
            raise ApiError(400, problem, param=name, code="unsupported_parameter")


def _refuse(
    table: Mapping[str, tuple[Any, ...]], extra: Mapping[str, Any], prefix: str = "", *, is_told: bool = False
) -> None:
    """``is_told``: Names outside the table are told to the log."""
    for name, value in extra.items():
        # Also those not in the table: what others guide by may be anything.
        neutral = table.get(name, () if name.startswith("guided_") else None)
        if neutral is None and value is not None and is_told:
            _tell(name)
        if value is None or neutral is None or any(_same(value, other) for other in neutral):
            continue
        remedy = f" (or send {shorten(neutral[0])})" if neutral else ""
        param = prefix + ascii(name)[1:-1]
        raise ApiError(
            400,
            f"{param}={shorten(value)} is not implemented by this server: leave the field out{remedy}",
            param=param,
            code="unsupported_parameter",
        )


def _tell(name: str) -> None:
    if name in _told or name in _WITHOUT_EFFECT or len(_told) >= _MOST_TOLD:
        return
    _told.add(name)
    logger.warning("A request has the field %.80s, which is not known here and is ignored (told once)", ascii(name))


def _same(value: Any, neutral: Any) -> bool:
    # In Python True == 1, in JSON it does not.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
