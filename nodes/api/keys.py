"""/admin/keys and /admin/usage: API keys and what they used, for whoever shows the admin token (nodes/api/admin.py)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import trio
from pydantic import AfterValidator, BeforeValidator, Field
from quart import Quart, Response, jsonify, request
from werkzeug.routing import PathConverter

from mesh.replica import EditRefused
from nodes.access.api_key import ApiKey, KeyMalformed, KeySettings
from nodes.access.key_admin import Edited, KeyAdmin
from nodes.access.key_book import KeyAmbiguous, KeyUnknown
from nodes.access.usage import DAY_S
from nodes.api.operator_body import OperatorBody, read_operator_body
from nodes.api.served_models import is_served
from nodes.api.services import Services
from nodes.generation import PRIORITY_DEFAULT, RequestInvalid
from nodes.iso_time import iso_time, parse_day, parse_time
from nodes.store import StoreFailed

USAGE_DAYS_DEFAULT = 30
GRACE_S_MAX = 90 * 86_400
# In a list; some milliseconds' work.
KEYS_PER_CHECKPOINT = 64


def _time(value: object) -> object:
    """A date, a time of ISO 8601 (UTC where it names no zone), or seconds since 1970. Raises ValueError."""
    return parse_time(value) if isinstance(value, str) else value


def _models(value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value))


Limit = Annotated[int | None, Field(ge=1)]
Time = Annotated[int | None, BeforeValidator(_time, json_schema_input_type=int | str | None)]
Models = Annotated[tuple[str, ...], AfterValidator(_models)]


class _KeyName(PathConverter):
    """A name may have slashes anywhere, which `%2F` in a path has become when routes are looked at."""

    part_isolating = False
    regex = ".+?"


class _KeyNameAlone(_KeyName):
    """At the end of a path. One that ends with the word of the other route is reached by its key's id."""

    regex = "(?!.*/rotate$).+?"


class CreateBody(OperatorBody):
    name: str
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    concurrency: Limit = None
    models: Models = ()
    priority: int = PRIORITY_DEFAULT
    expires_at: Time = None
    enabled: bool = True


class ChangeBody(OperatorBody):
    """What is left out stays; null takes a limit away."""

    name: str | None = None
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    concurrency: Limit = None
    models: Models = ()
    priority: int = PRIORITY_DEFAULT
    expires_at: Time = None
    enabled: bool = True


class RotateBody(OperatorBody):
    """grace_s: how long the old key goes on working."""

    grace_s: int = Field(0, ge=0, le=GRACE_S_MAX)


