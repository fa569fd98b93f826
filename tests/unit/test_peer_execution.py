"""A peer's request while it is executed: its span, its line in the log, and what the peer is told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import pytest
from opentelemetry.trace import StatusCode

from mesh.forwarder import IncomingStream, StreamRefused
from nodes.generation import GenerationFailed, RequestInvalid
from nodes.peer_execution import HOPS_MAX, executing_for_peer
from tests.unit.memory_spans import CALLER, MemorySpans, parent_of


@dataclass
class Asked:
    peer_node_id: str = "entry"


STREAM = cast(IncomingStream, Asked())


def execute(spans: MemorySpans, error: BaseException | None = None, *, hops: int = 1, is_done: bool = False) -> None:
    """One request that ends with the error. is_done: its answer was complete before."""
    with executing_for_peer(spans.tracer, STREAM) as execution:
        execution.begin(CALLER, request_id="r-1", model="demo", hops=hops)
        if is_done:
            execution.done()
        if error is not None:
            raise error


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


async def test_an_executed_request_has_a_span_and_a_line(lines: Callable[[], list[str]]) -> None:
    spans = MemorySpans()
    execute(spans)
    span = spans.one("execute")
    assert (parent_of(span), span.status.status_code) == (CALLER.span_id, StatusCode.UNSET)
    assert lines() == ["executed a peer's request"]


async def test_a_fault_of_ours_is_an_error_of_the_span_and_goes_on(lines: Callable[[], list[str]]) -> None:
    spans = MemorySpans()
    with pytest.raises(ValueError, match="a bug"):
        execute(spans, ValueError("a bug"))
    assert spans.one("execute").status.description == "ValueError"
    assert lines() == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(GenerationFailed("the engine broke"), StatusCode.ERROR), (RequestInvalid("too long"), StatusCode.UNSET)],
    ids=["ours", "the client's"],
)
async def test_what_a_generation_raises_is_told_to_the_peer(
    error: Exception, status: StatusCode, lines: Callable[[], list[str]]
) -> None:
    spans = MemorySpans()
    with pytest.raises(StreamRefused):
        execute(spans, error)
    assert spans.one("execute").status.status_code is status
    assert lines() == ["refused a peer's request"]


async def test_a_request_that_was_forwarded_too_often_is_refused() -> None:
    with pytest.raises(StreamRefused, match="has been forwarded"):
        execute(MemorySpans(), hops=HOPS_MAX + 1)


async def test_an_answer_that_was_complete_when_the_peer_left_was_executed(lines: Callable[[], list[str]]) -> None:
    spans = MemorySpans()
    with pytest.raises(KeyboardInterrupt):
        execute(spans, KeyboardInterrupt(), is_done=True)
    assert "ai_cluster.outcome" not in (spans.one("execute").attributes or {})
    assert lines() == ["executed a peer's request"]
