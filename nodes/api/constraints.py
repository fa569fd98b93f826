"""What a client asks an answer to look like, in OpenAI's words and in vLLM's, as one grammar."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from nodes.api.schema import Body
from nodes.generation import Grammar, RequestInvalid

CHOICES_MAX = 4_096

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
    """Raises RequestInvalid where more than one is asked for."""
    newer = fields.structured_outputs
    asked = [
        ("response_format", _format_grammar(response_format)),
        ("guided_json", _json_grammar(fields.guided_json)),
        ("guided_regex", _grammar("regex", fields.guided_regex)),
        ("guided_choice", _choice_grammar(fields.guided_choice)),
        ("guided_grammar", _grammar("grammar", fields.guided_grammar)),
    ]
    if newer is not None:
        asked += [
            ("structured_outputs", _json_grammar(newer.json_)),
            ("structured_outputs", _grammar("regex", newer.regex)),
            ("structured_outputs", _choice_grammar(newer.choice)),
            ("structured_outputs", _grammar("grammar", newer.grammar)),
            ("structured_outputs", Grammar("json_object") if newer.json_object else None),
        ]
    found = [Constraint(grammar, param) for param, grammar in asked if grammar is not None]
    if len(found) > 1:
        raise RequestInvalid(
            f"{found[0].param} and {found[1].param} both say what the answer must look like", param=found[1].param
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
