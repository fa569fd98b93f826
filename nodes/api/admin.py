"""What operators ask of the mesh: keys, members, join, drain, leave, forget. Every request shows the admin token.

Answers are lines of JSON (NDJSON), written as nodes answer: one a node, then a summary. What fails at a node is a line;
a status other than 200 means that nothing was begun."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Annotated

import trio
from pydantic import BeforeValidator, Field, WithJsonSchema
from quart import Quart, Response, request

from mesh.seal import parse_key
from mesh.view import Address
from nodes.api.accounting import exchange_of
from nodes.api.operator_body import OperatorBody, read_operator_body
from nodes.api.services import Services
from nodes.api.sse import EventStreamBody
from nodes.config import parse_mesh_address
from nodes.generation import RequestInvalid
from nodes.mesh_operations import Line, Operation
from nodes.peer_operations import OperationFailed

HEADERS = {"content-type": "application/x-ndjson", "cache-control": "no-store", "x-accel-buffering": "no"}


def _parse_key(value: object) -> bytes:
    """Raises ValueError, which does not show the key."""
    if not isinstance(value, str):
        raise ValueError("a cluster key is text, as `ai-cluster keyring new` prints it")
    return parse_key(value)


KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
Key = Annotated[bytes, BeforeValidator(_parse_key), WithJsonSchema({"type": "string"})]
NodeId = Annotated[str, Field(min_length=1, max_length=64)]


class InstallBody(OperatorBody):
    """here: at the node asked alone."""

    key: Key
    here: bool = False


class KeyBody(OperatorBody):
    """force: also where it cuts members off."""

    key_id: KeyId
    force: bool = False
    here: bool = False


class JoinBody(OperatorBody):
    address: Annotated[Address, BeforeValidator(parse_mesh_address), WithJsonSchema({"type": "string"})]


class LeaveBody(OperatorBody):
    """node_id None: the node asked."""

    node_id: NodeId | None = None


class DrainBody(OperatorBody):
    """node_id None: the node asked. undo: it takes requests again."""

    node_id: NodeId | None = None
    undo: bool = False


class ForgetBody(OperatorBody):
    node_id: NodeId


def register(app: Quart, services: Services) -> None:
    operations = services.operations

    @app.before_request
    async def authorize() -> None:
        # Before a route is looked at, so that nobody without the token learns which there are.
        if request.path == "/admin" or request.path.startswith("/admin/"):
            services.admin_access.authorize(request.headers.get("authorization", ""), request.remote_addr or "")

    def begin(operation: Operation) -> Response:
        lines = operations.start(operation)
        exchange_of(request.scope).closing.append(lines)
        response = Response(None, 200, HEADERS)
        response.response = EventStreamBody(_encoded(lines))
        response.timeout = None
        return response

    @app.get("/admin/keyring")
    async def list_keys() -> Response:
        return begin(operations.list_keys)

    @app.post("/admin/keyring/install")
    async def install() -> Response:
        body = await read_operator_body(request, InstallBody)
        return begin(operations.install(body.key, is_here_only=body.here))

    @app.post("/admin/keyring/use")
    async def use() -> Response:
        body = await read_operator_body(request, KeyBody)
        key_id = bytes.fromhex(body.key_id)
        return begin(operations.use(key_id, is_forced=body.force, is_here_only=body.here))

    @app.post("/admin/keyring/remove")
    async def remove() -> Response:
        body = await read_operator_body(request, KeyBody)
        key_id = bytes.fromhex(body.key_id)
        return begin(operations.remove(key_id, is_forced=body.force, is_here_only=body.here))

    @app.get("/admin/members")
    async def members() -> Response:
        return begin(_known(lambda: operations.members(request.args.get("of"))))

    @app.post("/admin/join")
    async def join() -> Response:
        return begin(operations.join((await read_operator_body(request, JoinBody)).address))

    @app.post("/admin/leave")
    async def leave() -> Response:
        body = await read_operator_body(request, LeaveBody)
        return begin(_known(lambda: operations.leave(body.node_id)))

    @app.post("/admin/drain")
    async def drain() -> Response:
        body = await read_operator_body(request, DrainBody)
        return begin(_known(lambda: operations.drain(body.node_id, is_undone=body.undo)))

    @app.post("/admin/forget")
    async def forget() -> Response:
        body = await read_operator_body(request, ForgetBody)
        return begin(_known(lambda: operations.forget(body.node_id)))


def _known(make: Callable[[], Operation]) -> Operation:
    try:
        return make()
    except OperationFailed as exc:
        raise RequestInvalid(str(exc), param="node_id", status=409) from exc


async def _encoded(lines: trio.MemoryReceiveChannel[Line]) -> AsyncGenerator[bytes, None]:
    async for line in lines:
        # What a later version's node answered may hold what JSON does not know; it is shown, not refused.
        yield json.dumps(line, ensure_ascii=False, default=repr, skipkeys=True).encode() + b"\n"
