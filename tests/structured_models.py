"""A small random model that writes text, and schemas with a check of what is written by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.api.http_support import EOS, PADDED_VOCAB, make_tokenizer
from tests.tiny_models import _SIZES, _build

# Without blanks: a random model may write them to the end of its length.
_TIGHT = {"x-guidance": {"whitespace_flexible": False}}


def make_writing_model(folder: Path) -> PreTrainedModel:
    """Save a Llama with a byte-level tokenizer to ``folder`` and return it; its logits are more than its tokens."""
    sizes = {**_SIZES, "vocab_size": PADDED_VOCAB, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": None}
    model = _build(LlamaForCausalLM, LlamaConfig(num_key_value_heads=2, tie_word_embeddings=False, **sizes), 21)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def tight(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, of which no blank is written."""
    return {**schema, **_TIGHT}


_leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 4)),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-50, 50),
        st.integers(0, 200),
    ),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.sampled_from(["a", "hello", '"', "é😀", 7, None, True]), min_size=1, max_size=3, unique_by=repr),
    ),
)


def _object(properties: dict[str, Any], num_required: int) -> dict[str, Any]:
    required = list(properties)[:num_required]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _larger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "name", "x y", "ü"])
    return st.one_of(
        st.builds(_object, st.dictionaries(names, inner, min_size=1, max_size=3), st.integers(0, 3)),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 2)),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    )


schemas = st.recursive(_leaves, _larger, max_leaves=5)


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is one of the schema, as far as ``schemas`` go."""
    if "anyOf" in schema:
        return any(conforms(value, each) for each in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(each) and value == each for each in schema["enum"])
    kind = schema["type"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "array":
        return (
            isinstance(value, list)
            and len(value) <= schema["maxItems"]
            and all(conforms(each, schema["items"]) for each in value)
        )
    if kind == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(known)
            and all(conforms(each, known[name]) for name, each in value.items())
        )
    return isinstance(value, bool) if kind == "boolean" else value is None
