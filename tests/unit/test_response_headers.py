"""What browsers are told, and which web pages may read answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import trio

from nodes.api.response_headers import HEADERS_MAX
from nodes.strict_headers import STRICT
from tests.unit.scripted_api import ANSWER, BODY, Api, ScriptedDispatch

PAGE = "https://app.example"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def cors_of(response: httpx.Response) -> set[str]:
    return {name for name in response.headers if name.startswith("access-control-")}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/health/live"),
        ("GET", "/metrics"),
        ("GET", "/cluster/status"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/absent"),
        ("GET", "/admin/keys"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
        ("DELETE", "/v1/models"),
        ("POST", "/v1/chat/completions"),
    ],
)
async def test_every_answer_is_strict_and_no_page_reads_it_unless_configured(method: str, path: str) -> None:
    response = await Api(ScriptedDispatch()).client.request(method, path, headers={"origin": PAGE})
    for name in STRICT:
        assert len(response.headers.get_list(name.decode())) == 1, name
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cross-origin-resource-policy"] == "same-origin"
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert cors_of(response) == set()


async def test_without_origins_a_preflight_is_a_method_that_no_route_has() -> None:
    api = Api(ScriptedDispatch())
    response = await api.client.options("/v1/chat/completions", headers=PREFLIGHT)
    assert response.status_code == 405
    assert cors_of(response) == set()


async def test_a_configured_page_may_ask_and_read_and_another_may_not() -> None:
    api = Api(ScriptedDispatch(*ANSWER), cors_origins=(PAGE,))
    allowed = await api.client.options("/v1/chat/completions", headers=PREFLIGHT)
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert allowed.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    assert api.metrics.http == [("OPTIONS", "preflight", 204)]
    answer = await api.client.post("/v1/chat/completions", json=BODY, headers={"origin": PAGE})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    for origin in ("https://app.example.evil", "http://app.example", "null"):
        refused = await api.client.options("/v1/chat/completions", headers=PREFLIGHT | {"origin": origin})
        assert (refused.status_code, cors_of(refused)) == (405, set())


async def test_admin_is_open_to_no_page_whatever_is_configured() -> None:
    api = Api(ScriptedDispatch(), cors_origins=("*",))
    assert (await api.client.get("/v1/models", headers={"origin": PAGE})).headers["access-control-allow-origin"] == "*"
    for method in ("OPTIONS", "GET"):
        response = await api.client.request(method, "/admin/keys", headers=PREFLIGHT)
        assert response.status_code in (401, 405)
        assert cors_of(response) == set()


async def test_headers_that_are_no_names_are_not_sent_back() -> None:
    api = Api(ScriptedDispatch(), cors_origins=("*",))
    names = PREFLIGHT | {"access-control-request-headers": "a b; c"}
    response = await api.client.options("/v1/models", headers=names)
    assert response.status_code == 204
    assert "access-control-allow-headers" not in response.headers


@pytest.mark.parametrize(("count", "status"), [(HEADERS_MAX - 10, 200), (HEADERS_MAX + 1, 431)])
async def test_headers_are_limited_in_number(count: int, status: int) -> None:
    many: Any = {f"x-{number}": "1" for number in range(count)}
    response = await Api(ScriptedDispatch()).client.get("/v1/models", headers=many)
    assert response.status_code == status
    if status == 431:
        assert response.json()["error"]["code"] == "request_header_fields_too_large"


@pytest.mark.parametrize(
    ("path_bytes", "header_bytes", "status"), [(0, 15_000, 200), (0, 16_400, 431), (16_400, 0, 431)]
)
async def test_request_line_and_headers_are_limited_in_size(path_bytes: int, header_bytes: int, status: int) -> None:
    headers = {"x-large": "a" * header_bytes}
    response = await Api(ScriptedDispatch()).client.get(f"/v1/models?{'a' * path_bytes}", headers=headers)
    assert response.status_code == status
    if status == 431:
        assert response.json()["error"]["code"] == "request_header_fields_too_large"


@pytest.mark.parametrize(("target", "status"), [("", 400), ("http://[", 400), ("http://a", 400), ("*", 404)])
async def test_a_target_without_a_path_is_refused(target: str, status: int) -> None:
    api = Api(ScriptedDispatch())
    sent: list[Any] = []

    came = iter([True])

    async def receive() -> Any:
        if not next(came, False):
            await trio.sleep_forever()
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": target,
        "raw_path": target.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"a")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "extensions": {},
    }
    with trio.fail_after(10):
        await api.app(scope, receive, send)
    assert sent[0]["status"] == status


@pytest.mark.parametrize("host", ["a" * 64, "a..b", f"{'a' * 70}.example:8080"])
async def test_a_host_that_can_be_none_is_the_clients_fault(host: str, caplog: pytest.LogCaptureFixture) -> None:
    response = await Api(ScriptedDispatch()).client.get("/health/live", headers={"host": host})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-request-id"]
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_websocket_is_refused_with_an_error() -> None:
    headers = {"upgrade": "WebSocket", "sec-websocket-version": "13"}
    response = await Api(ScriptedDispatch()).client.get("/", headers=headers)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "forbidden"
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_a_request_with_two_ends_is_refused_and_its_connection_closed() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    headers = {"content-length": "2", "transfer-encoding": "chunked", "content-type": "application/json"}
    response = await api.client.post("/v1/chat/completions", content=b"{}", headers=headers)
    assert response.status_code == 400
    assert response.headers["connection"] == "close"
    assert "both content-length and transfer-encoding" in response.json()["error"]["message"]
