"""/admin over a scripted mesh: the token, the bodies, the lines of the answer."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio

from mesh.seal import key_id
from mesh.view import MemberStatus
from nodes.access.gate import FAILURES_MAX, LimitReached, Unauthorized
from nodes.api.admin_access import AdminAccess
from nodes.api.app import build_app
from nodes.api.services import Services
from observability.metrics import Exposition
from tests.unit.fake_access import FakeAccess
from tests.unit.scripted_api import CountingMetrics, ScriptedDispatch
from tests.unit.test_mesh_operations import NEW, NEW_ID, OLD_ID, FakeMesh, member

TOKEN = "the admin token"
KEY_TEXT = base64.b64encode(NEW).decode()


class Admin:
    def __init__(self, mesh: FakeMesh) -> None:
        self.mesh = mesh
        self.metrics = CountingMetrics()
        self.access = FakeAccess()

        async def render_metrics(*headers: str) -> Exposition:
            return Exposition("text/plain", b"")

        app = build_app(
            Services(
                node_id="a",
                version="0.1",
                cluster_name="test",
                gate=self.access.gate,
                dispatch=ScriptedDispatch(),  # type: ignore[arg-type]
                embeddings=None,  # type: ignore[arg-type]
                view=mesh.view,
                metrics=self.metrics,
                render_metrics=render_metrics,
                render_cluster_metrics=render_metrics,
                deadline_s=600.0,
                body_bytes_max=10_000,
                nodes_expected=None,
                admin_access=AdminAccess(TOKEN),
                operations=mesh.operations,
                key_admin=self.access.admin,
                events=None,  # type: ignore[arg-type]
                member_views=None,  # type: ignore[arg-type]
            )
        )
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
        headers = {"authorization": f"Bearer {TOKEN}"}
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(f"/admin/{path}", json=body)


@asynccontextmanager
async def admin(*names: str) -> AsyncIterator[Admin]:
    made = Admin(FakeMesh(*names))
    async with trio.open_nursery() as nursery:
        await nursery.start(made.mesh.operations.run)
        async with made.client:
            yield made
        nursery.cancel_scope.cancel()


def lines(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


async def test_a_rotation_over_http_tells_a_line_for_each_node_and_a_summary() -> None:
    async with admin("b") as api:
        for path, body in (
            ("install", {"key": KEY_TEXT}),
            ("use", {"key_id": NEW_ID.hex()}),
            ("remove", {"key_id": OLD_ID.hex()}),
        ):
            *told, summary = lines(await api.post(f"keyring/{path}", **body))
            assert [(line["node"], line["ok"]) for line in told] == [("b", True), ("a", True)]
            assert summary["summary"] == {"ok": 2, "failed": 0, "skipped": 0}
        told = lines(await api.client.get("/admin/keyring"))
        assert [(line["primary"], line["keys"]) for line in told[:-1]] == [(NEW_ID.hex(), [NEW_ID.hex()])] * 2
        assert KEY_TEXT not in json.dumps(told)


async def test_flags_reach_the_operation() -> None:
    async with admin("b") as api:
        assert len(lines(await api.post("keyring/install", key=KEY_TEXT, here=True))) == 2
        assert not lines(await api.post("keyring/use", key_id=NEW_ID.hex()))[-1]["done"]
        lines(await api.post("keyring/use", key_id=NEW_ID.hex(), force=True, here=True))
        assert [ring.primary_id for ring in api.mesh.rings.values()] == [NEW_ID, OLD_ID]
        lines(await api.post("keyring/remove", key_id=OLD_ID.hex(), force=True, here=True))
        assert [OLD_ID in ring for ring in api.mesh.rings.values()] == [False, True]


async def test_members_join_drain_leave_and_forget_over_http() -> None:
    async with admin("b") as api:
        assert [line.get("node") for line in lines(await api.client.get("/admin/members"))] == ["a", None]
        everyone = await api.client.get("/admin/members", params={"of": "*"})
        assert [line.get("node") for line in lines(everyone)] == ["b", "a", None]
        api.mesh.seed_answer = "b"
        assert lines(await api.post("join", address="10.0.0.9:7946"))[0]["found"] == "b"
        api.mesh.members["b"] = member("b", MemberStatus.DEAD)
        assert lines(await api.post("forget", node_id="b"))[-1]["message"] == "b is forgotten"
        assert lines(await api.post("drain", node_id="a"))[0]["state"] == "takes no requests, and none runs"
        assert api.mesh.draining == ["a"]
        assert lines(await api.post("drain", undo=True))[0]["state"] == "takes requests again"
        assert api.mesh.draining == []
        assert lines(await api.post("leave"))[0]["node"] == "a"
        assert api.mesh.stopped == ["a"]


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer \xe9"])
async def test_without_the_token_nothing_is_done_and_no_route_is_told(header: str | None) -> None:
    async with admin("b") as api:
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        api.client.headers.pop("authorization")
        for path in ("leave", "keyring/install", "no-such-path"):
            refused = await api.client.post(f"/admin/{path}", json={}, headers=headers)  # type: ignore[arg-type]
            assert refused.status_code == 401
            assert "admin-token" in refused.json()["error"]["message"]
        assert (api.mesh.stopped, api.mesh.asked) == ([], [])
        assert (await api.client.get("/health/live")).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("keyring/install", {"key": "c2VjcmV0"}, 400, "key: a cluster key holds 32 bytes, this one 6"),
        ("keyring/install", {"key": 7}, 400, "key"),
        ("keyring/install", {}, 400, "key"),
        ("keyring/use", {"key_id": "xyz"}, 400, "key_id"),
        ("keyring/remove", {"key_id": "0" * 8, "forced": True}, 400, "forced"),
        ("keyring/remove", {"key_id": "0" * 8, "here": 0}, 400, "here"),
        ("join", {"address": "nowhere"}, 400, "HOST:PORT, such as 127.0.0.1:7946"),
        ("forget", {"node_id": "x"}, 409, "no member is named 'x'"),
        ("forget", {"node_id": "b"}, 409, "b is alive"),
        ("leave", {"node_id": "x"}, 409, "no member is named 'x'"),
    ],
)
async def test_what_cannot_be_begun_is_an_error_that_names_why(
    path: str, body: dict[str, object], status: int, words: str
) -> None:
    async with admin("b") as api:
        refused = await api.post(path, **body)
        assert refused.status_code == status
        assert words in refused.json()["error"]["message"]
        assert "c2VjcmV0" not in refused.text
        assert api.mesh.asked == []


async def test_a_body_that_is_no_json_is_an_error() -> None:
    async with admin() as api:
        refused = await api.client.post("/admin/forget", content=b"{")
        assert refused.status_code == 400


async def test_what_a_later_versions_node_answers_is_shown_whatever_it_is() -> None:
    async def answer(arguments: object) -> dict[str, object]:
        return {"primary": "p", "keys": [], "new": b"\xff", "nested": {b"k": 1}}

    async with admin("b") as api:
        api.mesh.nodes["b"].handlers = {"keyring.list": answer}  # type: ignore[dict-item]
        assert lines(await api.client.get("/admin/keyring"))[0]["new"] == "b'\\xff'"


def test_ids_of_keys_are_what_people_see_everywhere() -> None:
    assert key_id(NEW).hex() == NEW_ID.hex()
    assert len(NEW_ID.hex()) == 8


async def test_guessing_the_token_is_slowed_by_address(autojump_clock: trio.testing.MockClock) -> None:
    access = AdminAccess(TOKEN)
    for _ in range(FAILURES_MAX - 1):
        with pytest.raises(Unauthorized):
            access.authorize("Bearer wrong", "192.0.2.7")
    with pytest.raises(LimitReached):
        access.authorize("Bearer wrong", "192.0.2.7")
    access.authorize(f"Bearer {TOKEN}", "192.0.2.7")  # the right one always works
    with pytest.raises(Unauthorized):
        access.authorize("Bearer wrong", "192.0.2.8")
