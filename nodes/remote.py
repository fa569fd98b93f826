"""Generations over a peer link: the Generator whose tokens a peer makes, and the other end, which makes them.

The other end also tells apart what a peer asks for: a generation, or an operation of an operator."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import trio

from mesh.errors import MeshError, PeerUnavailable
from mesh.forwarder import Forwarder, IncomingStream, OutgoingStream, RemoteError
from mesh.view import MemberView
from nodes.generation import (
    GenerateEvent,
    GenerateRequest,
    GenerationMoved,
    Generator,
    RequestInvalid,
)
from nodes.generation_codec import (
    REQUEST_BYTES_MAX,
    decode_error,
    decode_event,
    decode_request,
    encode_event,
    encode_request,
)
from nodes.peer_execution import executing_for_peer
from nodes.peer_operations import Handler, is_operation, serve_operation
from observability.tracing import NO_TRACING, Tracer

logger = logging.getLogger(__name__)


class RemoteGenerator:
    """The Generator of one peer."""

    def __init__(self, forwarder: Forwarder, peer: MemberView) -> None:
        self._forwarder = forwarder
        self._peer = peer

    async def open(self, request: GenerateRequest) -> trio.abc.ReceiveChannel[GenerateEvent]:
        """Raises PeerUnavailable, or RequestInvalid for a request too large for a link."""
        data = encode_request(request)
        if len(data) > REQUEST_BYTES_MAX:
            message = f"the request has {len(data)} bytes, which exceeds {REQUEST_BYTES_MAX}"
            raise RequestInvalid(message, param="messages", status=413)
        stream = await self._forwarder.open(self._peer.node_id, self._peer.address, data)
        return _RemoteStream(stream, self._peer.node_id)


class _RemoteStream(trio.abc.ReceiveChannel[GenerateEvent]):
    """Decodes the events of one stream, and turns the peer's errors back into what they were there.

    A read takes all that waits, as one event: a reader that is late gets fewer and larger ones.
    """

    def __init__(self, stream: OutgoingStream, node_id: str) -> None:
        self._stream = stream
        self._node_id = node_id

    async def receive(self) -> GenerateEvent:
        try:
            event = decode_event(await self._stream.receive())
            # What ends the stream is not lost by being met here: the next read meets it again.
            with suppress(trio.WouldBlock, trio.EndOfChannel, MeshError):
                while True:
                    event = event.merged_with(decode_event(self._stream.receive_nowait()))
            return event
        except ValueError as exc:
            raise PeerUnavailable(f"node {self._node_id} sent an event that this version cannot read") from exc
        except RemoteError as exc:
            raise decode_error(exc.code, str(exc)) from exc

    async def aclose(self) -> None:
        await self._stream.aclose()


class PeerServer:
    """Does what peers ask for on their streams: generations, by this node's engines, and operations."""

    def __init__(self, local: Generator, operations: Mapping[str, Handler], tracer: Tracer = NO_TRACING) -> None:
        self._local = local
        self._operations = operations
        self._tracer = tracer
        self._generations: set[trio.CancelScope] = set()  # a link bounds its streams, and the forwarder its links

    async def serve(self, stream: IncomingStream) -> None:
        """By the first byte of the request. Cancelled when the peer cancels or its link breaks."""
        if is_operation(stream.request):
            await serve_operation(stream, self._operations)
        else:
            await self._generate(stream)

    def move_all(self) -> int:
        """End every generation executed for a peer, so that it goes on elsewhere. Returns how many there were."""
        moved = len(self._generations)
        for scope in self._generations:
            scope.cancel()
        return moved

    async def _generate(self, stream: IncomingStream) -> None:
        """Execute one generation for a peer. That it was cancelled frees the slot.

        A request that has been forwarded already is executed here or refused, never forwarded again.
        """
        scope = trio.CancelScope()
        self._generations.add(scope)
        try:
            with executing_for_peer(self._tracer, stream) as execution:
                request = decode_request(stream.request)
                if request.generated_ids:
                    execution.fields["resumed_tokens"] = len(request.generated_ids)
                trace = execution.begin(
                    request.trace, request_id=request.request_id, model=request.model, hops=request.hops
                )
                with scope:
                    generation = await self._local.open(replace(request, trace=trace))
                    async with generation:
                        async for event in generation:
                            if event.finish_reason is not None:
                                execution.done()
                            await stream.send(encode_event(event))
                if scope.cancelled_caught:
                    raise GenerationMoved("the node drains")
        finally:
            self._generations.discard(scope)
