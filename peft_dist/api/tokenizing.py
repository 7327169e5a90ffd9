"""What the server and the offline interface share of tokenizers: loading one, and asking it safely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_dist.core.errors import ConfigError, InvalidRequestError

# A template is code of the model's author that meets a user's values: it may fail in any of these ways.
_FAILURES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def load_tokenizer(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The Hugging Face tokenizer of a folder or hub id.

    Raises:
        ConfigError: it is damaged, or cannot be fetched.
    """
    # Slow to import, and whoever only serves token ids needs it not at all.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # The tokenizers library raises bare Exceptions for what it cannot read.
        raise ConfigError(
            f"cannot load the tokenizer of {source!r} ({type(error).__name__}: {error}): copy or download its files "
            "again, or write them anew with the tokenizer's save_pretrained"
        ) from error


def has_template(tokenizer: Any, template: str | None) -> bool:
    """Whether conversations can be written out: by ``template``, or by the tokenizer itself."""
    # Tokenizers that write conversations without a template have no such attribute.
    return template is not None or bool(getattr(tokenizer, "chat_template", True))


def encode(tokenizer: Any, text: str, param: str, *, special: bool) -> list[int]:
    """Token ids of a text, with special tokens or without. Raises InvalidRequestError as ``check_unicode``."""
    check_unicode(text, param)
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def check_unicode(text: str, param: str) -> None:
    """Raises InvalidRequestError for half of a surrogate pair, which is no character and which no tokenizer takes.

    JSON can escape one, and a Python string can hold one.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{param} holds a lone surrogate at {error.start}: send valid Unicode", param
        ) from error


def template_source(tokenizer: Any, template: str | None, *, with_tools: bool = False) -> str:
    """The Jinja source that ``apply_template`` takes for messages, ``with_tools`` or without; empty: there is none."""
    try:
        return str(tokenizer.get_chat_template(template, [] if with_tools else None))
    except (AttributeError, ValueError):
        return ""


def apply_template(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], template: str | None, arguments: Mapping[str, Any]
) -> str:
    """The text of one conversation by ``template``, or by the tokenizer's own when it is None.

    ``arguments`` are those of ``apply_chat_template``, and the template's own variables.

    Raises:
        InvalidRequestError: (param "messages") the template refuses the messages, or fails over them.
    """
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
    except (TemplateError, *_FAILURES) as error:
        raise InvalidRequestError(f"the model's chat template refuses these messages: {error}", "messages") from error
    return text
