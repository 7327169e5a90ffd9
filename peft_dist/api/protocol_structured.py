"""The fields of a body that say what the answer must match: OpenAI's, vLLM's, and those that vLLM had before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from peft_dist.api.strict import Strict
from peft_dist.api.unimplemented import refuse_in_response_format, refuse_in_structured_outputs
from peft_dist.core.errors import InvalidRequestError
from peft_dist.core.structured_output import StructuredOutput


def _parse_schema(value: object) -> object:
    # Checked by hand: of a union the field would be named with the type that did not fit.
    if value is None or isinstance(value, (dict, bool, str)):
        return value
    raise PydanticCustomError("schema", "it must be a JSON schema: an object, or its text")


Schema = Annotated[
    Any,
    BeforeValidator(_parse_schema),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "boolean"}, {"type": "string"}, {"type": "null"}]}),
]


class JsonSchema(Strict):
    """A schema with its name, which is not used. The answer always follows it, whatever ``strict`` says."""

    name: str | None = None
    description: str | None = None
    json_schema: Schema = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's way: `text`, `json_object`, or `json_schema` with the schema."""

    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's way: one of these."""

    of_json: Schema = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What the answer must match, and the name of the field that says so."""

    param: str
    spec: StructuredOutput


class StructuredFields(Strict):
    """At most one of them may ask for something."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None

    def structured(self) -> Asked | None:
        """What the answer must match.

        Raises:
            ApiError: something is not implemented.
            InvalidRequestError: something is wrong, or two exclude each other.
        """
        given = [*self._of_response_format(), *self._of_structured_outputs(), *self._of_guided()]
        if len(given) > 1:
            names = " and ".join(param for param, _, _ in given)
            raise InvalidRequestError(f"{names} exclude each other: send one of them", given[1][0])
        if not given:
            return None
        [(param, kind, value)] = given
        try:
            return Asked(param, StructuredOutput(**{kind: value}))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{param} is not valid: {error}", param) from error

    def _of_response_format(self) -> list[tuple[str, str, Any]]:
        form = self.response_format
        if form is None:
            return []
        refuse_in_response_format(form.type, form.model_extra or {})
        if form.type == "json_object":
            return [("response_format", "json_object", True)]
        if form.type == "text":
            return []
        if form.json_schema is None or form.json_schema.json_schema is None:
            raise InvalidRequestError(
                "response_format.json_schema.schema is missing: send the JSON schema there", "response_format"
            )
        return [("response_format", "json_schema", form.json_schema.json_schema)]

    def _of_structured_outputs(self) -> list[tuple[str, str, Any]]:
        asked = self.structured_outputs
        if asked is None:
            return []
        refuse_in_structured_outputs(asked.model_extra or {})
        found = [
            ("structured_outputs.json", "json_schema", asked.of_json),
            ("structured_outputs.regex", "regex", asked.regex),
            ("structured_outputs.choice", "choice", asked.choice),
            ("structured_outputs.grammar", "grammar", asked.grammar),
            ("structured_outputs.json_object", "json_object", asked.json_object or None),
        ]
        return [entry for entry in found if entry[2] is not None]

    def _of_guided(self) -> list[tuple[str, str, Any]]:
        found = [
            ("guided_json", "json_schema", self.guided_json),
            ("guided_regex", "regex", self.guided_regex or None),
            ("guided_choice", "choice", self.guided_choice or None),
            ("guided_grammar", "grammar", self.guided_grammar or None),
            ("guided_json_object", "json_object", self.guided_json_object or None),
        ]
        return [entry for entry in found if entry[2] is not None]
