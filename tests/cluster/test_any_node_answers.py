"""The official OpenAI client against each node of a calm mesh."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import re
import socket
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.mesh import Mesh, NodeProcess, wait_for

JSON = {"content-type": "application/json"}
QUESTION = [{"role": "user", "content": "How do I add a node?"}]


def client(node: NodeProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{node.url}/v1", api_key="any", max_retries=0, timeout=60)


def test_every_node_gives_the_same_right_answer_streamed_and_plain(calm_mesh: Mesh) -> None:
    answers = set()
    counts = set()
    for node in calm_mesh.nodes:
        plain = client(node).chat.completions.create(model="demo", messages=QUESTION, temperature=0)
        chunks = list(
            client(node).chat.completions.create(
                model="demo", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
            )
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        answers |= {plain.choices[0].message.content, streamed}
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason == "stop"
        assert chunks[-1].choices == []
        for usage in (plain.usage, chunks[-1].usage):
            assert usage is not None
            assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
            counts.add((usage.prompt_tokens, usage.completion_tokens))
    assert len(answers) == len(counts) == 1
    assert "ai-cluster serve --join" in str(answers.pop())
    prompt_tokens, completion_tokens = counts.pop()
    assert prompt_tokens > 0
    assert completion_tokens > 0


def test_a_seed_gives_the_same_sampled_text_on_every_node(calm_mesh: Mesh) -> None:
    texts = set()
    for node in calm_mesh.nodes:
        answer = client(node).chat.completions.create(model="demo", messages=QUESTION, temperature=1.5, seed=11)
        texts.add(answer.choices[0].message.content)
    assert len(texts) == 1


def test_max_tokens_and_stop_end_an_answer(calm_mesh: Mesh) -> None:
    chat = client(calm_mesh.nodes[0]).chat.completions
    short = chat.create(model="demo", messages=QUESTION, temperature=0, max_tokens=3)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None
    assert short.usage.completion_tokens == 3
    stopped = chat.create(model="demo", messages=QUESTION, temperature=0, stop=["--join"])
    assert stopped.choices[0].finish_reason == "stop"
    assert str(stopped.choices[0].message.content).endswith("ai-cluster serve ")


def test_completions_say_who_executed_them(calm_mesh: Mesh) -> None:
    names = {node.name for node in calm_mesh.nodes}
    for stream in (False, True):
        status, headers, _ = post(calm_mesh.nodes[1], {"model": "demo", "messages": QUESTION, "stream": stream})
        assert status == 200
        assert headers["x-ai-cluster-node"] in names
        assert headers["x-request-id"].startswith("req_")


def test_a_clients_own_request_id_is_kept(calm_mesh: Mesh) -> None:
    node = calm_mesh.nodes[0]
    _, headers, _ = post(node, {"model": "demo", "messages": QUESTION}, {"x-request-id": "mine-1"})
    assert headers["x-request-id"] == "mine-1"


def test_a_burst_to_one_node_is_executed_by_all(calm_mesh: Mesh) -> None:
    before = [node.metric("ai_cluster_inference_requests_total", status="success") for node in calm_mesh.nodes]

    def ask(index: int) -> str:
        stream = client(calm_mesh.nodes[0]).chat.completions.create(
            model="demo",
            messages=QUESTION,
            temperature=0,
            seed=index,
            stream=True,
            max_tokens=200,
            extra_body={"ignore_eos": True},  # long enough that all run at once, however slowly clients start
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        texts = list(pool.map(ask, range(24)))
    assert len(set(texts)) == 1
    after = [node.metric("ai_cluster_inference_requests_total", status="success") for node in calm_mesh.nodes]
    executed = [int(b - a) for a, b in zip(before, after, strict=True)]
    assert sum(executed) == 24
    assert min(executed) >= 4


def test_models_are_listed_and_found(calm_mesh: Mesh) -> None:
    for node in calm_mesh.nodes:
        assert [model.id for model in client(node).models.list()] == ["demo"]
        assert client(node).models.retrieve("demo").object == "model"
        with pytest.raises(openai.NotFoundError):
            client(node).models.retrieve("absent")


def test_an_unknown_model_is_404_in_openais_shape(calm_mesh: Mesh) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client(calm_mesh.nodes[0]).chat.completions.create(model="absent", messages=QUESTION)
    assert raised.value.code == "model_not_found"
    assert "absent" in raised.value.message


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", b"", 404),
        ("GET", "/v1/chat/completions", b"", 405),
        ("DELETE", "/health", b"", 405),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/chat/completions", b"\xff\x00", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/chat/completions", b" " * (4 * 1024 * 1024 + 1), 413),
        (
            "POST",
            "/v1/chat/completions",
            json.dumps({"model": "demo", "messages": [{"role": "user", "content": "word " * 5000}]}).encode(),
            400,
        ),
    ],
    ids=["404", "405-get", "405-delete", "cut", "empty", "binary", "deep", "oversized", "too-long-for-the-context"],
)
def test_every_error_has_openais_shape(calm_mesh: Mesh, method: str, path: str, body: bytes, status: int) -> None:
    connection = http.client.HTTPConnection(calm_mesh.nodes[0].http, timeout=30)
    connection.request(method, path, body, JSON)
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.status == status
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"]
    connection.close()


def test_a_client_that_leaves_frees_its_slot_on_the_node_that_holds_it(mesh: Mesh) -> None:
    server, entry = mesh.add("--slots", "1"), mesh.add("--no-model")
    mesh.wait_until_agreed()
    body = json.dumps({"model": "demo", "messages": QUESTION, "stream": True, "ignore_eos": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    host, port = entry.http.split(":")
    clients = [socket.create_connection((host, int(port))) for _ in range(12)]
    for client_socket in clients:
        client_socket.sendall(head.encode() + body)
    wait_for(lambda: server.metric("ai_cluster_engine_queue_depth") >= 6, "requests run and wait at the server", 10)
    for client_socket in clients:
        client_socket.close()

    def is_free() -> bool:
        return (
            server.metric("ai_cluster_engine_slots", state="active")
            == 0
            == server.metric("ai_cluster_link_streams_open")
        )

    wait_for(is_free, "slot and streams are free again", 10)
    ended = {
        s: server.metric("ai_cluster_inference_requests_total", status=s) for s in ("success", "cancelled", "error")
    }
    assert ended["error"] == 0
    assert ended["cancelled"] >= 5, ended
    assert sum(ended.values()) == 12


def test_health_and_status_agree_on_every_node(calm_mesh: Mesh) -> None:
    for node in calm_mesh.nodes:
        for path in ("/health", "/health/live", "/health/ready"):
            status, answer = node.request(path)
            assert status == 200
            assert json.loads(answer)["status"] == "ready"
        report = node.status()
        assert report["nodes"] == {"healthy": 3, "degraded": 0, "offline": 0}
        assert report["nodes_expected"] == 3
        assert report["warnings"] == []
        assert [m["node_id"] for m in report["members"] if m["is_self"]] == [node.name]


def test_every_metric_of_the_monitoring_guide_is_exported(calm_mesh: Mesh) -> None:
    post(calm_mesh.nodes[0], {"model": "demo", "messages": QUESTION, "stream": True})
    expected = {
        "ai_cluster_http_requests_total": {"method", "path", "status"},
        "ai_cluster_http_request_duration_seconds_bucket": {"method", "path", "status", "le"},
        "ai_cluster_inference_requests_total": {"model", "status"},
        "ai_cluster_inference_duration_seconds_bucket": {"model", "node_id", "le"},
        "ai_cluster_tokens_generated_total": {"model", "type"},
        "ai_cluster_tokens_per_second": {"model", "node_id"},
        "ai_cluster_cluster_nodes_total": {"status"},
        "ai_cluster_cluster_active_requests": {"node_id"},
        "ai_cluster_model_load_time_seconds": {"model", "node_id"},
        "ai_cluster_model_memory_bytes": {"model", "node_id"},
        "ai_cluster_api_key_requests_total": {"key_id", "status"},
        "ai_cluster_api_key_rate_limit_hits_total": {"key_id"},
        "ai_cluster_streaming_requests_total": {"model", "status"},
        "ai_cluster_streaming_duration_seconds_bucket": {"model", "le"},
        "process_cpu_seconds_total": set(),
        "process_resident_memory_bytes": set(),
    }
    for node in calm_mesh.nodes:
        families = text_string_to_metric_families(node.request("/metrics")[1].decode())
        found = {sample.name: set(sample.labels) for family in families for sample in family.samples}
        assert {name: found.get(name) for name in expected} == expected


def test_logs_are_json_lines_and_hold_no_prompt(calm_mesh: Mesh) -> None:
    secret = "a prompt that no log may hold"
    headers = {"x-request-id": "logged-1"}
    for node in calm_mesh.nodes:
        post(node, {"model": "demo", "messages": [{"role": "user", "content": secret}]}, headers)
        logs = node.folder / "logs"
        lines: list[dict[str, object]] = []

        def is_logged(log: Path = logs / "combined.log", found: list[dict[str, object]] = lines) -> bool:
            # The executor logs the id too, and may be this very node; only the entry's line has the HTTP status.
            records = (json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n"))
            found[:] = [record for record in records if record.get("request_id") == "logged-1"]
            return any("http.response.status_code" in record for record in found)

        wait_for(is_logged, "the request is logged", 5)
        text = (logs / "combined.log").read_text()
        first = json.loads(text.splitlines()[0])
        assert {"@timestamp", "level", "message", "logger", "node_id"} <= set(first)
        request = next(record for record in lines if "http.response.status_code" in record)
        assert request["http.response.status_code"] == 200
        assert re.fullmatch(r"node-\d", str(request["executed_by"]))
        assert (request["outcome"], request["path"], request["failovers"]) == ("success", request["executed_by"], 0)
        assert request["hops"] == (request["executed_by"] != node.name)
        assert 0 <= float(str(request["queue_ms"])) <= float(str(request["time_to_first_token_ms"]))
        assert secret not in text
        assert (logs / "error.log").read_text() == ""


def post(
    node: NodeProcess, body: dict[str, object], headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(node.http, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON | (headers or {}))
    response = connection.getresponse()
    answer = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    connection.close()
    return answer
