"""One request of a peer while this node executes it: its bound of hops, its span, its log line, and what the peer is
told where it fails. Generations and embeddings alike."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from mesh.forwarder import IncomingStream, StreamRefused
from nodes.generation import GenerationError, RequestInvalid
from nodes.generation_codec import encode_error
from nodes.span_ends import end_with
from observability.trace_context import TraceContext
from observability.tracing import Span, Tracer, log_fields, unrecorded

logger = logging.getLogger(__name__)

# A request is forwarded by its entry node and by nobody else, so that it cannot wander.
HOPS_MAX = 1


class PeerExecution:
    """Made by executing_for_peer(). fields: of its log line."""

    def __init__(self, tracer: Tracer, peer_node_id: str) -> None:
        self.fields: dict[str, object] = {"peer": peer_node_id}
        self.is_done = False
        self.span: Span = unrecorded(None)
        self.started = trio.current_time()
        self._tracer = tracer
        self._peer_node_id = peer_node_id

    def begin(self, trace: TraceContext | None, *, request_id: str, model: str, hops: int) -> TraceContext | None:
        """The request is known. Returns what its work is opened under. Raises RequestInvalid where it was forwarded
        before."""
        self.fields |= {"request_id": request_id, "model": model, **log_fields(trace)}
        if trace is not None and trace.is_sampled:
            attributes = {
                "gen_ai.request.model": model,
                "ai_cluster.peer": self._peer_node_id,
                "ai_cluster.request_id": request_id,
            }
            self.span = self._tracer.span("execute", trace, attributes, kind="server", start=self.started)
        else:
            self.span = unrecorded(trace)
        if hops > HOPS_MAX:
            raise RequestInvalid(f"the request has been forwarded {hops} times, the limit is {HOPS_MAX}")
        return self.span.context

    def done(self) -> None:
        """All of the answer is there: a peer that has it may cancel at once. Any number of times."""
        self.is_done = True
        self.span.end()


@contextmanager
def executing_for_peer(tracer: Tracer, stream: IncomingStream) -> Iterator[PeerExecution]:
    """Raises StreamRefused, which tells the peer, in place of what a generation raises."""
    execution = PeerExecution(tracer, stream.peer_node_id)
    try:
        yield execution
        execution.done()
    except GenerationError as exc:
        end_with(execution.span, exc)
        logger.info("refused a peer's request", extra=execution.fields | {"error.type": type(exc).__name__})
        raise StreamRefused(*encode_error(exc)) from exc
    except BaseException as exc:
        end_with(execution.span, exc)
        raise
    finally:
        if execution.is_done:
            duration_ms = round((trio.current_time() - execution.started) * 1000, 3)
            logger.info("executed a peer's request", extra=execution.fields | {"duration_ms": duration_ms})
