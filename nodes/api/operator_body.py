"""Bodies of requests to /admin: JSON objects of known fields and exact types. A refusal never quotes what was sent: it
may be a key."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from quart import Request

from nodes.api.request_body import read_body
from nodes.generation import RequestInvalid


class OperatorBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, hide_input_in_errors=True)


Body = TypeVar("Body", bound=OperatorBody)


async def read_operator_body(request: Request, kind: type[Body]) -> Body:
    """No body is an empty object. Raises RequestInvalid."""
    try:
        return kind.model_validate_json(await read_body(request) or b"{}")
    except ValidationError as exc:
        fault = exc.errors(include_input=False, include_url=False)[0]
        param = ".".join(str(part) for part in fault["loc"]) or None
        reason = str(fault.get("ctx", {}).get("error", "")) or fault["msg"]
        raise RequestInvalid(f"{param or 'the body'}: {reason}", param=param) from exc
