"""From chat messages to the text that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from peft_dist.api.protocol_chat import ChatMessage, ChatWriting
from peft_dist.api.protocol_tools import Tool, ToolCall
from peft_dist.api.tokenizing import apply_template, has_template, template_source
from peft_dist.api.unimplemented import refuse_in_message
from peft_dist.api.validation import shorten
from peft_dist.core.errors import InvalidRequestError

# Arguments of apply_chat_template that are not the template's to see.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


def check_chat(messages: Sequence[ChatMessage], writing: ChatWriting) -> None:
    """Refuse what no template is asked for.

    Raises:
        ApiError: 400, a message has a field that is not implemented.
        InvalidRequestError: fields of ``writing`` do not go together.
    """
    for index, message in enumerate(messages):
        refuse_in_message(message.model_extra or {}, index)
    if writing.add_generation_prompt and writing.continue_final_message:
        raise InvalidRequestError(
            "continue_final_message excludes add_generation_prompt: send one of them", "continue_final_message"
        )


def check_template(tokenizer: Any, template: str | None) -> None:
    """Raises InvalidRequestError (param "messages") where there is none: none given, and none of the tokenizer's."""
    if not has_template(tokenizer, template):
        raise InvalidRequestError(
            "this model has no chat template: use /v1/completions, or start the server with --chat-template", "messages"
        )


def check_tools(tokenizer: Any, template: str | None) -> None:
    """Raises InvalidRequestError (param "tools") where the template has no place for them."""
    if "tools" not in template_source(tokenizer, template, with_tools=True):
        raise InvalidRequestError(
            "this model's chat template tells of no tools: leave them out, or start the server with a "
            "--chat-template that does",
            "tools",
        )


def render_chat(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    writing: ChatWriting,
    template: str | None,
    tools: Sequence[Tool] | None,
) -> str:
    """The prompt's text by ``template``, or by the tokenizer's own. ``tools``: Those that it is to tell of.

    Raises:
        InvalidRequestError: the template refuses the messages or fails over them (param "messages"), there
            is no template, it knows no tools, or ``chat_template_kwargs`` holds a name that is not the template's.
    """
    check_template(tokenizer, template)
    if tools:
        check_tools(tokenizer, template)
    arguments = {
        "add_generation_prompt": _adds_generation_prompt(writing),
        "continue_final_message": bool(writing.continue_final_message),
        **_template_kwargs(writing),
    }
    if tools:
        arguments["tools"] = [tool.model_dump(exclude_unset=True) for tool in tools]
    turns = [_as_dict(message, f"messages[{index}]") for index, message in enumerate(messages)]
    text = apply_template(tokenizer, turns, template, arguments)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        param = _with_surrogate(turns, arguments)
        raise InvalidRequestError(f"{param} holds half of a surrogate pair: send valid Unicode", param) from error
    return text


def _with_surrogate(turns: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
    """The field that half of a surrogate pair came from into a prompt."""
    for index, turn in enumerate(turns):
        if _holds_surrogate(turn):
            return f"messages[{index}]" if set(turn) - {"role", "content"} else f"messages[{index}].content"
    return "tools" if _holds_surrogate(arguments.get("tools")) else "chat_template_kwargs"


def _holds_surrogate(value: object) -> bool:
    # Not by encoding its JSON: that escapes what is no character.
    return any("\ud800" <= letter <= "\udfff" for letter in json.dumps(value, ensure_ascii=False, default=str))


def _template_kwargs(writing: ChatWriting) -> dict[str, Any]:
    kwargs = writing.chat_template_kwargs or {}
    reserved = sorted(_RESERVED & kwargs.keys())
    if reserved:
        raise InvalidRequestError(
            f"chat_template_kwargs may not hold {reserved[0]!r}: only the template's own variables",
            "chat_template_kwargs",
        )
    return kwargs


def _adds_generation_prompt(writing: ChatWriting) -> bool:
    if writing.add_generation_prompt is None:
        return not writing.continue_final_message
    return writing.add_generation_prompt


def _as_dict(message: ChatMessage, where: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role, "content": message.content or ""}
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            turn[name] = getattr(message, name)
    if message.tool_calls:
        turn["tool_calls"] = [_as_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    return turn


def _as_call(call: ToolCall, where: str) -> dict[str, Any]:
    """As templates take it: with arguments as an object, not as its text."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        param = f"{where}.function.arguments"
        raise InvalidRequestError(
            f"{param}={shorten(call.function.arguments)} must be the text of a JSON object", param
        )
    told = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return told if call.id is None else {"id": call.id, **told}
