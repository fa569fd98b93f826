"""The spans of one request, on a clock that the test moves: entry, route, forward, execute, queue, prefill, decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from mesh.errors import NoCapacity, PeerUnavailable
from nodes.embedding import Embeddings
from nodes.generation import GenerateEvent, GenerationFailed, Usage
from nodes.remote import PeerServer, RemoteGenerator
from nodes.remote_embedder import EmbeddingServer, RemoteEmbedder
from observability.trace_context import TraceContext
from tests.unit import test_embedding_dispatch
from tests.unit.fake_session import until
from tests.unit.memory_spans import CALLER, MemorySpans, id_of, parent_of, seconds, trace_of
from tests.unit.scripted_api import Api, ScriptedDispatch
from tests.unit.test_dispatch import HANG, LAST, TOKEN, Nodes, request
from tests.unit.test_local import Setup, read, serving
from tests.unit.test_peer_operations import PEER, peers
from tests.unit.test_remote_embedder import REQUEST, Local

UNSAMPLED = replace(CALLER, flags=0)
SECRET = "a very private question"


def attribute(span: ReadableSpan, name: str) -> Any:
    return (span.attributes or {}).get(name)


def context_of(span: ReadableSpan) -> TraceContext:
    return TraceContext(trace_of(span), id_of(span), 1)


async def test_a_failover_is_two_routes_and_two_forwards_with_a_link(autojump_clock: trio.testing.MockClock) -> None:
    spans = MemorySpans()
    nodes = Nodes(
        tracer=spans.tracer,
        b=[1.0, TOKEN, GenerateEvent("bc", (2, 3)), 2.0, PeerUnavailable("gone")],
        c=[1.0, LAST],
        a=[],
    )
    stream = await nodes.dispatch.open(request(trace=CALLER))
    async with stream:
        async for _ in stream:
            pass
    assert spans.names() == ["route", "forward", "route", "forward"]
    assert {parent_of(span) for span in spans.ended} == {CALLER.span_id}
    first, second = spans.named("forward")
    assert (seconds(first), seconds(second)) == ((0.0, 3.0), (3.0, 4.0))
    assert (first.status.description, second.status.status_code) == ("PeerUnavailable", StatusCode.UNSET)
    assert [attribute(span, "ai_cluster.peer") for span in (first, second)] == ["b", "c"]
    assert [attribute(span, "ai_cluster.attempt") for span in (first, second)] == [1, 2]
    assert [attribute(span, "ai_cluster.resumed_tokens") for span in (first, second)] == [0, 3]
    assert [link.context.span_id for link in second.links] == [first.get_span_context().span_id]
    assert attribute(second, "gen_ai.usage.input_tokens") == 3
    assert attribute(second, "gen_ai.response.finish_reasons") == ("stop",)
    route = spans.named("route")[1]
    assert attribute(route, "ai_cluster.route.node") == "c"
    # Each node is opened under the span that leads to it.
    assert [opened.trace for _, opened in nodes.opened] == [context_of(first), context_of(second)]


async def test_a_node_that_does_not_take_a_request_has_a_forward_too() -> None:
    spans = MemorySpans()
    nodes = Nodes(tracer=spans.tracer, b=NoCapacity("full", 1.0), c=[TOKEN, LAST], a=[])
    async with await nodes.dispatch.open(request(trace=CALLER)) as stream:
        async for _ in stream:
            pass
    first, second = spans.named("forward")
    assert attribute(first, "error.type") == "NoCapacity"
    assert attribute(second, "ai_cluster.attempt") == 2
    assert [link.context.span_id for link in second.links] == [first.get_span_context().span_id]


async def test_waiting_for_a_node_that_goes_on_is_one_route(autojump_clock: trio.testing.MockClock) -> None:
    spans = MemorySpans()
    nodes = Nodes(tracer=spans.tracer, b=[TOKEN, GenerationFailed("broke")])
    stream = await nodes.dispatch.open(request(trace=CALLER))
    await stream.receive()
    nodes.scripts["b"] = [LAST]
    await stream.receive()
    await stream.aclose()
    routes = spans.named("route")
    assert len(routes) == 2, "however often nobody was found"
    start, end = seconds(routes[1])
    assert end - start == pytest.approx(2.0, abs=0.2)  # the node is left out for so long


async def test_a_request_that_nobody_can_take_is_a_route_with_an_error() -> None:
    spans = MemorySpans()
    nodes = Nodes(tracer=spans.tracer, b=[])
    with pytest.raises(Exception, match="no node has a model"):
        await nodes.dispatch.open(replace(request(trace=CALLER), model="other"))
    assert attribute(spans.one("route"), "error.type") == "ModelUnknown"
    assert attribute(spans.one("route"), "ai_cluster.route.candidates") == 0


async def test_a_stream_whose_reader_leaves_is_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    spans = MemorySpans()
    nodes = Nodes(tracer=spans.tracer, b=[TOKEN, HANG])
    stream = await nodes.dispatch.open(request(trace=CALLER))
    await stream.receive()
    await stream.aclose()
    forward = spans.one("forward")
    assert attribute(forward, "ai_cluster.outcome") == "cancelled"
    assert forward.status.status_code is StatusCode.UNSET


async def test_after_this_node_itself_a_forward_has_no_link() -> None:
    spans = MemorySpans()
    nodes = Nodes(tracer=spans.tracer, a=[TOKEN, GenerationFailed("broke")], b=[LAST])
    async with await nodes.dispatch.open(request(trace=CALLER)) as stream:
        async for _ in stream:
            pass
    forward = spans.one("forward")
    assert (attribute(forward, "ai_cluster.attempt"), len(forward.links)) == (2, 0)
    assert nodes.opened[0][1].trace == CALLER, "what this node executes is below the request itself"


async def test_a_forward_that_is_cancelled_while_it_opens_is_no_error() -> None:
    spans = MemorySpans()
    nodes = Nodes(tracer=spans.tracer, b=[])
    with trio.CancelScope() as scope:
        scope.cancel()
        await nodes.dispatch.open(request(trace=CALLER))
    forward = spans.one("forward")
    assert attribute(forward, "ai_cluster.outcome") == "cancelled"
    assert forward.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("trace", [None, UNSAMPLED])
async def test_what_is_not_sampled_has_no_spans_and_keeps_its_context(trace: TraceContext | None) -> None:
    spans = MemorySpans()
    nodes = Nodes(tracer=spans.tracer, b=[TOKEN, LAST], a=[])
    async with await nodes.dispatch.open(request(trace=trace)) as stream:
        async for _ in stream:
            pass
    assert spans.ended == []
    assert [opened.trace for _, opened in nodes.opened] == [trace]


async def test_an_executed_generation_is_queue_prefill_and_decode_that_join() -> None:
    spans = MemorySpans()
    async with serving(Setup(tracer=spans.tracer)) as setup:
        await read(await setup.open(SECRET, trace=CALLER))
    assert setup.witness.labels == {"request_id": "r", "trace_id": CALLER.trace_id}
    queue, prefill, decode = (spans.one(name) for name in ("queue", "prefill", "decode"))
    assert {parent_of(span) for span in spans.ended} == {CALLER.span_id}
    assert queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time
    assert attribute(decode, "gen_ai.usage.output_tokens") == 8
    assert attribute(decode, "gen_ai.response.finish_reasons") == ("length",)
    assert attribute(prefill, "gen_ai.usage.input_tokens") > 0
    told = [str(value) for span in spans.ended for value in (span.attributes or {}).values()]
    assert not any("private" in value for value in told)


async def test_a_generation_that_waits_until_its_deadline_is_a_queue_with_an_error() -> None:
    spans = MemorySpans()
    async with serving(Setup(tracer=spans.tracer)) as setup:
        setup.session.hold()
        first = await setup.open()
        second = await setup.open(trace=CALLER, deadline_s=5.0)
        setup.clock.now += 6.0
        setup.session.release()
        with pytest.raises(Exception, match="deadline"):
            await second.receive()
        await second.aclose()
        await first.aclose()
    assert spans.names() == ["queue"]
    queue = spans.one("queue")
    assert attribute(queue, "error.type") == "DeadlinePassed"
    start, end = seconds(queue)
    assert end - start == pytest.approx(6.0), "by the engine's clock"


async def test_a_full_queue_is_a_queue_with_an_error() -> None:
    spans = MemorySpans()
    async with serving(Setup(queue_limit=0, tracer=spans.tracer)) as setup:
        setup.session.hold()
        first = await setup.open()
        await until(setup.engine, active=1, queued=0)
        with pytest.raises(NoCapacity):
            await setup.open(trace=CALLER)
        setup.session.release()
        await first.aclose()
    assert attribute(spans.one("queue"), "error.type") == "QueueFull"


async def test_a_peer_executes_below_the_span_that_forwarded(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nodes")
    spans = MemorySpans()
    nodes = Nodes(a=[TOKEN, GenerateEvent("", (), "stop", Usage(3, 1))])
    server = PeerServer(nodes.dispatch._attempts.generator(nodes.view.members["a"]), {}, spans.tracer)
    caller = replace(CALLER, state="vendor=abc")
    async with peers(server.serve) as forwarder:
        async with await RemoteGenerator(forwarder, PEER).open(request(trace=caller, hops=1)) as stream:
            async for _ in stream:
                pass
        await trio.sleep(1)
    execute = spans.one("execute")
    assert (parent_of(execute), trace_of(execute)) == (CALLER.span_id, CALLER.trace_id)
    assert execute.get_span_context().trace_state.to_header() == "vendor=abc"
    assert nodes.opened[0][1].trace == replace(context_of(execute), state="vendor=abc")
    lines = [record for record in caplog.records if record.message == "executed a peer's request"]
    assert [line.__dict__["trace_id"] for line in lines] == [CALLER.trace_id]


@pytest.mark.parametrize(
    ("events", "is_executed"), [([TOKEN, LAST], True), ([TOKEN], False)], ids=["all of it", "a part of it"]
)
async def test_what_a_peer_cancels_after_the_last_event_was_executed(
    events: list[GenerateEvent],
    is_executed: bool,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "nodes")
    spans = MemorySpans()
    nodes = Nodes(a=[*events, HANG])  # the stream's end does not come before the peer cancels
    server = PeerServer(nodes.dispatch._attempts.generator(nodes.view.members["a"]), {}, spans.tracer)
    async with peers(server.serve) as forwarder:
        stream = await RemoteGenerator(forwarder, PEER).open(request(trace=CALLER, hops=1))
        while (await stream.receive()).finish_reason is None and is_executed:
            pass
        await stream.aclose()
        await trio.sleep(1)
    assert attribute(spans.one("execute"), "ai_cluster.outcome") == (None if is_executed else "cancelled")
    assert ("executed a peer's request" in caplog.messages) is is_executed


@pytest.mark.parametrize("trace", [UNSAMPLED, CALLER])
async def test_a_refused_request_of_a_peer_has_its_trace_in_the_log(
    trace: TraceContext, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nodes")
    spans = MemorySpans()
    nodes = Nodes(a=GenerationFailed("broken"))
    server = PeerServer(nodes.dispatch._attempts.generator(nodes.view.members["a"]), {}, spans.tracer)
    async with peers(server.serve) as forwarder:
        stream = await RemoteGenerator(forwarder, PEER).open(request(trace=trace, hops=1))
        with pytest.raises(GenerationFailed):
            await stream.receive()
        await stream.aclose()
    lines = [record for record in caplog.records if record.message == "refused a peer's request"]
    assert [line.__dict__["trace_id"] for line in lines] == [trace.trace_id]
    assert [attribute(span, "error.type") for span in spans.ended] == (["GenerationFailed"] if trace.is_sampled else [])


async def test_embeddings_are_routed_forwarded_and_executed_in_one_trace(
    autojump_clock: trio.testing.MockClock,
) -> None:
    spans = MemorySpans()
    nodes = test_embedding_dispatch.Nodes(tracer=spans.tracer, b=PeerUnavailable("gone"), c=None, a=None)
    await nodes.dispatch.embed(replace(test_embedding_dispatch.request(), trace=CALLER))
    assert spans.names() == ["route", "forward", "route", "forward"]
    assert [attribute(span, "error.type") for span in spans.named("forward")] == ["PeerUnavailable", None]
    assert [attribute(span, "ai_cluster.attempt") for span in spans.named("forward")] == [1, 2]
    forward = spans.named("forward")[1]
    asked = nodes.asked[1][1]
    assert asked.trace == context_of(forward)

    local = Local(Embeddings(np.ones((2, 4), np.float32), 5, "f1"))
    async with peers(EmbeddingServer(local, spans.tracer).serve) as forwarder:
        await RemoteEmbedder(forwarder, PEER).embed(replace(REQUEST, trace=asked.trace))
        await trio.sleep(1)
    execute = spans.one("execute")
    assert parent_of(execute) == id_of(forward)
    assert local.asked[0].trace == context_of(execute)


HEADERS = {"traceparent": CALLER.traceparent, "x-request-id": "r-1"}


async def test_the_entrys_span_is_the_http_request() -> None:
    spans = MemorySpans()
    api = Api(ScriptedDispatch(TOKEN, LAST), tracer=spans.tracer)
    body = {"model": "demo", "messages": [{"role": "user", "content": SECRET}]}
    answer = await api.client.post("/v1/chat/completions", json=body, headers=HEADERS)
    assert answer.status_code == 200
    root = spans.one("POST /v1/chat/completions")
    assert (trace_of(root), parent_of(root)) == (CALLER.trace_id, CALLER.span_id)
    assert dict(root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.request.model": "demo",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 1,
        "gen_ai.response.finish_reasons": ("stop",),
        "ai_cluster.request_id": "r-1",
        "ai_cluster.executed_by": "b",
        "ai_cluster.failovers": 0,
        "ai_cluster.outcome": "success",
        "ai_cluster.client_left": False,
    }
    assert api.metrics.exemplars[-1] == {"request_id": "r-1", "trace_id": CALLER.trace_id}


async def test_a_trace_that_began_here_is_on_the_log_line_and_the_exemplar(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "nodes")
    spans = MemorySpans()
    api = Api(ScriptedDispatch(TOKEN, LAST), tracer=spans.tracer)
    await api.chat()
    trace_id = trace_of(spans.one("POST /v1/chat/completions"))
    assert [r.__dict__.get("trace_id") for r in caplog.records if r.message == "request"] == [trace_id]
    assert api.metrics.exemplars[-1]["trace_id"] == trace_id


async def test_only_what_models_answer_is_traced() -> None:
    spans = MemorySpans()
    api = Api(ScriptedDispatch(TOKEN, LAST), tracer=spans.tracer)
    for path in ("/health", "/v1/models", "/metrics", "/nowhere"):
        await api.client.get(path, headers=HEADERS)
    assert spans.ended == []


@pytest.mark.parametrize(
    ("failure", "status", "error"),
    [
        pytest.param(NoCapacity("full", 1.0), 503, "NoCapacity", id="no capacity"),
        pytest.param(GenerationFailed("broken"), 502, "GenerationFailed", id="our fault"),
    ],
)
async def test_a_request_that_fails_by_our_fault_has_the_error(failure: Exception, status: int, error: str) -> None:
    spans = MemorySpans()
    api = Api(ScriptedDispatch(failure), tracer=spans.tracer)
    answer = await api.chat()
    assert answer.status_code == status
    root = spans.one("POST /v1/chat/completions")
    assert attribute(root, "http.response.status_code") == status
    assert (root.status.status_code, attribute(root, "error.type")) == (StatusCode.ERROR, error)


async def test_a_clients_own_fault_is_no_error_of_the_span() -> None:
    spans = MemorySpans()
    api = Api(ScriptedDispatch(TOKEN, LAST), tracer=spans.tracer)
    answer = await api.chat(temperature="hot")
    assert answer.status_code == 400
    root = spans.one("POST /v1/chat/completions")
    assert root.status.status_code is StatusCode.UNSET
    assert attribute(root, "ai_cluster.outcome") == "rejected"


async def test_a_stream_that_breaks_is_an_error_whatever_its_status() -> None:
    spans = MemorySpans()
    api = Api(ScriptedDispatch(TOKEN, GenerationFailed(SECRET)), tracer=spans.tracer)
    answer = await api.chat(stream=True)
    assert answer.status_code == 200
    root = spans.one("POST /v1/chat/completions")
    assert attribute(root, "http.response.status_code") == 200
    assert attribute(root, "error.type") == root.status.description == "GenerationFailed"
    assert attribute(root, "ai_cluster.outcome") == "error"
    assert not any("private" in str(value) for value in (root.attributes or {}).values()), "the type, not the message"
