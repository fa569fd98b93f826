"""What `ai-cluster up` tells of its mesh; that it runs is tests/cluster/test_up.py's."""

from __future__ import annotations

from pathlib import Path

from nodes.access.api_key import RECORD_PREFIX
from nodes.local_mesh import LocalMesh, greeting
from nodes.store import open_store
from tests.unit.test_store import live


def mesh_in(folder: Path) -> LocalMesh:
    return LocalMesh(
        nodes=2, http_port=8080, mesh_port=7946, models=(), slots=None, data_dir=folder, log_dir=folder, config=None
    )


async def test_the_greeting_tells_of_keys_where_there_are_some(tmp_path: Path) -> None:
    folder = tmp_path / "node-2"
    folder.mkdir()
    async with open_store(folder):
        pass
    told = greeting(mesh_in(tmp_path), "ai-cluster")
    assert "http://127.0.0.1:8080, http://127.0.0.1:8081" in told
    assert 'ai-cluster chat --url http://127.0.0.1:8080 "How do I add a node?"' in told
    assert "key" not in told.replace(str(tmp_path), "")
    async with open_store(folder) as store:
        await store.put([live(f"{RECORD_PREFIX}bbbb", 1)])
        told = greeting(mesh_in(tmp_path), "ai-cluster")
    assert 'ai-cluster chat --url http://127.0.0.1:8080 --api-key sk-… "How do I add a node?"' in told
    assert f"keys create --name NAME --url http://127.0.0.1:8080 --data-dir {tmp_path}" in told
    assert greeting(mesh_in(tmp_path), "ai-cluster") == told  # after its node has ended too
