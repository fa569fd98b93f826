"""The status Error of a span is for our faults; everything else is an outcome."""

from __future__ import annotations

import pytest
import trio
from opentelemetry.trace import StatusCode

from mesh.errors import NoCapacity, PeerUnavailable
from nodes.generation import DeadlineExceeded, GenerationFailed, GenerationMoved, RequestInvalid
from nodes.span_ends import end_with, ending
from tests.unit.memory_spans import MemorySpans


@pytest.mark.parametrize(
    "error",
    [GenerationFailed("x"), PeerUnavailable("x"), NoCapacity("x", 1.0), DeadlineExceeded("x"), ValueError("x")],
    ids=lambda error: type(error).__name__,
)
async def test_our_faults_have_the_status_error_and_their_type_alone(error: Exception) -> None:
    spans = MemorySpans()
    with pytest.raises(type(error)), ending(spans.tracer.request("r", None, {})):
        raise error
    (ended,) = spans.ended
    assert ended.status.status_code is StatusCode.ERROR
    assert ended.attributes == {"error.type": type(error).__name__}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(RequestInvalid("x"), "rejected"), (GenerationMoved("x"), "drain")],
    ids=["rejected", "drain"],
)
async def test_a_clients_fault_and_a_planned_move_are_outcomes(error: Exception, outcome: str) -> None:
    spans = MemorySpans()
    end_with(spans.tracer.request("r", None, {}), error)
    (ended,) = spans.ended
    assert ended.status.status_code is StatusCode.UNSET
    assert ended.attributes == {"ai_cluster.outcome": outcome}


async def test_what_nobody_wants_any_more_is_cancelled_and_no_error() -> None:
    spans = MemorySpans()
    with trio.CancelScope() as scope, ending(spans.tracer.request("r", None, {})):
        scope.cancel()
        await trio.lowlevel.checkpoint()
    (ended,) = spans.ended
    assert ended.status.status_code is StatusCode.UNSET
    assert ended.attributes == {"ai_cluster.outcome": "cancelled"}


async def test_what_has_ended_well_before_stays_so() -> None:
    spans = MemorySpans()
    span = spans.tracer.request("r", None, {})
    span.end()
    end_with(span, ValueError("x"))
    (ended,) = spans.ended
    assert ended.attributes == {}
