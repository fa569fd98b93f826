"""The phases of a generation on a local engine as spans of its trace: queue, prefill, decode, by the engine's clock.

Made only for what is sampled, so that any other generation pays nothing for it.
"""

from __future__ import annotations

import trio

from nodes.engine.sequence import EngineEvent
from nodes.engine.stream import EngineStream
from nodes.generation import GenerateRequest
from observability.trace_context import TraceContext
from observability.tracing import Tracer, Value


class GenerationSpans:
    """Tell it of the first event, then once of the end. engine_now: what the engine's clock says at this moment."""

    def __init__(self, tracer: Tracer, request: GenerateRequest, stream: EngineStream, engine_now: float) -> None:
        self._tracer = tracer
        self._trace = request.trace
        self._model = request.model
        self._resumed_tokens = len(request.generated_ids)
        self._stream = stream
        # Both clocks only count; one difference converts all times of this generation, so its phases join exactly.
        self._offset_s = trio.current_time() - engine_now
        self._has_prefilled = False

    def first_event(self, event: EngineEvent) -> None:
        """Nothing was computed for an answer that was complete when it came here."""
        stream = self._stream
        if stream.first_event_at is None or stream.queued_s is None:
            return
        self._has_prefilled = True
        placed_at = stream.submitted_at + stream.queued_s
        self._span("queue", stream.submitted_at, placed_at)
        attributes: dict[str, Value] = {
            "gen_ai.usage.input_tokens": event.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": event.cached_tokens,
            "ai_cluster.resumed_tokens": self._resumed_tokens,
        }
        self._span("prefill", placed_at, stream.first_event_at, attributes)

    def end(self, completion_tokens: int, finish_reason: str | None, error: str) -> None:
        """completion_tokens: made here. error: its type; empty where it ended well, or was cancelled, which is where it
        has no finish_reason either."""
        stream = self._stream
        ended_at = trio.current_time() - self._offset_s if stream.ended_at is None else stream.ended_at
        attributes: dict[str, Value] = {"gen_ai.usage.output_tokens": completion_tokens}
        if finish_reason is not None:
            attributes["gen_ai.response.finish_reasons"] = (finish_reason,)
        elif not error:
            attributes["ai_cluster.outcome"] = "cancelled"
        if self._has_prefilled:
            assert stream.first_event_at is not None
            self._span("decode", stream.first_event_at, ended_at, attributes, error)
        elif finish_reason is None:
            placed_at = None if stream.queued_s is None else stream.submitted_at + stream.queued_s
            if placed_at is None:
                self._span("queue", stream.submitted_at, ended_at, attributes, error)
            else:
                self._span("queue", stream.submitted_at, placed_at)
                self._span("prefill", placed_at, ended_at, attributes, error)

    def _span(
        self, name: str, start: float, end: float, attributes: dict[str, Value] | None = None, error: str = ""
    ) -> None:
        found = {"gen_ai.request.model": self._model, **(attributes or {})}
        span = self._tracer.span(name, self._trace, found, start=start + self._offset_s)
        span.end(error, at=end + self._offset_s)


def trace_refusal(tracer: Tracer, trace: TraceContext | None, model: str, error: str) -> None:
    """The engine did not take the request into its queue."""
    if trace is not None and trace.is_sampled:
        tracer.span("queue", trace, {"gen_ai.request.model": model}).end(error)
