"""What a client asks an answer to look like, in OpenAI's words and in vLLM's, as one grammar."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from nodes.api.body_faults import FieldFault, json_word
from nodes.api.schema import CHARS_SHOWN, Body
from nodes.generation import Grammar, RequestInvalid

CHOICES_MAX = 4_096
FORMAT_TYPES = ("text", "json_object", "json_schema")
STRUCTURED_KEYS = ("json", "regex", "choice", "grammar", "json_object")

Schema = dict[str, Any]
ChoiceList = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=CHOICES_MAX)]


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchema(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="The answer follows the schema either way.")


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """One of these. json: a schema, also as text."""

    # A key that were ignored would leave the answer free, where the client relies on its form.
    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1})

    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: ChoiceList | None = None
    grammar: str | None = None
    json_object: bool | None = None


class ConstraintFields(Body):
    """vLLM's fields for structured output, older and newer."""

    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: ChoiceList | None = None
    guided_grammar: str | None = Field(None, description="A Lark grammar as llguidance writes it")
    structured_outputs: StructuredOutputs | None = None


@dataclass(frozen=True, slots=True)
class Constraint:
    """param: the field that asks for it."""

    grammar: Grammar
    param: str

    @property
    def object_schema(self) -> Schema | None:
        """The JSON Schema of it; None where it is something else than one of objects."""
        if self.grammar.kind == "json_object":
            return {"type": "object"}
        try:
            schema = json.loads(self.grammar.text) if self.grammar.kind == "json_schema" else None
        except (ValueError, RecursionError):
            return None
        return schema if isinstance(schema, dict) and schema.get("type") == "object" else None


def constraint_of(fields: ConstraintFields, response_format: ResponseFormat | None = None) -> Constraint | None:
    """Raises RequestInvalid where more than one is asked for, or structured_outputs asks for nothing."""
    newer = fields.structured_outputs
    if newer is not None and not newer.model_dump(exclude_none=True):
        keys = _listed(STRUCTURED_KEYS, "or")
        raise RequestInvalid(
            f"structured_outputs says nothing; give it one of {keys}, or leave it out", param="structured_outputs"
        )
    asked = [
        ("response_format", _format_grammar(response_format)),
        ("guided_json", _json_grammar(fields.guided_json)),
        ("guided_regex", _grammar("regex", fields.guided_regex)),
        ("guided_choice", _choice_grammar(fields.guided_choice)),
        ("guided_grammar", _grammar("grammar", fields.guided_grammar)),
    ]
    if newer is not None:
        asked += [
            ("structured_outputs.json", _json_grammar(newer.json_)),
            ("structured_outputs.regex", _grammar("regex", newer.regex)),
            ("structured_outputs.choice", _choice_grammar(newer.choice)),
            ("structured_outputs.grammar", _grammar("grammar", newer.grammar)),
            ("structured_outputs.json_object", Grammar("json_object") if newer.json_object else None),
        ]
    found = [Constraint(grammar, param) for param, grammar in asked if grammar is not None]
    if len(found) > 1:
        raise RequestInvalid(
            f"{found[0].param} and {found[1].param} both say what the answer must look like; send one",
            param=found[1].param,
        )
    return found[0] if found else None


def _format_grammar(response_format: ResponseFormat | None) -> Grammar | None:
    match response_format:
        case JsonObjectFormat():
            return Grammar("json_object")
        case JsonSchemaFormat():
            schema = response_format.json_schema.schema_
            return Grammar("json_object") if schema is None else _json_grammar(schema)
    return None


def _json_grammar(schema: Schema | str | None) -> Grammar | None:
    if schema is None:
        return None
    return Grammar("json_schema", schema if isinstance(schema, str) else json.dumps(schema, separators=(",", ":")))


def _choice_grammar(choices: list[str] | None) -> Grammar | None:
    return None if choices is None else Grammar("choice", json.dumps(choices))


def _grammar(kind: str, text: str | None) -> Grammar | None:
    return None if text is None else Grammar(kind, text)


def _format_fault(value: object) -> RequestInvalid | None:
    """Why this is no response_format; None where it is of a known type, and something in it is wrong."""
    types = _listed(tuple(f"'{kind}'" for kind in FORMAT_TYPES), "or")
    if not isinstance(value, dict):
        fault = f"response_format is {json_word(value)}, and should be an object whose type is {types}"
        return RequestInvalid(fault, param="response_format")
    if value.get("type") in FORMAT_TYPES:
        return None
    fault = "is missing, and should be" if "type" not in value else "should be"
    return RequestInvalid(f"response_format: its type {fault} {types}", param="response_format")


def _structured_fault(value: object) -> RequestInvalid | None:
    """Names a key that structured_outputs does not have; None where it has none such."""
    unknown = [key for key in value if key not in STRUCTURED_KEYS] if isinstance(value, dict) else []
    if not unknown:
        return None
    fault = f"{unknown[0][:CHARS_SHOWN]!r} is none of its keys, which are {_listed(STRUCTURED_KEYS, 'and')}"
    return RequestInvalid(f"structured_outputs: {fault}", param="structured_outputs")


def _listed(words: tuple[str, ...], last: str) -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


CONSTRAINT_FAULTS: dict[str, FieldFault] = {
    "response_format": _format_fault,
    "structured_outputs": _structured_fault,
}
