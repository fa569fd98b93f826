"""The HTTP server over real sockets and a clock that jumps: bounds for bad clients, ends that lose nothing."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
import trio
import trio.testing

from mesh.view import Address
from nodes.certificate import Certificate
from nodes.config import ConfigInvalid
from nodes.http_connection import HEAD_TIMEOUT_S, LINGER_S, WRITE_TIMEOUT_S
from nodes.http_server import (
    CONNECTIONS_MAX,
    KEEP_ALIVE_TIMEOUT_S,
    RECENT_REQUEST_S,
    REFUSALS_MAX,
    HttpServer,
    connections_max,
)
from nodes.sockets import bind_http
from nodes.strict_headers import LINES, with_strict_headers

GET = b"GET /short HTTP/1.1\r\nhost: test\r\n\r\n"
# Real time without anything happening before the clock jumps: more than loopback takes from one socket to the other.
THRESHOLD_S = 0.02
LARGE_BYTES = 64 * 1024 * 1024
LONG = bytes(range(256)) * 2_000


@pytest.fixture
def clock(autojump_clock: trio.testing.MockClock) -> trio.testing.MockClock:
    autojump_clock.autojump_threshold = THRESHOLD_S
    return autojump_clock


class Application:
    """/short answers at once, /early before the body has come, /slow when told to, /large with LARGE_BYTES in parts,
    /long with LONG in one, /deaf at once and without looking whether its client has left."""

    def __init__(self) -> None:
        self.may_end = trio.Event()
        self.ended: list[str] = []
        self.sent_bytes = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answer, path, receive, send, nursery)
        finally:
            self.ended.append(path)

    async def _answer(self, path: str, receive: Any, send: Any, nursery: trio.Nursery) -> None:
        is_read = path == "/early"
        while not is_read:
            is_read = not (await receive()).get("more_body", False)
        if path != "/deaf":
            nursery.start_soon(self._watch, receive, nursery)
        if path == "/slow":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun ", "more_body": True})
            await self.may_end.wait()
            await send({"type": "http.response.body", "body": b"ended"})
        elif path == "/large":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(LARGE_BYTES // 65536):
                await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
                self.sent_bytes += 65536
            await send({"type": "http.response.body", "body": b""})
        elif path == "/long":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": LONG})
        else:
            headers = [(b"content-length", b"5")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"hello"})
        nursery.cancel_scope.cancel()

    async def _watch(self, receive: Any, nursery: trio.Nursery) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        nursery.cancel_scope.cancel()


class Served:
    def __init__(self, maximum: int, certificate: Certificate | None = None) -> None:
        self.application = Application()
        listener = bind_http(Address("127.0.0.1", 0))
        self.address: tuple[str, int] = listener.getsockname()
        self.server = HttpServer(self.application, listener, maximum, certificate)
        self.listener = listener
        self.clients: list[trio.socket.SocketType] = []

    async def connect(self) -> trio.SocketStream:
        client = trio.socket.socket()
        self.clients.append(client)
        await client.connect(self.address)
        return trio.SocketStream(client)

    @property
    def closed(self) -> dict[str, int]:
        return dict(self.server.statistics().closed)

    @property
    def connections(self) -> int:
        return self.server.statistics().connections


@asynccontextmanager
async def serving(maximum: int = 100, certificate: Certificate | None = None) -> AsyncIterator[Served]:
    served = Served(maximum, certificate)
    try:
        with served.listener:
            async with trio.open_nursery() as nursery:
                await nursery.start(served.server.run)
                yield served
                await served.server.close(0.0)
    finally:
        for client in served.clients:
            client.close()


async def read_answer(client: trio.SocketStream) -> bytes:
    """One answer whose length is 5 bytes."""
    answer = b""
    while not answer.endswith(b"hello"):
        data = await client.receive_some()
        assert data, answer
        answer += data
    return answer


async def read_to_end(client: trio.SocketStream) -> bytes:
    answer = b""
    while data := await client.receive_some():
        answer += data
    return answer


def error_code(answer: bytes) -> str:
    """Of the JSON body, whose length and type its head tells."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.count(b"content-length: ") == head.count(b"content-length: %d\r\n" % len(body)) == 1
    assert b"content-type: application/json\r\n" in head
    code: str = json.loads(body)["error"]["code"]
    return code


