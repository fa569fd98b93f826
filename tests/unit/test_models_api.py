"""The mesh's models as OpenAI's API lists them."""

from __future__ import annotations

from types import MappingProxyType

from mesh.view import ClusterView
from tests.unit.scripted_api import Api, ScriptedDispatch, view


async def test_each_model_of_the_mesh_is_listed_once() -> None:
    members = dict(view(models=("demo", "org/big"), a="f1").members) | dict(view(models=("demo",), b="f1").members)
    client = Api(ScriptedDispatch(), ClusterView("a", 0.0, MappingProxyType(members))).client
    assert (await client.get("/v1/models")).json() == {
        "object": "list",
        "data": [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "ai-cluster",
                "context_length": 1024,
                "kind": "generation",
            }
            for name in ("demo", "org/big")
        ],
    }


async def test_a_model_is_found_by_its_name_with_slashes_too() -> None:
    client = Api(ScriptedDispatch(), view(models=("org/big",), a="f1")).client
    for path in ("/v1/models/org/big", "/v1/models/org%2Fbig"):
        assert (await client.get(path)).json()["id"] == "org/big"


async def test_a_model_that_no_node_has_is_404_in_openais_form() -> None:
    response = await Api(ScriptedDispatch()).client.get("/v1/models/org/absent")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["type"] == "invalid_request_error"
