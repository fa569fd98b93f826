"""Embeddings over a peer link: the Embedder whose vectors a peer computes, and the other end, which computes them."""

from __future__ import annotations

import logging
from dataclasses import replace

import trio

from mesh.errors import PeerUnavailable
from mesh.forwarder import Forwarder, IncomingStream, RemoteError
from mesh.view import MemberView
from nodes.embedding import Embedder, Embeddings, EmbedRequest
from nodes.embedding_codec import AnswerReader, decode_request, encode_answer, encode_request
from nodes.generation import RequestInvalid
from nodes.generation_codec import REQUEST_BYTES_MAX, decode_error
from nodes.peer_execution import executing_for_peer
from observability.tracing import NO_TRACING, Tracer

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
        with executing_for_peer(self._tracer, stream) as execution:
            request = decode_request(stream.request)
            execution.fields["inputs"] = len(request.inputs)
            trace = execution.begin(
                request.trace, request_id=request.request_id, model=request.model, hops=request.hops
            )
            answer = await self._local.embed(replace(request, trace=trace))
            execution.done()
            for event in encode_answer(answer):
                await stream.send(event)
