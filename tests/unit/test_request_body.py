"""Bodies that come slowly, over a scripted ASGI connection and a clock that jumps."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing
from quart import Quart, Response, jsonify, request
from quart_trio import QuartTrio

from nodes.api.errors import api_error
from nodes.api.request_body import BODY_BYTES_PER_S_MIN, BODY_TIMEOUT_S, read_body

LIMIT_BYTES = 2_000_000


def application() -> Quart:
    app: Quart = QuartTrio("test", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LIMIT_BYTES

    @app.post("/")
    async def length() -> Response:
        return jsonify(len(await read_body(request)))

    @app.errorhandler(Exception)
    async def answer_error(error: Exception) -> tuple[Response, int]:
        return jsonify(api_error(error).body()), api_error(error).status

    return app


async def post(*, part_bytes: int, parts: int, each_s: float) -> tuple[int, bytes]:
    """(status, body) of the answer to a body that comes in equal parts, each_s apart."""
    sent = 0
    status, answer = 0, b""

    async def receive() -> Any:
        nonlocal sent
        if sent == parts:
            await trio.sleep_forever()
        await trio.sleep(each_s)
        sent += 1
        return {"type": "http.request", "body": bytes(part_bytes), "more_body": sent < parts}

    async def send(message: Any) -> None:
        nonlocal status, answer
        status = message.get("status", status)
        answer += message.get("body", b"")

    scope = {
        "type": "http", "asgi": {}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/",
        "raw_path": b"/", "query_string": b"", "root_path": "", "headers": [], "client": None, "server": None,
        "extensions": {},
    }  # fmt: skip
    await application()(scope, receive, send)  # type: ignore[arg-type]
    return status, answer.strip()


async def test_a_body_that_trickles_is_refused_after_a_fixed_time(autojump_clock: trio.testing.MockClock) -> None:
    started = trio.current_time()
    status, answer = await post(part_bytes=1, parts=1_000, each_s=1)
    assert status == 408
    assert BODY_TIMEOUT_S < trio.current_time() - started < BODY_TIMEOUT_S + 1
    assert b"bytes of the body came in 60 s" in answer


async def test_a_body_that_stops_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    assert (await post(part_bytes=100_000, parts=2, each_s=1_000))[0] == 408


async def test_a_body_within_the_time_may_come_as_slowly_as_it_likes(autojump_clock: trio.testing.MockClock) -> None:
    assert await post(part_bytes=1, parts=50, each_s=1) == (200, b"50")


async def test_a_long_body_may_take_longer_while_it_makes_progress(autojump_clock: trio.testing.MockClock) -> None:
    assert await post(part_bytes=BODY_BYTES_PER_S_MIN, parts=200, each_s=1) == (200, b"1638400")


async def test_a_body_in_parts_is_held_to_the_limit_as_a_whole(autojump_clock: trio.testing.MockClock) -> None:
    assert (await post(part_bytes=LIMIT_BYTES // 4, parts=4, each_s=1))[0] == 200
    assert (await post(part_bytes=LIMIT_BYTES // 4, parts=5, each_s=1))[0] == 413
