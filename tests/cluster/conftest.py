from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.mesh import Mesh


@pytest.fixture(scope="session")
def calm_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Three ready nodes that no test harms."""
    mesh = Mesh(tmp_path_factory.mktemp("calm"))
    try:
        for _ in range(3):
            mesh.add()
        mesh.wait_until_agreed()
        yield mesh
    finally:
        mesh.close()


@pytest.fixture
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """An empty mesh for a test that kills, stops or misconfigures its nodes."""
    mesh = Mesh(tmp_path_factory.mktemp("mesh"))
    try:
        yield mesh
    finally:
        mesh.close()
