"""What a message says: a string, or parts that are text."""

from __future__ import annotations

# Kinds of parts that are text under another name, and where they have it.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def joined_content(value: object) -> str:
    """A string as it is, text parts joined by newlines. Raises ValueError, which tells what is wrong with it."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("it must be a string or a list of text parts")
    return "\n".join(_text(part, index) for index, part in enumerate(value))


def _text(part: object, index: int) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ValueError(f"part {index} is not an object")
    key = _TEXT_PARTS.get(str(part.get("type")))
    if key is None:
        raise ValueError(f"part {index} is not of type 'text', the only one served")
    text = part.get(key)
    if not isinstance(text, str):
        raise ValueError(f"part {index} has no string {key!r}")
    return text