async def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.25)


async def ask(client: trio.SocketStream) -> bytes:
    await client.send_all(GET)
    return await read_answer(client)


# Bad clients.


async def test_a_head_that_trickles_is_refused_after_a_fixed_time(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        client = await served.connect()
        started = trio.current_time()
        answer, part = b"", None
        while part != b"":
            await client.send_all(b"G")
            with trio.move_on_after(1):
                part = await client.receive_some()
                answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert LINES in answer
        assert error_code(answer) == "request_timeout"
        assert trio.current_time() - started < HEAD_TIMEOUT_S + 3
        await wait_until(lambda: not served.connections)
        assert served.closed == {"slow_head": 1}
        assert served.application.ended == []


async def test_50_clients_that_trickle_are_all_closed_and_hold_up_nobody(clock: trio.testing.MockClock) -> None:
    async with serving() as served:

        async def trickle() -> None:
            client = await served.connect()
            with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
                for byte in GET.replace(b"test", b"x" * 100):
                    await client.send_all(bytes([byte]))
                    await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(trickle)
            await wait_until(lambda: served.connections == 50)
            assert (await ask(await served.connect())).startswith(b"HTTP/1.1 200")
        await wait_until(lambda: served.closed == {"slow_head": 50})


async def test_a_head_in_two_parts_and_a_pause_between_requests_are_no_fault(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        client = await served.connect()
        await trio.sleep(KEEP_ALIVE_TIMEOUT_S - 5)
        for _ in range(3):
            await client.send_all(GET[:20])
            await trio.sleep(HEAD_TIMEOUT_S - 1)
            await client.send_all(GET[20:])
            await read_answer(client)
            await trio.sleep(KEEP_ALIVE_TIMEOUT_S - 5)
        assert served.closed == {}


async def test_an_idle_connection_ends_after_the_keep_alive_time(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        client = await served.connect()
        await ask(client)
        answered = trio.current_time()
        assert await client.receive_some() == b""
        assert trio.current_time() - answered == pytest.approx(KEEP_ALIVE_TIMEOUT_S, abs=1)


async def test_a_client_that_has_left_holds_no_connection(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        client = await served.connect()
        await ask(client)
        await client.aclose()
        left = trio.current_time()
        await wait_until(lambda: not served.connections)
        assert trio.current_time() - left < 5


async def test_a_client_that_does_not_read_is_closed_and_little_of_its_answer_held(
    clock: trio.testing.MockClock,
) -> None:
    async with serving() as served:
        client = await served.connect()
        await client.send_all(GET.replace(b"short", b"large"))
        await wait_until(lambda: served.application.sent_bytes > 0)
        started = trio.current_time()
        await wait_until(lambda: not served.connections)
        assert trio.current_time() - started < 2 * WRITE_TIMEOUT_S
        assert served.closed == {"not_reading": 1}
        assert served.application.ended == ["/large"]
        assert served.application.sent_bytes < LARGE_BYTES / 2  # what the kernel took
        with pytest.raises(trio.BrokenResourceError):
            await read_to_end(client)


async def test_a_client_that_pipelines_and_does_not_read_is_closed_too(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        client = await served.connect()
        await client.send_all(GET.replace(b"short", b"large") * 5)
        await wait_until(lambda: served.closed == {"not_reading": 1})
        await wait_until(lambda: not served.connections)


async def test_beyond_the_maximum_a_connection_is_told_so_and_closed(clock: trio.testing.MockClock) -> None:
    async with serving(maximum=2) as served:
        first, second = await served.connect(), await served.connect()
        await ask(first)
        third = await served.connect()
        await third.send_all(GET)
        answer = await read_to_end(third)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\nretry-after-ms: 1000\r\n" in answer
        assert b'"code": "too_many_connections"' in answer
        await ask(second)
        assert served.closed == {"limit": 1}
        await first.aclose()
        await wait_until(lambda: served.connections == 1)
        await ask(await served.connect())


async def test_connections_beyond_the_maximum_are_bounded_themselves(clock: trio.testing.MockClock) -> None:
    async with serving(maximum=1) as served:
        await ask(await served.connect())
        refused = [await served.connect() for _ in range(REFUSALS_MAX + 5)]
        await wait_until(lambda: served.closed == {"limit": REFUSALS_MAX + 5})
        answers = []
        for client in refused:
            try:
                answers.append(await read_to_end(client))
            except trio.BrokenResourceError:
                answers.append(b"")
        assert sum(answer.startswith(b"HTTP/1.1 503") for answer in answers) == REFUSALS_MAX


def test_the_maximum_follows_the_file_descriptors_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (1024, 4096))
    assert connections_max(None) == 768
    assert connections_max(500) == 500
    with pytest.raises(ConfigInvalid, match=r"http_connections_max 1000 needs 1128 file descriptors.* 1024.*ulimit -n"):
        connections_max(1000)
    monkeypatch.setattr("resource.getrlimit", lambda which: (1_000_000, 1_000_000))
    assert connections_max(None) == CONNECTIONS_MAX


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"\x00\x01\x02 nonsense\r\n\r\n", b"400", "bad_request"),
        (b"GET / HTTP/1.1\r\ncontent-length: x\r\n\r\n", b"400", "bad_request"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400", "bad_request"),
        (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nx\r\n", b"400", "bad_request"),
        (
            b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\nx\r\n",
            b"400",
            "bad_request",
        ),
        (b"GET /%s" % (b"x" * 20_000), b"431", "request_header_fields_too_large"),
        (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n", b"501", "not_implemented"),
    ],
    ids=["nonsense", "length", "no host", "no chunk", "no chunk, close", "too long", "transfer coding"],
)
async def test_bytes_that_are_no_http_are_answered_with_an_error_and_the_connection_ends(
    data: bytes, status: bytes, code: str, clock: trio.testing.MockClock
) -> None:
    async with serving() as served:
        client = await served.connect()
        await client.send_all(data)
        answer = await read_to_end(client)
        assert answer.startswith(b"HTTP/1.1 %s " % status)
        assert answer.count(LINES) == 1
        assert error_code(answer) == code
        await client.aclose()
        await wait_until(lambda: not served.connections)


def test_only_a_bare_refusal_gets_headers() -> None:
    bare = b"HTTP/1.1 431 \r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    answer = with_strict_headers(bare)
    assert LINES in answer
    assert error_code(answer) == "request_header_fields_too_large"
    marked = b"HTTP/1.1 431 \r\ncontent-length: 0\r\nconnection: close\r\nx-content-type-options: nosniff\r\n\r\n"
    others = [answer, bare + b"a body", b"HTTP/1.1 400 is what the text says", b"", marked, b"2f\r\n" + bare]
    others += [bare.replace(b"content-length: 0\r\n", b""), bare.replace(b"connection: close\r\n", b"")]
    for other in others:
        assert with_strict_headers(other) == other


async def test_what_hypercorn_does_not_expect_ends_one_connection_and_not_the_node(
    clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as served:
        client = await served.connect()
        peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, validate_outbound_headers=False))
        peer.initiate_connection()
        peer.send_headers(1, [*H2_HEADERS[:-1], (":path", b"/\xff")], end_stream=True)
        await client.send_all(peer.data_to_send())
        await wait_until(lambda: not served.connections)
        assert served.closed == {"fault": 1}
        assert "a connection failed" not in caplog.text
        await ask(await served.connect())


async def test_an_answer_before_the_end_of_the_body_reaches_its_client(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        client = await served.connect()
        await client.send_all(b"POST /early HTTP/1.1\r\nhost: test\r\ncontent-length: 3000000\r\n\r\n")
        for _ in range(10):
            await trio.sleep(0.1)
            await client.send_all(bytes(10_000))
        assert (await read_to_end(client)).endswith(b"hello")
        await client.aclose()
        await wait_until(lambda: not served.connections)


# HTTP/2.

H2_HEADERS = [(":method", "GET"), (":scheme", "http"), (":authority", "test"), (":path", "/short")]


class H2Client:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.peer.initiate_connection()
        self.bodies: dict[int, bytes] = {}
        self.goaways: list[int | None] = []

    async def request(self, path: str) -> int:
        stream_id = self.peer.get_next_available_stream_id()
        self.bodies[stream_id] = b""
        self.peer.send_headers(stream_id, [*H2_HEADERS[:-1], (":path", path)], end_stream=True)
        await self.stream.send_all(self.peer.data_to_send())
        return stream_id

    async def receive(self, until: Callable[[], bool], *, reads: bool = True) -> None:
        """Raises EOFError at the end. reads: gives the peer credit for more."""
        while not until():
            data = await self.stream.receive_some()
            if not data:
                raise EOFError
            if b"\x00\x00\x08\x07\x00\x00\x00\x00\x00\x7f\xff\xff\xff" in data:
                self.goaways.append(2**31 - 1)
                data = data.replace(b"\x00\x00\x08\x07\x00\x00\x00\x00\x00\x7f\xff\xff\xff\x00\x00\x00\x00", b"")
            for event in self.peer.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    self.bodies[event.stream_id] += event.data
                    if reads:
                        self.peer.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            await self.stream.send_all(self.peer.data_to_send())


async def test_an_http2_stream_without_credit_is_closed(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        client = H2Client(await served.connect())
        stream_id = await client.request("/large")
        started = trio.current_time()
        with trio.move_on_after(WRITE_TIMEOUT_S / 2):
            await client.receive(lambda: False, reads=False)
        assert served.application.sent_bytes <= 2 * 65536
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await client.receive(lambda: False, reads=False)
        assert trio.current_time() - started == pytest.approx(WRITE_TIMEOUT_S, abs=3)
        assert 0 < len(client.bodies[stream_id]) <= 65535
        assert served.closed == {"not_reading": 1}
        await wait_until(lambda: not served.connections)


async def test_an_http2_client_that_reads_gets_all_of_a_long_answer(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        client = H2Client(await served.connect())
        stream_id = await client.request("/long")
        await client.receive(lambda: len(client.bodies[stream_id]) >= len(LONG))
        assert client.bodies[stream_id] == LONG
        short = await client.request("/short")
        await client.receive(lambda: client.bodies[short] == b"hello")


@pytest.mark.parametrize("is_upgrade", [True, False], ids=["upgrade", "prior knowledge"])
@pytest.mark.parametrize("path", ["/short", "/long", "/slow", "/deaf"])
async def test_an_http2_client_that_ends_its_side_holds_no_connection(
    clock: trio.testing.MockClock, path: str, is_upgrade: bool
) -> None:
    """hypercorn sends nothing more then, and what waits for it to would wait for ever."""
    peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    peer.initiate_connection()
    peer.send_headers(1, [*H2_HEADERS[:-1], (":path", path)], end_stream=True)
    upgrade = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n"
    data = b"GET %s HTTP/1.1\r\nhost: a\r\n%s" % (path.encode(), upgrade) if is_upgrade else peer.data_to_send()
    async with serving() as served:
        with socket.create_connection(served.address) as client:  # blocking: request and end are there together
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            served.application.may_end.set()
            with trio.move_on_after(WRITE_TIMEOUT_S / 2) as patience:
                await wait_until(lambda: bool(served.application.ended) and not served.connections)
        assert not patience.cancelled_caught
        assert served.closed == {}


async def test_an_http2_client_is_sent_elsewhere_by_a_goaway_that_ends_no_stream(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        client = H2Client(await served.connect())
        slow = await client.request("/slow")
        await client.receive(lambda: client.bodies[slow] == b"begun ")
        served.server.announce_drain()
        await client.receive(lambda: bool(client.goaways))
        served.application.may_end.set()
        await client.receive(lambda: client.bodies[slow] == b"begun ended")
        assert client.goaways == [2**31 - 1]


# The drain.


async def test_once_a_drain_is_announced_every_answer_ends_its_connection(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        client = await served.connect()
        assert b"connection: close" not in await ask(client)
        served.server.announce_drain()
        assert b"\r\nconnection: close\r\n" in await ask(client)
        assert await client.receive_some() == b""
        assert b"\r\nconnection: close\r\n" in await ask(await served.connect())
        served.server.end_drain()
        assert b"connection: close" not in await ask(await served.connect())


async def test_a_closed_listener_refuses_connections_and_serves_those_there_were(
    clock: trio.testing.MockClock,
) -> None:
    async with serving() as served:
        known = await served.connect()
        await ask(known)
        in_the_queue = await served.connect()  # perhaps not accepted yet: nothing has run since
        await in_the_queue.send_all(GET)
        served.server.close_listener()
        with pytest.raises(OSError, match="refused"):
            await served.connect()
        await read_answer(in_the_queue)
        await ask(known)
        served.server.close_listener()  # may be repeated


async def test_a_listener_is_closed_also_without_file_descriptors(
    clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as served:
        known = await served.connect()
        await ask(known)

        def accept(listener: socket.socket) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "accept", accept)
            served.server.close_listener()
        assert "cannot accept a connection" in caplog.text
        with pytest.raises(OSError, match="refused"):
            await served.connect()
        await ask(known)


async def test_only_connections_idle_for_long_enough_are_closed(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        old, slow, partial, recent = [await served.connect() for _ in range(4)]
        await ask(old)
        await slow.send_all(GET.replace(b"short", b"slow"))
        await partial.send_all(GET[:10])
        await trio.sleep(2)
        await ask(recent)
        served.server.close_idle(1.0)
        assert await old.receive_some() == b""
        await partial.send_all(GET[10:])
        await read_answer(partial)
        await ask(recent)
        served.application.may_end.set()
        answer = b""
        while not answer.endswith(b"0\r\n\r\n"):
            answer += await slow.receive_some()
        assert b"ended" in answer


async def test_a_request_that_has_arrived_is_answered_on_a_connection_about_to_be_closed(
    clock: trio.testing.MockClock,
) -> None:
    async with serving() as served:
        clients = [await served.connect() for _ in range(20)]
        for client in clients:
            await ask(client)
        await trio.sleep(5)
        for client in clients:  # without the server's tasks running in between
            with socket.socket(fileno=client.socket.fileno()) as raw:
                raw.send(GET)
                raw.detach()
        served.server.close_idle(1.0)
        for client in clients:
            await read_answer(client)


async def test_a_request_that_crosses_the_end_of_its_connection_is_no_reset(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        client = await served.connect()
        await ask(client)
        await trio.sleep(5)
        served.server.close_idle(1.0)
        await client.send_all(GET)
        assert await read_to_end(client) == b""
        await client.aclose()
        await wait_until(lambda: not served.connections)


async def test_close_waits_for_answers_and_cuts_what_is_left(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        slow, stuck, idle = [await served.connect() for _ in range(3)]
        await ask(idle)
        for client in (slow, stuck):
            await client.send_all(GET.replace(b"short", b"slow"))
        await wait_until(lambda: served.server.requests == 2)
        started = trio.current_time()
        await served.server.close(3.0)
        assert trio.current_time() - started == pytest.approx(3.0, abs=0.1)
        assert await idle.receive_some() == b""
        assert served.application.ended == ["/short"]
    assert sorted(served.application.ended) == ["/short", "/slow", "/slow"]


async def test_a_server_is_in_use_while_clients_are_connected_or_were_lately(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        assert not served.server.is_in_use
        client = await served.connect()
        await ask(client)
        await wait_until(lambda: served.server.has_idle)
        await client.aclose()
        await wait_until(lambda: not served.connections)
        assert served.server.is_in_use
        assert not served.server.has_idle
        await trio.sleep(RECENT_REQUEST_S)
        assert not served.server.is_in_use


@pytest.mark.parametrize("upgrade_to", [b"websocket", b"WebSocket", b"websocket\xa0"])
@pytest.mark.parametrize("version", [b"13", b"7", b""])
@pytest.mark.parametrize("behind", [b"", b"x", b"\x81\x05hello", b"\x81\x85abcdhello"])
async def test_a_websockets_upgrade_is_a_request_like_any_other(
    clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, upgrade_to: bytes, version: bytes, behind: bytes
) -> None:
    async with serving() as served:
        client = await served.connect()
        await client.send_all(websocket(upgrade_to, version) + behind)
        assert (await client.receive_some()).startswith(b"HTTP/1.1 200")
        await wait_until(lambda: served.connections == 0)  # idle for too long, or what came behind is no HTTP
        assert served.application.ended == ["/short"]
        assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def websocket(upgrade_to: bytes = b"websocket", version: bytes = b"13") -> bytes:
    upgrade = b"connection: upgrade\r\nupgrade: %s\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n" % upgrade_to
    return b"GET /short HTTP/1.1\r\nhost: a\r\n%ssec-websocket-version: %s\r\n\r\n" % (upgrade, version)


async def test_what_is_behind_a_websockets_upgrade_is_the_next_request(clock: trio.testing.MockClock) -> None:
    async with serving() as served:
        client = await served.connect()
        await client.send_all(websocket() + b"GET /short HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert (await read_to_end(client)).count(b"HTTP/1.1 200") == 2
        await wait_until(lambda: served.application.ended == ["/short", "/short"])


@pytest.mark.parametrize("upgrade", [b"", b"upgrade: h2c\r\n", b"connection: upgrade\r\nupgrade: websocket\r\n"])
async def test_a_client_that_leaves_is_noticed_also_where_it_asked_for_an_upgrade(
    clock: trio.testing.MockClock, upgrade: bytes
) -> None:
    async with serving() as served:
        client = await served.connect()
        await client.send_all(b"POST /slow HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n%s\r\n{}" % upgrade)
        await client.receive_some()
        await client.aclose()
        with trio.fail_after(LINGER_S):
            await wait_until(lambda: served.application.ended == ["/slow"])


@pytest.mark.parametrize("version", [[("sec-websocket-version", "13")], []], ids=["13", "none"])
async def test_a_websocket_over_http2_holds_no_connection(
    clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, version: list[tuple[str, str]]
) -> None:
    async with serving() as served:
        client = await served.connect()
        peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, validate_outbound_headers=False))
        peer.initiate_connection()
        await client.send_all(peer.data_to_send())
        target = [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", "/short")]
        peer.send_headers(1, [*target, (":authority", "a"), *version])
        await client.send_all(peer.data_to_send())
        with trio.fail_after(3 * KEEP_ALIVE_TIMEOUT_S):
            await wait_until(lambda: served.connections == 0)
        assert served.application.ended == []
        assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("settings", [b"AAMAAABkAAQAAP__ folded", b"A", b"AAMAAABk", b"////////"])
async def test_an_upgrade_to_http2_with_bad_settings_ends_its_connection_alone(
    clock: trio.testing.MockClock, settings: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as served:
        client = await served.connect()
        upgrade = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: "
        await client.send_all(b"GET /short HTTP/1.1\r\nhost: a\r\n%s%s\r\n\r\n" % (upgrade, settings))
        with trio.move_on_after(KEEP_ALIVE_TIMEOUT_S / 2):
            await read_to_end(client)
        await wait_until(lambda: served.connections == 0)
        assert [record for record in caplog.records if record.levelname == "ERROR"] == []
        await ask(await served.connect())