def register(app: Quart, services: Services) -> None:
    admin = services.key_admin
    app.url_map.converters |= {"key_name": _KeyName, "key_name_alone": _KeyNameAlone}
    one = "/admin/keys/<key_name_alone:name>"

    def unserved(key: ApiKey) -> list[str]:
        """Of the models that it may use, those that no live node has: a typing error, or a node that is away."""
        view = services.view()
        return [name for name in key.settings.models if not is_served(view, name)]

    def answer(edited: Edited) -> Response:
        body: dict[str, Any] = {
            "key": _shown(edited.key, admin),
            "also_revoked": [key.public_id for key in edited.also_revoked],
            "others": [_shown(key, admin) for key in edited.others],
            "unserved_models": unserved(edited.key),
            "untold": dict(edited.untold),
        }
        if edited.token:
            body["token"] = edited.token
        response = jsonify(body)
        response.headers["cache-control"] = "no-store"
        return response

    @app.get("/admin/keys")
    async def list_api_keys() -> Response:
        keys = []
        for index, key in enumerate(admin.keys):  # each one's use is counted over all nodes
            if index % KEYS_PER_CHECKPOINT == 0:
                await trio.lowlevel.checkpoint()
            keys.append(_shown(key, admin))
        return jsonify({"keys": keys, "revoked": admin.revoked_count})

    @app.post("/admin/keys")
    async def create_api_key() -> Response:
        settings = _settings(await read_operator_body(request, CreateBody))
        return answer(await _done(lambda: admin.create(settings)))

    @app.get(one, merge_slashes=False)
    async def show_api_key(name: str) -> Response:
        return jsonify(_shown(_found(admin, name), admin))

    @app.patch(one, merge_slashes=False)
    async def change_api_key(name: str) -> Response:
        body = await read_operator_body(request, ChangeBody)
        changes = {field: getattr(body, field) for field in body.model_fields_set}
        if "enabled" in changes:
            changes["is_enabled"] = changes.pop("enabled")
        if changes.get("name", "") is None:
            raise RequestInvalid("name: a key has one", param="name")
        return answer(await _done(lambda: admin.change(name, changes)))

    @app.post("/admin/keys/<key_name:name>/rotate", merge_slashes=False)
    async def rotate_api_key(name: str) -> Response:
        body = await read_operator_body(request, RotateBody)
        return answer(await _done(lambda: admin.rotate(name, body.grace_s)))

    @app.delete(one, merge_slashes=False)
    async def revoke_api_key(name: str) -> Response:
        is_all = _flag("all")
        return answer(await _done(lambda: admin.revoke(name, is_all=is_all)))

    @app.get("/admin/usage")
    async def usage() -> Response:
        today = datetime.now(UTC).date()
        last = _day("to", today.isoformat())
        first = _day("from", (today - timedelta(days=USAGE_DAYS_DEFAULT - 1)).isoformat())
        if first > last:
            raise RequestInvalid("from: this day is after the last one", param="from")
        try:
            sums = await admin.usage(first, last, request.args.get("key"))
        except KeyUnknown as exc:
            raise _not_found(exc) from exc
        except StoreFailed as exc:
            raise RequestInvalid(str(exc), code="not_read", status=503) from exc
        names = admin.names()
        rows = [
            {
                "day": datetime.fromtimestamp(row.day * DAY_S, UTC).date().isoformat(),
                "key": f"sk-{row.key}",
                "name": names.get(row.key),
                "model": row.model,
                "requests": row.totals.requests,
                "prompt_tokens": row.totals.prompt_tokens,
                "completion_tokens": row.totals.completion_tokens,
            }
            for row in sums
        ]
        counted = ("requests", "prompt_tokens", "completion_tokens")
        return jsonify({"usage": rows, "total": {name: sum(row[name] for row in rows) for name in counted}})


def _day(argument: str, default: str) -> int:
    """Days since 1970. Raises RequestInvalid."""
    value = request.args.get(argument, default)
    try:
        return parse_day(value)
    except ValueError as exc:
        raise RequestInvalid(f"{argument}: {exc}", param=argument) from exc


def _flag(argument: str) -> bool:
    """Raises RequestInvalid."""
    value = request.args.get(argument, "false")
    if value not in ("true", "false"):
        raise RequestInvalid(f"{argument}: true or false", param=argument)
    return value == "true"


def _settings(body: CreateBody) -> KeySettings:
    fields = body.model_dump()
    fields["is_enabled"] = fields.pop("enabled")
    return KeySettings(**fields)


def _found(admin: KeyAdmin, name: str) -> ApiKey:
    try:
        return admin.find(name)
    except KeyUnknown as exc:
        raise _not_found(exc) from exc


def _not_found(fault: KeyUnknown) -> RequestInvalid:
    if isinstance(fault, KeyAmbiguous):
        return RequestInvalid(str(fault), code="key_ambiguous", status=409)
    return RequestInvalid(str(fault), code="key_not_found", status=404)


async def _done(edit: Callable[[], Awaitable[Edited]]) -> Edited:
    try:
        return await edit()
    except KeyUnknown as exc:
        raise _not_found(exc) from exc
    except KeyMalformed as exc:
        raise RequestInvalid(str(exc), param=str(exc).partition(":")[0]) from exc
    except EditRefused as exc:
        raise RequestInvalid(str(exc), code="conflict", status=409) from exc
    except StoreFailed as exc:
        raise RequestInvalid(str(exc), code="not_kept", status=507) from exc


def _shown(key: ApiKey, admin: KeyAdmin) -> dict[str, Any]:
    settings = key.settings
    return {
        "id": key.public_id,
        "name": settings.name,
        "enabled": settings.is_enabled,
        "created_at": iso_time(key.created_at),
        "expires_at": None if settings.expires_at is None else iso_time(settings.expires_at),
        "models": list(settings.models),
        "requests_per_minute": settings.requests_per_minute,
        "tokens_per_minute": settings.tokens_per_minute,
        "concurrency": settings.concurrency,
        "priority": settings.priority,
        "family": key.family,
        "remaining": admin.use(key),
    }
