"""The questions of mesh.exchange on peer links: a stream each, the question its request, the answer its one event."""

from __future__ import annotations

import trio

from mesh.errors import MalformedDatagram, PeerUnavailable
from mesh.forwarder import Forwarder, IncomingStream, StreamRefused
from mesh.gossip import Gossip
from mesh.view import Address

# No msgpack container begins so; requests of every other kind are one.
_PREFIX = b"exchange 1 "
CODE_MALFORMED = "malformed"


async def ask(forwarder: Forwarder, node_id: str, address: Address, question: bytes) -> bytes:
    """A member's answer. Raises MeshError when there is none."""
    try:
        async with await forwarder.open(node_id, address, _PREFIX + question) as stream:
            answer = await stream.receive()
    except trio.EndOfChannel as exc:
        raise PeerUnavailable(f"node {node_id} ended without an answer") from exc
    if not isinstance(answer, bytes):
        raise PeerUnavailable(f"node {node_id} answered with a {type(answer).__name__}, which this version cannot read")
    return answer


def is_question(request: bytes) -> bool:
    return request.startswith(_PREFIX)


async def answer(stream: IncomingStream, gossip: Gossip) -> None:
    """Answer the question that a peer's stream is. Gossip's clock is trio's."""
    try:
        data = gossip.answer_exchange(stream.request.removeprefix(_PREFIX), trio.current_time())
    except MalformedDatagram as exc:
        raise StreamRefused(CODE_MALFORMED, str(exc)) from exc
    await stream.send(data)
