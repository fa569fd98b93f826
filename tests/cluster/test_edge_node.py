"""Nodes without a model, as entries beside clients: what they answer, and where they send what."""

from __future__ import annotations

import http.client
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from mesh.prefix_digests import NAME_BYTES, named_indices
from nodes.engine.prefix_digest import text_blocks
from nodes.model_tools.llama_onnx import LlamaShape
from nodes.model_tools.random_llama import SIZES, write_random_llama
from tests.cluster.mesh import Mesh, NodeProcess, wait_for

PAGE = Path(__file__).parents[2] / "docs" / "failover.md"
JSON = {"content-type": "application/json"}
CONVERSATIONS = 6  # of two nodes: without knowing the holders, all second turns reach them once in 64 runs
# Characters before the question: half a dozen blocks, whose prefill takes longer than what counts as a near tie.
FILLER = 1_600
# The built-in model's template keeps the last message alone; this one reads whole conversations.
SHAPE = LlamaShape(hidden=256, layers=6, heads=4, kv_heads=2, head_dim=64, ffn=704, vocab=512, context=2048, tied=False)
DIGEST_TIMEOUT_S = 15.0  # one each 4 s, and the way here


def chat(entry: NodeProcess, messages: list[dict[str, str]], **fields: object) -> tuple[str, dict[str, object]]:
    """Who executed it, and the answer."""
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 16}
    connection = http.client.HTTPConnection(entry.http, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body | fields), JSON)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    assert response.status == 200, answer
    return response.headers["x-ai-cluster-node"], answer


def text_of(answer: dict[str, object]) -> str:
    choices = answer["choices"]
    assert isinstance(choices, list)
    return str(choices[0]["message"]["content"])


def cached_tokens(answer: dict[str, object]) -> int:
    usage = answer["usage"]
    assert isinstance(usage, dict)
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def digest_bytes(observer: NodeProcess, name: str) -> int:
    return next(int(m["prefix_digest_bytes"]) for m in observer.status()["members"] if m["node_id"] == name)


def test_an_entry_sends_a_conversation_it_never_saw_to_the_node_that_has_it_cached(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "chat", SHAPE)
    model = write_random_llama(mesh.folder / "model", "chat")
    servers = [mesh.add("--model", f"{model}=demo", "--slots", "8") for _ in range(2)]
    first, second = mesh.add("--no-model", name="edge-1"), mesh.add("--no-model", name="edge-2")
    mesh.wait_until_agreed()
    holders = []
    conversations = []
    for number in range(CONVERSATIONS):
        opening = f"Conversation {number}. " + f"The word of the day is number {number * 7919}. " * (FILLER // 38)
        messages = [{"role": "user", "content": opening + "What is a node?"}]
        holder, answer = chat(first, messages)
        holders.append(holder)
        messages.append({"role": "assistant", "content": text_of(answer)})
        conversations.append([*messages, {"role": "user", "content": "And how do I add one?"}])
    names = {server.name: 0 for server in servers}
    for holder, (question, *_) in zip(holders, conversations, strict=True):
        names[holder] += len(named_indices(len(text_blocks([question]))))
    wait_for(
        lambda: all(digest_bytes(second, name) >= NAME_BYTES * count for name, count in names.items()),
        "the second entry knows all that is cached",
        DIGEST_TIMEOUT_S,
    )
    hits = {server.name: server.metric("ai_cluster_prefix_cache_hits_total") for server in servers}
    answers = [chat(second, messages) for messages in conversations]
    assert [holder for holder, _ in answers] == holders
    assert all(cached_tokens(answer) > 64 for _, answer in answers)
    grown = {s.name: s.metric("ai_cluster_prefix_cache_hits_total") - hits[s.name] for s in servers}
    assert grown == {s.name: holders.count(s.name) for s in servers}


def test_an_edge_node_is_ready_and_answers_with_what_others_serve_and_is_never_chosen(mesh: Mesh) -> None:
    server, edge = mesh.add(), mesh.add("--no-model", name="edge")
    mesh.wait_until_agreed()
    for path in ("/health", "/health/live", "/health/ready"):
        status, body = edge.request(path)
        assert (status, json.loads(body)["status"], json.loads(body)["models"]) == (200, "ready", [])
    listed = json.loads(edge.request("/v1/models")[1])
    assert [model["id"] for model in listed["data"]] == ["demo"]
    assert edge.request("/v1/models/demo")[0] == 200
    question = [{"role": "user", "content": "How do I add a node?"}]
    for entry in (edge, server, edge, server):
        assert chat(entry, question)[0] == server.name
    for observer in (edge, server):
        row = next(member for member in observer.status()["members"] if member["node_id"] == edge.name)
        assert (row["status"], row["readiness"], row["models"]) == ("healthy", "ready", [])
        assert row["active_requests"] == row["prefix_digest_bytes"] == 0
        assert observer.metric("ai_cluster_cluster_nodes_total", status="healthy") == 2
        assert observer.metric("ai_cluster_cluster_active_requests", node_id=edge.name) == 0
    assert edge.metric("ai_cluster_forwards_total") == 2
    assert edge.metric("ai_cluster_inference_started_total") == 0
    assert edge.metric("ai_cluster_api_key_requests_total", status="success") == 2
    assert edge.metric("ai_cluster_engine_slots") == 0
    assert edge.metric("ai_cluster_collector_errors_total") == 0


def test_the_client_of_the_failover_page_goes_from_a_dead_entry_to_a_living_one(mesh: Mesh) -> None:
    server = mesh.add()
    dead = f"http://127.0.0.1:{unused_port()}"
    names: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code, names)  # noqa: S102  the page's own code, as a reader pastes it
    names["ENTRIES"] = [dead, server.url]
    question = [{"role": "user", "content": "How do I add a node?"}]
    assert names["ask"](question) == text_of(chat(server, question, max_tokens=200)[1])


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_an_edge_node_alone_is_ready_and_says_that_nobody_has_the_model(mesh: Mesh) -> None:
    server, edge = mesh.add(), mesh.add("--no-model", name="edge")
    mesh.wait_until_agreed()
    server.stop()
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Hello"}]})
    connection = http.client.HTTPConnection(edge.http, timeout=30)
    connection.request("POST", "/v1/chat/completions", body, JSON)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    assert (response.status, answer["error"]["code"]) == (503, "no_capacity"), answer
    assert edge.is_ready()
