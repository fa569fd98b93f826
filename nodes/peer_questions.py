"""Questions of bytes between nodes on peer links: a stream each, told apart by the subject it begins with.

Keys (nodes.access.record_sync) and usage (nodes.access.usage) are kept equal by them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import trio

from mesh.errors import MalformedDatagram, PeerUnavailable
from mesh.forwarder import Forwarder, IncomingStream, StreamRefused
from mesh.view import MemberView

# No msgpack container begins so; generation requests are one.
_PREFIX = b"question 1 "
_SUBJECT_BYTES_MAX = 32
CODE_MALFORMED = "malformed"
CODE_UNANSWERED = "unanswered"

Answerer = Callable[[bytes], Awaitable[bytes]]


def is_question(request: bytes) -> bool:
    return request.startswith(_PREFIX)


async def ask(forwarder: Forwarder, subject: str, peer: MemberView, question: bytes) -> bytes:
    """The peer's answer; the caller bounds the time. Raises MeshError when there is none."""
    request = b"%s%s " % (_PREFIX, subject.encode())
    try:
        async with await forwarder.open(peer.node_id, peer.address, request + question) as stream:
            answer = await stream.receive()
    except trio.EndOfChannel as exc:
        raise PeerUnavailable(f"node {peer.node_id} ended without an answer") from exc
    if not isinstance(answer, bytes):
        raise PeerUnavailable(f"node {peer.node_id} answered with a {type(answer).__name__}, not with bytes")
    return answer


async def answer(stream: IncomingStream, answerers: Mapping[str, Answerer]) -> None:
    """Answer the question that a peer's stream is. Raises StreamRefused."""
    subject, separator, question = stream.request.removeprefix(_PREFIX).partition(b" ")
    answerer = answerers.get(subject[:_SUBJECT_BYTES_MAX].decode(errors="replace")) if separator else None
    if answerer is None:
        raise StreamRefused(CODE_MALFORMED, "this node's version does not know the subject of the question")
    try:
        data = await answerer(question)
    except MalformedDatagram as exc:
        raise StreamRefused(CODE_MALFORMED, str(exc)) from exc
    except PeerUnavailable as exc:
        raise StreamRefused(CODE_UNANSWERED, str(exc)) from exc
    await stream.send(data)
