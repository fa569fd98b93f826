"""Generations over a peer link: the Generator whose tokens a peer makes, and the other end, which makes them.

The other end also tells apart what a peer asks for: a generation, or an operation of an operator."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import trio

from mesh.errors import MeshError, PeerUnavailable
from mesh.forwarder import Forwarder, IncomingStream, OutgoingStream, RemoteError, StreamRefused
from mesh.view import MemberView
from nodes.generation import (
    GenerateEvent,
    GenerateRequest,
    GenerationError,
    GenerationMoved,
    Generator,
    RequestInvalid,
)
from nodes.generation_codec import (
    REQUEST_BYTES_MAX,
    decode_error,
    decode_event,
    decode_request,
    encode_error,
    encode_event,
    encode_request,
)
from nodes.peer_operations import Handler, is_operation, serve_operation
from observability.trace_context import TraceContext
from observability.tracing import NO_TRACING, Span, Tracer, end_span, log_fields, unrecorded

logger = logging.getLogger(__name__)

# A request is forwarded by its entry node and by nobody else, so that it cannot wander.
HOPS_MAX = 1


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
        started = trio.current_time()
        fields: dict[str, object] = {"peer": stream.peer_node_id}
        scope = trio.CancelScope()
        span = unrecorded(None)
        error: str | None = None  # cancelled by the peer or the end of its link, until something else is known
        self._generations.add(scope)
        try:
            request = decode_request(stream.request)
            fields |= {"request_id": request.request_id, "model": request.model, **log_fields(request.trace)}
            span = execute_span(
                self._tracer, request.trace, stream.peer_node_id, request.model, request.request_id, started
            )
            if request.generated_ids:
                fields["resumed_tokens"] = len(request.generated_ids)
            if request.hops > HOPS_MAX:
                raise RequestInvalid(f"the request has been forwarded {request.hops} times, the limit is {HOPS_MAX}")
            with scope:
                generation = await self._local.open(replace(request, trace=span.context))
                async with generation:
                    async for event in generation:
                        if event.finish_reason is not None:
                            # A peer that has the last event may cancel at once: it was executed all the same.
                            error = ""
                        await stream.send(encode_event(event))
            if scope.cancelled_caught:
                raise GenerationMoved("the node drains")
            error = ""
        except MeshError as exc:
            error = type(exc).__name__
            raise
        except GenerationError as exc:
            error = type(exc).__name__
            code, message = encode_error(exc)
            logger.info("refused a peer's request", extra=fields | {"error.type": type(exc).__name__})
            raise StreamRefused(code, message) from exc
        finally:
            self._generations.discard(scope)
            end_span(span, error)
            if error == "":
                logger.info(
                    "executed a peer's request",
                    extra=fields | {"duration_ms": round((trio.current_time() - started) * 1000, 3)},
                )


def execute_span(
    tracer: Tracer, trace: TraceContext | None, peer_node_id: str, model: str, request_id: str, started: float
) -> Span:
    """What this node does for a peer. started: on trio's clock."""
    if trace is None or not trace.is_sampled:
        return unrecorded(trace)
    attributes = {"gen_ai.request.model": model, "ai_cluster.peer": peer_node_id, "ai_cluster.request_id": request_id}
    return tracer.span("execute", trace, attributes, kind="server", start=started)
