"""A node in this process, on ports of the kernel's choice, with a model that loads when the test says so."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import trio

from mesh.udp import GossipSocket
from nodes import node_models
from nodes.config import BUILTIN_MODEL, ConfigInvalid, load_config
from nodes.engine.engine import Engine, load_engine
from nodes.engine.model_loader import ModelFolderInvalid, read_model_folder
from nodes.keyring_file import load_keyring
from nodes.node import Node, StopRequest
from nodes.sockets import NodeSockets, bind_http, bind_mesh
from nodes.store import open_store

TOKEN = "the node's admin token"
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


@asynccontextmanager
async def running_node(tmp_path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, StopRequest]]:
    flags = {"http": "127.0.0.1:0", "mesh": "127.0.0.1:0", "threads": 1, "spinning": False, "drain_s": 5.0}
    config = load_config(None, {}, flags | {"data_dir": tmp_path, "name": "a"})
    folders = [("demo", read_model_folder(BUILTIN_MODEL))]
    with bind_http(config.http) as http, (mesh := bind_mesh(config.mesh))[0], mesh[1]:
        keyring = load_keyring(tmp_path, config)
        log_writer: Any = SimpleNamespace(lines_dropped=0)
        stop = StopRequest()
        async with open_store(tmp_path) as store, trio.open_nursery() as nursery:
            sockets = NodeSockets(http, *mesh)
            node = Node(config, keyring, folders, sockets, 1, lambda generation: None, log_writer, TOKEN, store, [])
            nursery.start_soon(node.run, stop)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http.getsockname()[1]}", timeout=30) as client:
                yield client, stop
                stop.asked.set()


async def wait_for_status(client: httpx.AsyncClient, path: str, status: int) -> None:
    with trio.fail_after(30):
        while (await client.get(path)).status_code != status:
            await trio.sleep(0.02)


async def test_a_node_whose_model_is_loading_is_alive_and_not_ready_and_gets_no_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_load = threading.Event()

    def load_when_told(*args: Any, **options: Any) -> Engine:
        assert may_load.wait(30)
        return load_engine(*args, **options)

    monkeypatch.setattr(node_models, "load_engine", load_when_told)
    async with running_node(tmp_path) as (client, _):
        try:
            await wait_for_status(client, "/health/live", 200)
            assert (await client.get("/health/ready")).status_code == 503
            status = (await client.get("/cluster/status")).json()
            assert status["members"][0]["readiness"] == "loading"
            assert status["nodes"]["degraded"] == 1
            refused = await client.post("/v1/chat/completions", json=CHAT)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
        finally:
            may_load.set()
        await wait_for_status(client, "/health/ready", 200)
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_a_model_that_fails_to_load_ends_the_node_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Engine:
        raise ModelFolderInvalid(tmp_path, "the graph is broken", "copy it again")

    monkeypatch.setattr(node_models, "load_engine", fail)
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigInvalid, match="the graph is broken"), flatten_subgroups=True):
        async with running_node(tmp_path):
            await trio.sleep(30)


async def test_peers_hear_of_the_end_before_the_engines_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    leave, run = GossipSocket.leave, Engine.run

    def noted_leave(gossip: GossipSocket) -> None:
        happened.append("leave")
        leave(gossip)

    async def noted_run(engine: Engine, **options: Any) -> None:
        try:
            await run(engine, **options)
        finally:
            happened.append("engine stopped")

    monkeypatch.setattr(GossipSocket, "leave", noted_leave)
    monkeypatch.setattr(Engine, "run", noted_run)
    with trio.fail_after(30):
        async with running_node(tmp_path) as (client, _):
            await wait_for_status(client, "/health/ready", 200)
    assert happened[:2] == ["leave", "engine stopped"]


async def test_a_second_signal_cuts_the_drain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with trio.fail_after(30), caplog.at_level(logging.WARNING, "nodes"):
        async with running_node(tmp_path) as (client, stop):
            await wait_for_status(client, "/health/ready", 200)
            endless = CHAT | {"stream": True, "ignore_eos": True, "max_tokens": 1000}
            async with client.stream("POST", "/v1/chat/completions", json=endless) as response:
                assert response.status_code == 200
                stop.asked.set()
                stop.hurried.set()
    assert "are cut" in caplog.text


async def test_a_drained_node_is_not_ready_also_when_its_model_is_loaded_meanwhile_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_load = threading.Event()

    def load_when_told(*args: Any, **options: Any) -> Engine:
        assert may_load.wait(30)
        return load_engine(*args, **options)

    monkeypatch.setattr(node_models, "load_engine", load_when_told)
    async with running_node(tmp_path) as (client, _):
        client.headers["authorization"] = f"Bearer {TOKEN}"
        try:
            assert (await client.post("/admin/drain", json={})).status_code == 200
            health = await client.get("/health/ready")
            assert (health.status_code, health.json()["status"]) == (503, "draining")
            assert health.headers["connection"] == "close"
        finally:
            may_load.set()
        with trio.fail_after(30):
            while 'state="free"' not in (await client.get("/metrics")).text:
                await trio.sleep(0.02)
        assert (await client.get("/health/ready")).json()["status"] == "draining"
        assert (await client.get("/health/live")).status_code == 200
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        assert (await client.post("/admin/drain", json={"undo": True})).status_code == 200
        await wait_for_status(client, "/health/ready", 200)
        assert "connection" not in (await client.get("/health/ready")).headers
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
