"""What is wrong with a body of JSON, in words for whoever sent it: pydantic's tell of Python's types and of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from nodes.generation import RequestInvalid

# Why a value is none for its field; None where pydantic tells it well enough.
FieldFault = Callable[[object], RequestInvalid | None]

# Fields whose keys are the client's own words, which an error's `param` does not repeat.
FREE_KEYS = ("logit_bias", "metadata")
# Fields of several types told apart by a tag, which pydantic puts into a fault's place.
TAGGED = ("response_format", "tool_choice")
# As JSON calls what pydantic calls List and Dictionary.
_CONTAINERS = {"List": "a list", "Dictionary": "an object"}


def fault_of(error: ValidationError, data: bytes, fields: Mapping[str, FieldFault]) -> RequestInvalid:
    """The first fault of a body. fields: those that may be of several types, of which pydantic tells only that a value
    is not of the first."""
    fault = error.errors(include_url=False, include_input=False)[0]
    if fault["type"] == "json_invalid":
        return RequestInvalid(f"the body is no JSON: {fault['ctx']['error']}", code="invalid_json")
    own = _own_fault(fault, data, fields)
    if own is not None:
        return own
    param = _path(fault["loc"])
    message = _message(fault)
    message = f"{param}: {message}" if param else f"the body must be a JSON object: {message}"
    return RequestInvalid(message, param=param or None)


def json_word(value: object) -> str:
    """What JSON calls it. A text is not repeated: it is the client's own."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int():
            return "a number"
        case float():
            return "a number with a fraction"
        case str():
            return "a text"
        case list():
            return "a list"
        case _:
            return "an object"


def _own_fault(fault: ErrorDetails, data: bytes, fields: Mapping[str, FieldFault]) -> RequestInvalid | None:
    """What the field's own function says of its value."""
    field = fault["loc"][0] if fault["loc"] else None
    if not isinstance(field, str) or field not in fields:
        return None
    body = from_json(data)
    return fields[field](body[field]) if field in body else None


def _message(fault: ErrorDetails) -> str:
    context: dict[str, Any] = fault.get("ctx", {})
    if fault["type"] not in ("too_short", "too_long") or context.get("field_type") not in _CONTAINERS:
        return fault["msg"]
    is_short = fault["type"] == "too_short"
    bound = context["min_length" if is_short else "max_length"]
    items = f"at {'least' if is_short else 'most'} {bound} {'item' if bound == 1 else 'items'}"
    count = context["actual_length"]
    return f"should be {_CONTAINERS[context['field_type']]} of {items}, and has {'more' if count is None else count}"


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") → "messages[0].role"; the names pydantic adds for members of a union are left out: those
    of types, which no field is called by, and of models, which begin with a capital."""
    path = ""
    is_tag_seen = False
    for part in location:
        if path in FREE_KEYS:
            break
        if path in TAGGED and not is_tag_seen and isinstance(part, str) and part.isidentifier():
            is_tag_seen = True
            continue
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and not part[0].isupper() and part not in ("str", "int", "constrained"):
            path += f".{part}" if path else part
    return path
