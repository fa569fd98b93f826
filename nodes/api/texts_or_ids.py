"""Texts or token ids, one or several, as prompts and inputs are: why a value is in none of the forms.

Pydantic tells of a union only that a value is not of its first type."""

from __future__ import annotations

from typing import TypeGuard

from nodes.api.body_faults import json_word
from nodes.api.schema import TOKENS_MAX
from nodes.generation import RequestInvalid

FORMS = "a text, a list of texts, a list of token ids or a list of such lists"


def texts_or_ids_fault(value: object, field: str, *, count_max: int, ids_max: int) -> RequestInvalid:
    """field: its name, which is one of what it holds. count_max: of texts or lists. ids_max: token ids in one list."""
    if not isinstance(value, list):
        return _fault(field, f"is {json_word(value)}, and should be {FORMS}")
    if not value:
        return _fault(field, "is an empty list; give at least one text")
    first = value[0]
    if _is_int(first):
        return _ids_fault(field, value, ids_max) or _fault(field, f"should be {FORMS}")
    if not isinstance(first, str | list):
        return _fault(f"{field}[0]", f"is {json_word(first)}, and should be a text, a token id or a list of token ids")
    if len(value) > count_max:
        return _fault(field, f"has {len(value)} {field}s, and may have at most {count_max} {field}s")
    for index, part in enumerate(value):
        if type(part) is not type(first):
            kind = "a text" if isinstance(first, str) else "a list of token ids"
            return _fault(f"{field}[{index}]", f"is {json_word(part)}, and should be {kind} as {field}[0] is")
        if isinstance(part, list):
            fault = _ids_fault(f"{field}[{index}]", part, ids_max)
            if fault is not None:
                return fault
    return _fault(field, f"should be {FORMS}")


def _ids_fault(path: str, ids: list[object], ids_max: int) -> RequestInvalid | None:
    if not ids:
        return _fault(path, "is empty; give at least one token id")
    if len(ids) > ids_max:
        return _fault(path, f"has {len(ids)} token ids, the limit is {ids_max}")
    for index, token_id in enumerate(ids):
        if not _is_int(token_id):
            return _fault(f"{path}[{index}]", f"is {json_word(token_id)}, and should be a token id, a whole number")
        if not 0 <= token_id <= TOKENS_MAX:
            return _fault(f"{path}[{index}]", f"is no token id: they are 0 to {TOKENS_MAX}")
    return None


def _fault(path: str, text: str) -> RequestInvalid:
    return RequestInvalid(f"{path} {text}", param=path)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
