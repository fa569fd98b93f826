"""HTTPS over real sockets: handshakes, renewed certificates, ends that a client can tell from cuts."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from nodes import certificate as certificate_module
from nodes.certificate import Certificate
from nodes.config import ConfigInvalid
from nodes.http_connection import HANDSHAKE, HEAD_TIMEOUT_S, NOT_READING, WRITE_TIMEOUT_S
from tests.unit.certificates import client_context, common_name, write_certificate
from tests.unit.test_http_server import GET, LARGE_BYTES, LONG, THRESHOLD_S, H2Client, Served, serving, wait_until

LONG_GET = b"GET /long HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"


@pytest.fixture
def clock(autojump_clock: trio.testing.MockClock) -> trio.testing.MockClock:
    autojump_clock.autojump_threshold = THRESHOLD_S
    return autojump_clock


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return Certificate(*write_certificate(tmp_path, "first"), "1.2")


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at often, on a real clock: threads read them, for which no other clock waits."""
    monkeypatch.setattr(certificate_module, "WATCH_INTERVAL_S", 0.01)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.01)


async def connect(served: Served, *protocols: str, context: ssl.SSLContext | None = None) -> trio.SSLStream:  # type: ignore[type-arg]
    stream = trio.SSLStream(await served.connect(), context or client_context(*protocols))
    await stream.do_handshake()
    return stream


def name_of(stream: trio.SSLStream) -> str:  # type: ignore[type-arg]
    certificate = stream.getpeercert(binary_form=True)
    assert certificate
    return common_name(certificate)


async def ask(stream: trio.SSLStream) -> bytes:  # type: ignore[type-arg]
    await stream.send_all(GET)
    answer = b""
    while not answer.endswith(b"hello"):
        data = await stream.receive_some()
        assert data, answer
        answer += bytes(data)
    return answer


async def test_http1_is_answered_and_the_end_is_said_so(
    clock: trio.testing.MockClock, certificate: Certificate
) -> None:
    async with serving(certificate=certificate) as served:
        stream = await connect(served, "http/1.1")
        assert stream.selected_alpn_protocol() == "http/1.1"
        assert (await ask(stream)).startswith(b"HTTP/1.1 200")
        await stream.send_all(LONG_GET)
        answer = b""
        while data := await stream.receive_some():  # raises where the end comes without close_notify
            answer += bytes(data)
        assert answer.count(LONG[:256]) >= len(LONG) // 256 - 60
        await wait_until(lambda: served.connections == 0)
        assert served.closed == {}


async def test_http2_is_spoken_where_the_client_prefers_it(
    clock: trio.testing.MockClock, certificate: Certificate
) -> None:
    async with serving(certificate=certificate) as served:
        stream = await connect(served, "h2", "http/1.1")
        assert stream.selected_alpn_protocol() == "h2"
        client = H2Client(stream)  # type: ignore[arg-type]
        number = await client.request("/long")
        await client.receive(lambda: len(client.bodies[number]) >= len(LONG))
        assert bytes(client.bodies[number]) == LONG


async def test_a_renewed_certificate_is_for_new_connections_and_running_ones_go_on(
    soon: None, certificate: Certificate, tmp_path: Path
) -> None:
    async with serving(certificate=certificate) as served:
        former = await connect(served)
        assert name_of(former) == "first"
        await ask(former)
        write_certificate(tmp_path, "second", days=60)
        expired_at = certificate.expires_at
        await until(lambda: certificate.expires_at > expired_at)
        assert name_of(await connect(served)) == "second"
        assert (await ask(former)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("damage", ["no PEM", "another key", "gone"])
async def test_a_bad_new_certificate_keeps_the_old_one_and_is_logged(
    soon: None,
    certificate: Certificate,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(certificate=certificate) as served:
        key = (tmp_path / "key.pem").read_bytes()
        if damage == "no PEM":
            (tmp_path / "cert.pem").write_text("nothing")
        elif damage == "another key":
            write_certificate(tmp_path, "second")
            (tmp_path / "key.pem").write_bytes(key)
        else:
            (tmp_path / "key.pem").unlink()
        with caplog.at_level(logging.ERROR, "nodes.certificate"):
            await until(lambda: bool(caplog.records))
            await trio.sleep(0.1)  # it is not said again
        assert [record.message for record in caplog.records] == [
            "the new certificate cannot be used; the former one stays in use"
        ]
        assert name_of(await connect(served)) == "first"
        expired_at = certificate.expires_at
        write_certificate(tmp_path, "third", days=90)
        await until(lambda: certificate.expires_at > expired_at)
        assert name_of(await connect(served)) == "third"


async def test_old_tls_is_refused_and_a_minimum_of_1_3_refuses_1_2(
    clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    certificate = Certificate(*write_certificate(tmp_path), "1.3")
    async with serving(certificate=certificate) as served:
        old = client_context()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(trio.BrokenResourceError):
            await connect(served, context=old)
        stream = await connect(served)
        await ask(stream)
        await wait_until(lambda: served.closed == {HANDSHAKE: 1})


async def test_plain_http_and_a_handshake_that_never_ends_are_closed_and_counted(
    clock: trio.testing.MockClock, certificate: Certificate
) -> None:
    async with serving(certificate=certificate) as served:
        plain = await served.connect()
        await plain.send_all(GET)
        assert not (await plain.receive_some()).startswith(b"HTTP")
        slow = await served.connect()
        await slow.send_all(b"\x16\x03\x01")
        await served.connect()  # says nothing at all, as balancers' checks do
        started = trio.current_time()
        await wait_until(lambda: served.connections == 0)
        assert trio.current_time() - started == pytest.approx(HEAD_TIMEOUT_S, abs=1)
        assert served.closed == {HANDSHAKE: 2}


async def test_a_tls_client_that_does_not_read_is_closed(
    clock: trio.testing.MockClock, certificate: Certificate
) -> None:
    async with serving(certificate=certificate) as served:
        stream = await connect(served)
        await stream.send_all(b"GET /large HTTP/1.1\r\nhost: test\r\n\r\n")
        await wait_until(lambda: served.application.sent_bytes > 0)
        started = trio.current_time()
        await wait_until(lambda: served.connections == 0)
        assert trio.current_time() - started < 2 * WRITE_TIMEOUT_S
        assert served.closed == {NOT_READING: 1}
        assert served.application.sent_bytes < LARGE_BYTES / 2


async def test_an_idle_tls_connection_is_closed_softly_in_a_drain(
    clock: trio.testing.MockClock, certificate: Certificate
) -> None:
    async with serving(certificate=certificate) as served:
        stream = await connect(served)
        await ask(stream)
        await wait_until(lambda: served.server.has_idle)
        await trio.sleep(2.0)
        served.server.close_idle(1.0)
        assert await stream.receive_some() == b""  # the end, said by close_notify


def test_files_that_cannot_be_used_stop_the_start_with_a_line(tmp_path: Path) -> None:
    cert_file, key_file = write_certificate(tmp_path)
    with pytest.raises(ConfigInvalid, match=r"tls_cert_file .*absent.*No such file"):
        Certificate(tmp_path / "absent", key_file, "1.2")
    key_file.write_text("nothing")
    with pytest.raises(ConfigInvalid, match=r"PEM files.*without a password"):
        Certificate(cert_file, key_file, "1.2")
