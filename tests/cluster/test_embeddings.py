"""Embeddings of a mesh by the official client: whichever node is asked, whichever has the model, whoever dies."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from nodes.model_tools.random_encoder import EncoderShape, write_random_encoder
from tests.cluster.mesh import Mesh, NodeProcess, wait_for

TEXTS = ["A node joins the mesh.", "x", "Streams of tokens flow from the engine to the client. " * 2]
MODEL = "encoder"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_encoder(tmp_path_factory.mktemp("models") / MODEL, EncoderShape(context=128))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Iterator[Mesh]:
    """node-1 has the language model, node-2 the embedding model."""
    mesh = Mesh(tmp_path_factory.mktemp("pair"))
    try:
        mesh.add()
        mesh.add("--model", str(encoder))
        mesh.wait_until_agreed()
        yield mesh
    finally:
        mesh.close()


def client(node: NodeProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{node.url}/v1", api_key="any", max_retries=0, timeout=60)


def vectors(node: NodeProcess, inputs: list[str], **options: object) -> np.ndarray:
    """Of the official client, which asks for base64 by itself."""
    with client(node) as api:
        answer = api.embeddings.create(model=MODEL, input=inputs, **options)  # type: ignore[arg-type]
    assert [item.index for item in answer.data] == list(range(len(inputs)))
    return np.array([item.embedding for item in answer.data])


def test_any_node_gives_the_same_embeddings_and_forwards_what_it_has_not(pair: Mesh) -> None:
    found = [vectors(node, TEXTS) for node in pair.nodes]
    assert found[0].shape == (3, 32)
    assert np.array_equal(found[0], found[1])
    assert np.allclose(np.linalg.norm(found[0], axis=1), 1, atol=1e-5)
    assert pair.nodes[0].metric("ai_cluster_forwards_total") >= 1
    assert pair.nodes[1].metric("ai_cluster_inference_requests_total", model=MODEL, status="success") >= 2
    assert pair.nodes[1].metric("ai_cluster_tokens_generated_total", model=MODEL, type="prompt") > 0
    assert pair.nodes[1].metric("ai_cluster_tokens_generated_total", model=MODEL, type="completion") == 0


def test_an_embedding_does_not_depend_on_what_comes_with_it(pair: Mesh) -> None:
    node = pair.nodes[0]
    together = vectors(node, TEXTS)
    alone = np.concatenate([vectors(node, [text]) for text in TEXTS])
    assert np.abs(together - alone).max() <= 1e-5
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(lambda index: vectors(pair.nodes[index % 2], TEXTS), range(24)))
    assert max(np.abs(each - together).max() for each in crowd) <= 1e-5


def test_floats_ids_and_fewer_dimensions(pair: Mesh) -> None:
    with client(pair.nodes[0]) as api:
        plain = api.embeddings.create(model=MODEL, input=TEXTS[0], encoding_format="float")
        short = api.embeddings.create(model=MODEL, input=TEXTS[0], dimensions=8)
        ids = api.embeddings.create(model=MODEL, input=[[5, 6, 7], [8]])
    whole = np.array(plain.data[0].embedding)
    assert np.array_equal(whole[None], vectors(pair.nodes[0], TEXTS[:1]))
    assert np.allclose(short.data[0].embedding, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-5)
    assert (len(ids.data), ids.usage.prompt_tokens, ids.usage.total_tokens) == (2, 4, 4)


def test_more_inputs_than_a_piece_come_back_in_order(pair: Mesh) -> None:
    texts = [f"text number {index}" for index in range(300)]
    many = vectors(pair.nodes[0], texts)
    for index in (0, 127, 128, 299):
        assert np.abs(many[index] - vectors(pair.nodes[1], [texts[index]])[0]).max() <= 1e-5


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}, "POST /v1/embeddings"),
        ("completions", {"model": MODEL, "prompt": "hi"}, "POST /v1/embeddings"),
        ("embeddings", {"model": "demo", "input": "hi"}, "POST /v1/chat/completions"),
        ("embeddings", {"model": MODEL, "input": "word " * 500}, "this model takes 128"),
        ("embeddings", {"model": MODEL, "input": "hi", "dimensions": 33}, "the vectors of this model have 32"),
        ("embeddings", {"model": MODEL, "input": [512]}, "token 512"),
    ],
)
def test_what_cannot_be_done_is_a_400_on_every_node(pair: Mesh, path: str, body: dict[str, object], named: str) -> None:
    for node in pair.nodes:
        connection = http.client.HTTPConnection(node.http, timeout=30)
        connection.request("POST", f"/v1/{path}", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        connection.close()
        assert response.status == 400
        assert named in error["message"]


def test_models_say_what_they_are_asked_for(pair: Mesh) -> None:
    for node in pair.nodes:
        models = json.loads(node.request("/v1/models")[1])["data"]
        assert {model["id"]: model["kind"] for model in models} == {"demo": "generation", MODEL: "embedding"}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "stands still"])
def test_a_request_goes_on_at_another_node_when_one(mesh: Mesh, encoder: Path, end: signal.Signals) -> None:
    entry = mesh.add("--no-model")
    servers = [mesh.add("--model", str(encoder)) for _ in range(2)]
    mesh.wait_until_agreed()
    before = vectors(entry, TEXTS)
    stop = threading.Event()
    answers: list[np.ndarray] = []

    def ask() -> None:
        while not stop.is_set():
            answers.append(vectors(entry, TEXTS))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        wait_for(lambda: len(answers) >= 20, "requests are answered", 30)
        os.kill(servers[0].pid, end)
        count = len(answers)
        wait_for(lambda: len(answers) >= count + 40 or any(a.done() for a in asking), "they still are", 30)
        stop.set()
        for each in asking:
            each.result()  # raises what a client saw
    assert max(np.abs(answer - before).max() for answer in answers) <= 1e-5


def test_a_client_that_leaves_frees_the_engine_of_the_node_that_computes(mesh: Mesh, tmp_path: Path) -> None:
    shape = EncoderShape(hidden=256, layers=4, heads=4, ffn=1024, context=128)  # half a minute for what is asked here
    server = mesh.add("--model", str(write_random_encoder(tmp_path / MODEL, shape)))
    entry = mesh.add("--no-model")
    mesh.wait_until_agreed()
    body = json.dumps({"model": MODEL, "input": [[7] * 128] * 2048}).encode()
    connection = http.client.HTTPConnection(entry.http, timeout=60)
    connection.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
    wait_for(lambda: server.metric("ai_cluster_engine_slots", state="active") >= 1, "it is computed", 30)
    connection.close()

    def is_free() -> bool:
        return (
            server.metric("ai_cluster_inference_requests_total", status="cancelled") >= 1
            and server.metric("ai_cluster_engine_slots", state="active") == 0
            and server.metric("ai_cluster_engine_queue_depth") == 0
        )

    wait_for(is_free, "nothing is computed for it any more", 20)
    assert server.metric("ai_cluster_inference_started_total") < 16
