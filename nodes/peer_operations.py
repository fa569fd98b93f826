"""Operations over a peer link: one node asks another by name, and gets one object back.

They travel as streams like generations do, told apart by their first byte. A node of a version that does not know an
operation, or knows none at all, answers with an error; unknown arguments are for the operation to ignore.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgpack
import trio

from mesh.errors import MeshError
from mesh.forwarder import Forwarder, IncomingStream, RemoteError, StreamRefused
from mesh.view import MemberView

logger = logging.getLogger(__name__)

# The one byte that begins no msgpack object, and so no generation request.
MARK = b"\xc1"
NAME_CHARS_MAX = 64
CODE_UNKNOWN = "operation_unknown"
CODE_REFUSED = "operation_refused"

Arguments = Mapping[str, Any]
Answer = dict[str, Any]
Handler = Callable[[Arguments], Awaitable[Answer]]


class OperationFailed(Exception):
    """A node did not do what it was asked. The message is for the operator: the cause, and the fix if there is one."""


def is_operation(request: bytes) -> bool:
    """True for a request of a peer that is no generation."""
    return request.startswith(MARK)


def encode_operation(name: str, arguments: Arguments) -> bytes:
    packed: bytes = msgpack.packb({"operation": name, "arguments": arguments})
    return MARK + packed


def decode_operation(request: bytes) -> tuple[str, Arguments]:
    """Raises OperationFailed for bytes that are no operation. Unknown fields are ignored."""
    try:
        body = msgpack.unpackb(request.removeprefix(MARK))
        name, arguments = body["operation"], body["arguments"]
    except (msgpack.UnpackException, ValueError, KeyError, TypeError) as exc:
        raise OperationFailed(f"undecodable operation from a peer: {type(exc).__name__}") from exc
    if not isinstance(name, str) or len(name) > NAME_CHARS_MAX or not isinstance(arguments, dict):
        raise OperationFailed("an operation has a name and a map of arguments")
    return name, arguments


async def serve_operation(stream: IncomingStream, handlers: Mapping[str, Handler]) -> None:
    """Do what a peer asks. Raises StreamRefused, which tells it why not."""
    try:
        name, arguments = decode_operation(stream.request)
        handler = handlers.get(name)
        if handler is None:
            raise StreamRefused(CODE_UNKNOWN, f"this node's version does not know the operation {name!r}")
        logger.info("a peer asks for an operation", extra={"peer": stream.peer_node_id, "operation": name})
        answer = await handler(arguments)
    except OperationFailed as exc:
        raise StreamRefused(CODE_REFUSED, str(exc)) from exc
    await stream.send(answer)


async def ask_peer(forwarder: Forwarder, peer: MemberView, name: str, arguments: Arguments) -> Answer:
    """The peer's answer. Raises OperationFailed; the caller bounds the time."""
    try:
        async with await forwarder.open(peer.node_id, peer.address, encode_operation(name, arguments)) as stream:
            answer = await stream.receive()
    except RemoteError as exc:
        if exc.code in (CODE_UNKNOWN, CODE_REFUSED):
            raise OperationFailed(str(exc)) from exc
        raise OperationFailed(f"it did not understand {name!r} ({exc.code}); is it of an older version?") from exc
    except MeshError as exc:
        raise OperationFailed(str(exc)) from exc
    except trio.EndOfChannel:
        raise OperationFailed("it ended without an answer") from None
    if not isinstance(answer, dict) or not all(isinstance(key, str) for key in answer):
        raise OperationFailed(f"it answered {name!r} in a form that this version cannot read")
    return answer
