"""Embeddings over a peer link: the Embedder whose vectors a peer computes, and the other end, which computes them."""

from __future__ import annotations

import logging
from dataclasses import replace

import trio

from mesh.errors import MeshError, PeerUnavailable
from mesh.forwarder import Forwarder, IncomingStream, RemoteError, StreamRefused
from mesh.view import MemberView
from nodes.embedding import Embedder, Embeddings, EmbedRequest
from nodes.embedding_codec import AnswerReader, decode_request, encode_answer, encode_request
from nodes.generation import GenerationError, RequestInvalid
from nodes.generation_codec import REQUEST_BYTES_MAX, decode_error, encode_error
from nodes.remote import HOPS_MAX, execute_span
from observability.tracing import NO_TRACING, Tracer, end_span, log_fields, unrecorded

logger = logging.getLogger(__name__)


class RemoteEmbedder:
    """The Embedder of one peer."""

    def __init__(self, forwarder: Forwarder, peer: MemberView) -> None:
        self._forwarder = forwarder
        self._peer = peer

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Cancelling it cancels at the peer. Raises PeerUnavailable and what the peer's engine does, and RequestInvalid
        for a request too large for a link."""
        data = encode_request(request)
        if len(data) > REQUEST_BYTES_MAX:
            message = f"the inputs have {len(data)} bytes together, which exceeds {REQUEST_BYTES_MAX}"
            raise RequestInvalid(message, param="input", status=413)
        reader = AnswerReader(len(request.inputs))
        try:
            async with await self._forwarder.open(self._peer.node_id, self._peer.address, data) as stream:
                while not reader.is_complete:
                    reader.feed(await stream.receive())
        except trio.EndOfChannel as exc:
            raise PeerUnavailable(f"node {self._peer.node_id} ended without all embeddings") from exc
        except ValueError as exc:
            message = f"node {self._peer.node_id} sent embeddings that this version cannot read"
            raise PeerUnavailable(message) from exc
        except RemoteError as exc:
            raise decode_error(exc.code, str(exc)) from exc
        return reader.answer()


class EmbeddingServer:
    """Computes embeddings for peers, by this node's engines."""

    def __init__(self, local: Embedder, tracer: Tracer = NO_TRACING) -> None:
        self._local = local
        self._tracer = tracer

    async def serve(self, stream: IncomingStream) -> None:
        """A request that has been forwarded already is executed here or refused, never forwarded again. Cancelled when
        the peer cancels or its link breaks. Raises StreamRefused, NoCapacity, ModelUnknown."""
        started = trio.current_time()
        fields: dict[str, object] = {"peer": stream.peer_node_id}
        span = unrecorded(None)
        error: str | None = None  # cancelled by the peer or the end of its link, until something else is known
        try:
            request = decode_request(stream.request)
            fields |= {"request_id": request.request_id, "model": request.model, "inputs": len(request.inputs)}
            fields |= log_fields(request.trace)
            span = execute_span(
                self._tracer, request.trace, stream.peer_node_id, request.model, request.request_id, started
            )
            if request.hops > HOPS_MAX:
                raise RequestInvalid(f"the request has been forwarded {request.hops} times, the limit is {HOPS_MAX}")
            answer = await self._local.embed(replace(request, trace=span.context))
            error = ""  # a peer that has all of it may cancel at once; it was executed all the same
            for event in encode_answer(answer):
                await stream.send(event)
        except MeshError as exc:
            error = type(exc).__name__
            raise
        except GenerationError as exc:
            error = type(exc).__name__
            code, message = encode_error(exc)
            logger.info("refused a peer's request", extra=fields | {"error.type": type(exc).__name__})
            raise StreamRefused(code, message) from exc
        finally:
            end_span(span, error)
            if error == "":
                logger.info(
                    "executed a peer's request",
                    extra=fields | {"duration_ms": round((trio.current_time() - started) * 1000, 3)},
                )
