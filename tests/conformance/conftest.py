"""What every Python client is told of the mesh, read from the file that the driver wrote. Runs in each client's own
environment, so it stands on the standard library and pytest alone."""

from __future__ import annotations

import json
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CONTROL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class MeshUnderTest:
    """urls: of each node, with /v1; the first has no model. key: an API key without limits."""

    model: str
    urls: list[str]
    key: str
    control: str
    embedding_model: str

    @property
    def url(self) -> str:
        return self.urls[0]

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """What tests/conformance/stage.py offers."""
        request = urllib.request.Request(self.control + path, json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=CONTROL_TIMEOUT_S) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def limited_key(self, name: str, **settings: Any) -> str:
        """A key of its own, known to every node within two seconds."""
        key: str = self.ask("/keys", name=name, **settings)["key"]
        return key


@pytest.fixture(scope="session")
def mesh() -> MeshUnderTest:
    return MeshUnderTest(**json.loads(Path(os.environ["AI_CLUSTER_CONFORMANCE"]).read_text()))
