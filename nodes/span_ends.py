"""What a span says of how its work ended: the status Error is for our faults alone.

A client's own fault, a planned move and work that nobody wants any more are told as `ai_cluster.outcome`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nodes.generation import GenerationMoved, RequestInvalid
from observability.tracing import Span

CANCELLED = "cancelled"


def end_with(span: Span, error: BaseException) -> None:
    """End it for what was raised, which is not told but by its type: a message may quote a prompt."""
    if not span.is_recording:
        return
    if (outcome := _outcome(error)) is None:
        span.end(type(error).__name__)
    else:
        span.set({"ai_cluster.outcome": outcome})
        span.end()


@contextmanager
def ending(span: Span) -> Iterator[None]:
    """Ends the span with the block."""
    try:
        yield
    except BaseException as exc:
        end_with(span, exc)
        raise
    span.end()


def _outcome(error: BaseException) -> str | None:
    """None where it was our fault."""
    match error:
        case RequestInvalid():
            return "rejected"
        case GenerationMoved():
            return "drain"
        case Exception():
            return None
    return CANCELLED
