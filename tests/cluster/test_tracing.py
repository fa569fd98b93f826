"""One request's trace over the nodes, as a collector gets it: whole, across a failover; and a collector that fails."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.mesh import Mesh, NodeProcess, wait_for
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan, otlp_receiver

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
QUESTION = [{"role": "user", "content": "What happens to my answer when its node dies?"}]
EXPORT_TIMEOUT_S = 20.0
UNSEEN = "A very private question."


@pytest.fixture
def collector() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as receiver:
        yield receiver


def traced_mesh(mesh: Mesh, endpoint: str, *options: str) -> NodeProcess:
    """An entry without a model and two nodes that serve; the entry."""
    entry = mesh.add("--no-model", "--tracing-endpoint", endpoint, *options, name="entry")
    for _ in range(2):
        mesh.add("--tracing-endpoint", endpoint, *options)
    mesh.wait_until_agreed()
    return entry


class Stream:
    """One streamed answer, of which some text has come."""

    def __init__(self, node: NodeProcess, trace_id: str = TRACE, flags: str = "01", **fields: Any) -> None:
        body = {"model": "demo", "messages": QUESTION, "temperature": 0, "stream": True} | fields
        headers = {"content-type": "application/json", "tracestate": "vendor=abc"}
        headers["traceparent"] = f"00-{trace_id}-{CALLER}-{flags}"
        self._connection = http.client.HTTPConnection(node.http, timeout=60)
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        self._response = self._connection.getresponse()
        assert self._response.status == 200, self._response.read()
        self.node_id = self._response.headers["x-ai-cluster-node"]
        self.request_id = self._response.headers["x-request-id"]

    def finish(self) -> str:
        """All that came."""
        text = self._response.read().decode()
        self._connection.close()
        assert text.endswith("data: [DONE]\n\n"), text[-300:]
        return text


def wait_for_spans(collector: OtlpReceiver, trace_id: str, *names: str) -> list[ReceivedSpan]:
    """The spans of the trace, once there is one of each name."""
    wait_for(
        lambda: {span.name for span in collector.of_trace(trace_id)} >= set(names),
        f"spans {names} of {trace_id}",
        EXPORT_TIMEOUT_S,
    )
    return collector.of_trace(trace_id)


def log_lines(node: NodeProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (node.folder / "logs" / "combined.log").read_text().splitlines()]


def test_a_forwarded_request_is_one_trace_over_both_nodes(mesh: Mesh, collector: OtlpReceiver) -> None:
    entry = traced_mesh(mesh, collector.endpoint, "--tracing-service-name", "chat-mesh")
    stream = Stream(entry, max_tokens=16, messages=[{"role": "user", "content": UNSEEN}])
    stream.finish()
    spans = wait_for_spans(collector, TRACE, "POST /v1/chat/completions", "execute", "decode")
    by_name = {span.name: span for span in spans}
    assert sorted(span.name for span in spans) == sorted(by_name), "each once"
    root, route, forward = by_name["POST /v1/chat/completions"], by_name["route"], by_name["forward"]
    execute, queue, prefill, decode = (by_name[name] for name in ("execute", "queue", "prefill", "decode"))

    parents = {span.name: span.parent_id for span in spans}
    assert parents["POST /v1/chat/completions"] == CALLER
    assert parents["route"] == parents["forward"] == root.span_id
    assert parents["execute"] == forward.span_id
    assert parents["queue"] == parents["prefill"] == parents["decode"] == execute.span_id

    assert {span.node for span in (root, route, forward)} == {"entry"}
    assert {span.node for span in (execute, queue, prefill, decode)} == {stream.node_id}
    assert {span.service for span in spans} == {"chat-mesh"}
    assert (root.kind, forward.kind, execute.kind, route.kind, decode.kind) == (
        "server",
        "client",
        "server",
        "internal",
        "internal",
    )
    assert not any(span.is_error for span in spans)
    assert {span.state for span in spans} == {"vendor=abc"}
    assert queue.end_ns == prefill.start_ns
    assert prefill.end_ns == decode.start_ns
    assert all(span.start_ns <= span.end_ns for span in spans)

    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["ai_cluster.request_id"] == stream.request_id
    assert forward.attributes["ai_cluster.peer"] == stream.node_id
    assert forward.attributes["ai_cluster.attempt"] == 1
    assert route.attributes["ai_cluster.route.node"] == stream.node_id
    assert route.attributes["ai_cluster.route.candidates"] == 2
    for span in (root, forward):
        assert span.attributes["gen_ai.request.model"] == "demo"
        assert span.attributes["gen_ai.usage.output_tokens"] == decode.attributes["gen_ai.usage.output_tokens"]
        assert span.attributes["gen_ai.usage.input_tokens"] == prefill.attributes["gen_ai.usage.input_tokens"] > 0
    told = [str(value) for span in spans for value in span.attributes.values()]
    assert not any("private" in value for value in told), "no span quotes a prompt"

    executor = next(node for node in mesh.nodes if node.name == stream.node_id)
    for node, message in ((entry, "request"), (executor, "executed a peer's request")):
        wait_for(
            lambda node=node, message=message: any(
                line["message"] == message and line.get("trace_id") == TRACE for line in log_lines(node)
            ),
            f"the line {message!r} has the trace",
            10,
        )
    assert entry.metric("ai_cluster_trace_spans_exported_total") >= 3
    assert collector.paths == {"/v1/traces"}


def test_an_answer_whose_node_is_killed_has_a_second_forward_in_the_same_trace(
    mesh: Mesh, collector: OtlpReceiver
) -> None:
    entry = traced_mesh(mesh, collector.endpoint)
    stream = Stream(entry, max_tokens=400, ignore_eos=True)
    victim = next(node for node in mesh.nodes if node.name == stream.node_id)
    victim.kill()
    text = stream.finish()
    assert "failover" in text, "the node died in the middle of its answer"
    spans = wait_for_spans(collector, TRACE, "POST /v1/chat/completions", "execute", "decode")
    root = next(span for span in spans if span.name == "POST /v1/chat/completions")
    first, second = (span for span in spans if span.name == "forward")
    assert first.parent_id == second.parent_id == root.span_id
    assert first.is_error
    assert first.attributes["error.type"] == "PeerUnavailable"
    assert first.attributes["ai_cluster.peer"] == victim.name
    assert not second.is_error
    assert second.attributes["ai_cluster.attempt"] == 2
    assert second.attributes["ai_cluster.resumed_tokens"] > 0
    assert second.links == (first.span_id,)
    assert second.start_ns >= first.end_ns
    assert not root.is_error
    assert root.attributes["ai_cluster.failovers"] == 1
    execute = next(span for span in spans if span.name == "execute" and span.node != victim.name)
    assert execute.parent_id == second.span_id
    decode = next(span for span in spans if span.name == "decode" and span.node != victim.name)
    assert decode.parent_id == execute.span_id
    assert decode.attributes["gen_ai.usage.output_tokens"] < root.attributes["gen_ai.usage.output_tokens"] == 400


def test_an_unsampled_request_leaves_its_trace_in_the_logs_alone(mesh: Mesh, collector: OtlpReceiver) -> None:
    entry = traced_mesh(mesh, collector.endpoint)
    unsampled, sampled = TRACE[::-1], TRACE
    stream = Stream(entry, unsampled, "00", max_tokens=4)
    stream.finish()
    Stream(entry, sampled, "01", max_tokens=4).finish()
    wait_for_spans(collector, sampled, "POST /v1/chat/completions", "execute")
    assert collector.of_trace(unsampled) == []
    executor = next(node for node in mesh.nodes if node.name == stream.node_id)
    for node in (entry, executor):
        assert any(line.get("trace_id") == unsampled for line in log_lines(node)), node.name


def test_requests_do_not_notice_a_collector_that_is_down_or_hangs(mesh: Mesh, collector: OtlpReceiver) -> None:
    with socket.socket() as nobody:  # bound and not listening: whoever connects is refused
        nobody.bind(("127.0.0.1", 0))
        down = mesh.add("--tracing-endpoint", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        collector.released.clear()
        hanging = mesh.add("--tracing-endpoint", collector.endpoint)
        mesh.wait_until_agreed()
        for node in (down, hanging):
            for _ in range(5):
                Stream(node, max_tokens=4).finish()
        wait_for(
            lambda: down.metric("ai_cluster_trace_spans_dropped_total", reason="export") > 0, "losses are counted", 20
        )
        wait_for(lambda: collector.posts > 0, "the other collector hangs", 20)
        assert [node.stop() for node in (down, hanging)] == [0, 0]
    told = [line for line in log_lines(down) if line["message"].startswith("spans could not be exported")]
    assert len(told) == 1, "once a minute at most"
    assert told[0]["reason"]
    lost = ("spans could not be exported", "spans were not exported before the end")  # before the stop, or at it
    assert any(line["message"].startswith(lost) for line in log_lines(hanging))


def test_the_headers_of_a_collector_are_sent_and_never_told(
    mesh: Mesh, collector: OtlpReceiver, tmp_path: Path
) -> None:
    secret = "Basic c2VjcmV0OnNlY3JldA=="
    file = tmp_path / "headers"
    file.write_text(f"Authorization: {secret}\n\nX-Scope-OrgID: one\n")
    file.chmod(0o600)
    node = mesh.add("--tracing-endpoint", collector.endpoint, "--tracing-headers-file", str(file))
    Stream(node, max_tokens=4).finish()
    wait_for_spans(collector, TRACE, "POST /v1/chat/completions", "decode")
    collector.status = 401
    Stream(node, max_tokens=4).finish()
    wait_for(lambda: node.metric("ai_cluster_trace_spans_dropped_total", reason="export") > 0, "a refusal counts", 20)
    assert node.stop() == 0
    assert all(headers["authorization"] == secret for headers in collector.headers)
    assert all(headers["x-scope-orgid"] == "one" for headers in collector.headers)
    written = "".join(path.read_text() for path in node.folder.rglob("*") if path.is_file() and path.suffix == ".log")
    assert "could not be exported" in written
    assert "c2VjcmV0" not in written + node.stderr()
