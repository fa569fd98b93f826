"""OpenAI's error object, and the one place where an exception becomes a status code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from werkzeug.exceptions import HTTPException, MethodNotAllowed

from mesh.errors import ModelUnknown, NoCapacity, PeerUnavailable
from mesh.retry_after import RETRY_AFTER_MAX_S
from nodes.access.gate import Forbidden, LimitReached, Unauthorized
from nodes.access.limits import Kind, Remaining
from nodes.api.limit_headers import limit_headers
from nodes.generation import DeadlineExceeded, GenerationFailed, RequestInvalid


@dataclass(frozen=True, slots=True)
class ApiError:
    """One error as clients see it. type and code: OpenAI's words, which its clients match on."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    remaining: Mapping[Kind, Remaining] = field(default_factory=dict)

    def body(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = limit_headers(self.remaining)
        if self.retry_after_s is not None:
            seconds = min(self.retry_after_s, RETRY_AFTER_MAX_S)
            headers["retry-after"] = str(max(1, math.ceil(seconds)))
            headers["retry-after-ms"] = str(max(1, math.ceil(seconds * 1000)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def api_error(error: Exception) -> ApiError:
    """What the client is told. Texts of unexpected errors stay in the log: they may hold what is not the client's."""
    match error:
        case RequestInvalid():
            return ApiError(error.status, str(error), param=error.param, code=error.code)
        case Unauthorized():
            return ApiError(401, str(error), code="invalid_api_key")
        case Forbidden():
            return ApiError(403, str(error), code="model_not_allowed", param="model")
        case LimitReached():
            return ApiError(
                429,
                str(error),
                "tokens" if error.kind == "tokens" else "requests",
                code="rate_limit_exceeded",
                retry_after_s=error.retry_after_s,
                remaining=error.remaining,
            )
        case ModelUnknown():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case NoCapacity():
            return ApiError(503, str(error), "server_error", code="no_capacity", retry_after_s=error.retry_after_s)
        case DeadlineExceeded():
            return ApiError(504, str(error), "server_error", code="deadline_exceeded")
        case GenerationFailed() | PeerUnavailable():
            return ApiError(502, str(error), "server_error", code="generation_failed")
        case HTTPException():
            status = error.code or 500
            return ApiError(
                status, _http_message(error, status), code=HTTPStatus(status).phrase.lower().replace(" ", "_")
            )
    return ApiError(500, "internal error; the log has it under this request id", "server_error", code="internal_error")


def _http_message(error: HTTPException, status: int) -> str:
    if status == HTTPStatus.NOT_FOUND:
        return "no such path; the API is under /v1, for example POST /v1/chat/completions"
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return "the request body is larger than this node accepts (body_bytes_max)"
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        return f"this path is for {' and '.join(sorted({*error.valid_methods} - {'OPTIONS'}))}"
    return (error.description or HTTPStatus(status).phrase).strip()
