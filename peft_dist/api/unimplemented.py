"""Fields that others implement and we do not: refused by name unless they hold a value that changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_dist.api.errors import ApiError
from peft_dist.api.validation import shorten

# Field to the values that are as good as leaving it out; null always is.
_COMMON: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "detokenize": (True,),
    "early_stopping": (False,),
    "guided_choice": ([],),
    "guided_decoding_backend": ("auto",),
    "guided_grammar": ("",),
    "guided_json_object": (False,),
    "guided_regex": ("",),
    "guided_whitespace_pattern": ("",),
    "kv_transfer_params": ({},),
    "length_penalty": (1, 1.0),
    "logit_processors": ([],),
    "logits_processors": ([],),
    "priority": (0,),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": ({},),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
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
    "mm_processor_kwargs": ({},),
    "modalities": (["text"], []),
    "prediction": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_MESSAGE: dict[str, tuple[Any, ...]] = {"audio": (), "function_call": (), "tool_calls": ([],), "tool_call_id": ()}
_LOAD: dict[str, tuple[Any, ...]] = {"is_3d_lora_weight": (False,), "trust_remote_code": (False,)}


def refuse_in_completion(extra: Mapping[str, Any], n: int) -> None:
    """Raises ApiError (400) naming the first field of ``extra`` that asks for what is not implemented."""
    _refuse({**_COMMON, **_COMPLETION, "best_of": (1, n)}, extra)


def refuse_in_chat(extra: Mapping[str, Any], n: int) -> None:
    """Raises ApiError (400), see ``refuse_in_completion``."""
    _refuse({**_COMMON, **_CHAT, "best_of": (1, n)}, extra)


def refuse_in_message(extra: Mapping[str, Any], index: int) -> None:
    """Raises ApiError (400) with a name like ``messages[2].tool_calls``."""
    _refuse(_MESSAGE, extra, f"messages[{index}].")


def refuse_in_load(extra: Mapping[str, Any]) -> None:
    """Raises ApiError (400), see ``refuse_in_completion``."""
    _refuse(_LOAD, extra)


def _refuse(table: Mapping[str, tuple[Any, ...]], extra: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in extra.items():
        # Also those not in the table, such as guided_json, where {} is a schema too.
        neutral = table.get(name, () if name.startswith("guided_") else None)
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


def _same(value: Any, neutral: Any) -> bool:
    # In Python True == 1, in JSON it does not.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
