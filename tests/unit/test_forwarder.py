"""Two or three forwarders over a network of memory streams and a clock that jumps, and a few over loopback sockets."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
import trio.testing

from mesh.errors import HandshakeRefused, MeshError, ModelUnknown, NoCapacity, PeerUnavailable
from mesh.forwarder import (
    HANDSHAKES_MAX,
    REJECTIONS,
    REKEY_GRACE_S,
    Forwarder,
    ForwarderConfig,
    IncomingStream,
    OutgoingStream,
    RemoteError,
    StreamRefused,
)
from mesh.seal import DEVELOPMENT_KEY, KEY_BYTES, Keyring, key_id
from mesh.streams import STREAM_EVENTS_MAX
from mesh.view import Address
from tests.unit.fake_network import FakeNetwork, FakeStream

KEYRING = Keyring([DEVELOPMENT_KEY])
OTHER_KEYRING = Keyring([b"o" * KEY_BYTES])
ADDRESS = Address("10.0.0.2", 7946)
Serve = Callable[[IncomingStream], Awaitable[None]]


async def echo(stream: IncomingStream) -> None:
    """One event with the request, one with who asked."""
    await stream.send([stream.request.decode()])
    await stream.send([stream.peer_node_id])


async def never(stream: IncomingStream) -> None:
    await trio.sleep_forever()


class Server:
    """A serve function that tells what became of its streams. Each sends one event, then waits."""

    def __init__(self) -> None:
        self.started: list[bytes] = []
        self.cancelled: list[bytes] = []
        self.streams: list[IncomingStream] = []

    async def __call__(self, stream: IncomingStream) -> None:
        self.started.append(stream.request)
        self.streams.append(stream)
        await stream.send("started")
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled.append(stream.request)
            raise


class Pair:
    """The entry `a` and the executor `b`."""

    def __init__(self, network: FakeNetwork, a: Forwarder, b: Forwarder, nursery: trio.Nursery) -> None:
        self.network = network
        self.a = a
        self.b = b
        self.nursery = nursery
        self.lost: list[str] = []
        self.loads: list[tuple[str, bytes]] = []
        self.scope_b = trio.CancelScope()

    async def open(self, request: bytes = b"request") -> OutgoingStream:
        return await self.a.open("b", ADDRESS, request)

    @property
    def far(self) -> FakeStream:
        """b's end of the connection made last."""
        return self.network.ends[-1][1]


@asynccontextmanager
async def running(
    serve: Serve,
    *,
    keyring: Keyring = KEYRING,
    keyring_b: Keyring = KEYRING,
    load: Callable[[], bytes] | None = None,
    config: ForwarderConfig | None = None,
) -> AsyncIterator[Pair]:
    """keyring: a's. keyring_b, load: b's."""
    network = FakeNetwork()
    lost: list[str] = []
    loads: list[tuple[str, bytes]] = []
    a = Forwarder(
        node_id="a",
        boot_id=b"a" * 16,
        keyring=keyring,
        serve=never,
        config=config,
        on_load=lambda node_id, report: loads.append((node_id, report)),
        on_peer_lost=lost.append,
        connect=network.connect,
        rng=random.Random(0),
    )
    b = Forwarder(node_id="b", boot_id=b"b" * 16, keyring=keyring_b, serve=serve, load=load, connect=network.connect)
    async with trio.open_nursery() as nursery:
        pair = Pair(network, a, b, nursery)
        pair.lost, pair.loads = lost, loads

        async def run_b(*, task_status: trio.TaskStatus[None]) -> None:
            with pair.scope_b:
                await b.run([network.listen(ADDRESS)], task_status=task_status)

        await nursery.start(a.run, [])
        await nursery.start(run_b)
        yield pair
        nursery.cancel_scope.cancel()


async def read_all(stream: OutgoingStream) -> list[object]:
    return [event async for event in stream]


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


# Over real sockets.


@asynccontextmanager
async def over_loopback(serve: Serve) -> AsyncIterator[tuple[Forwarder, Forwarder, Address]]:
    a, b = (Forwarder(node_id=name, boot_id=name.encode() * 16, keyring=KEYRING, serve=serve) for name in ("a", "b"))
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = Address("127.0.0.1", listeners[0].socket.getsockname()[1])
        await nursery.start(a.run, [])
        await nursery.start(b.run, listeners)
        yield a, b, address
        nursery.cancel_scope.cancel()


async def test_fifty_streams_share_one_tcp_link_without_mixing() -> None:
    async def count(stream: IncomingStream) -> None:
        for number in range(int(stream.request)):
            await stream.send([stream.request, number])

    async with over_loopback(count) as (a, b, address):

        async def ask(length: int) -> None:
            stream = await a.open("b", address, str(length).encode())
            assert await read_all(stream) == [[str(length).encode(), number] for number in range(length)]
            await stream.aclose()

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for length in range(50):
                    nursery.start_soon(ask, length)
        assert (a.statistics().links, b.statistics().links) == (1, 1)
        assert (a.statistics().streams_opened, b.statistics().streams_served) == (50, 50)
        assert a.statistics().streams == b.statistics().streams == 0
        assert a.statistics().cancels_sent == 0


async def test_closing_a_stream_ends_the_task_that_serves_it_over_tcp() -> None:
    server = Server()
    async with over_loopback(server) as (a, b, address):
        with trio.fail_after(20):
            stream = await a.open("b", address, b"one")
            assert await stream.receive() == "started"
            await stream.aclose()
            while not server.cancelled:
                await trio.sleep(0)
        assert b.statistics().cancels_received == 1


async def test_the_largest_request_and_a_large_event_cross_tcp() -> None:
    async def mirror(stream: IncomingStream) -> None:
        await stream.send(len(stream.request))
        await stream.send(stream.request[: 3 * 1024 * 1024])

    async with over_loopback(mirror) as (a, _, address):
        with trio.fail_after(20):
            request = b"r" * (8 * 1024 * 1024)
            assert await read_all(await a.open("b", address, request)) == [len(request), request[: 3 * 1024 * 1024]]
            with pytest.raises(ValueError, match="exceeds"):
                await a.open("b", address, request + b"r")


async def test_garbage_on_the_port_is_counted_and_the_connection_closed() -> None:
    async with over_loopback(never) as (_, b, address):
        with trio.fail_after(20):
            stream = await trio.open_tcp_stream(address.host, address.port)
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            with suppress(trio.BrokenResourceError):  # the kernel resets a connection closed with bytes unread
                assert await stream.receive_some() == b""
            await stream.aclose()
        assert b.statistics().rejected["malformed"] == 1


async def test_a_seed_is_checked_without_a_running_forwarder() -> None:
    async with over_loopback(never) as (_, b, address):
        newcomer = partial(Forwarder, node_id="new", boot_id=b"n" * 16, serve=never)
        with trio.fail_after(20):
            assert await newcomer(keyring=KEYRING).check_seed(address) == "b"
            with pytest.raises(HandshakeRefused) as raised:
                await newcomer(keyring=OTHER_KEYRING).check_seed(address)
            assert raised.value.reason == "unknown key"
            with trio.socket.socket() as taken:
                await taken.bind(("127.0.0.1", 0))
                with pytest.raises(PeerUnavailable, match="cannot be reached"):
                    await newcomer(keyring=KEYRING).check_seed(Address(*taken.getsockname()))
            while b.statistics().links:
                await trio.sleep(0)
        assert b.statistics().rejected["unknown key"] == 1
        assert b.statistics().broken_links == 0, "a check says goodbye"


# Over memory streams, on a clock that jumps.


async def test_a_stream_gives_its_events_and_then_ends(autojump_clock: trio.testing.MockClock) -> None:
    async with running(echo) as pair:
        stream = await pair.open(b"hello")
        assert await read_all(stream) == [["hello"], ["a"]]
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()
        await stream.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        pytest.param(NoCapacity("full", 7.5), NoCapacity("full", 7.5), id="no capacity"),
        pytest.param(ModelUnknown("no such model"), ModelUnknown("no such model"), id="model unknown"),
        pytest.param(StreamRefused("deadline", "too late"), RemoteError("deadline", "too late"), id="refused"),
    ],
)
async def test_what_serving_raises_is_what_the_opener_reads(
    raised: MeshError, expected: MeshError, autojump_clock: trio.testing.MockClock
) -> None:
    async def refuse(stream: IncomingStream) -> None:
        await stream.send("first")
        raise raised

    async with running(refuse) as pair:
        stream = await pair.open()
        assert await stream.receive() == "first"
        for _ in range(2):
            with pytest.raises(type(expected)) as caught:
                await stream.receive()
            assert str(caught.value) == str(expected)
            assert vars(caught.value) == vars(expected)
        await stream.aclose()
        assert pair.a.statistics().cancels_sent == 0


async def test_a_fault_while_serving_is_logged_there_and_the_link_lives_on(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail_once(stream: IncomingStream) -> None:
        if stream.request == b"bad":
            raise KeyError("the user's prompt")
        await echo(stream)

    async with running(fail_once) as pair:
        with pytest.raises(RemoteError) as raised:
            await (await pair.open(b"bad")).receive()
        assert raised.value.code == "internal"
        assert "prompt" not in str(raised.value)
        assert "KeyError" in str(raised.value)
        assert await read_all(await pair.open(b"good")) == [["good"], ["a"]]
        assert pair.network.dials == 1
    assert [record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR] == [True]


async def test_an_event_that_cannot_be_sent_ends_its_stream_alone(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def send_nonsense(stream: IncomingStream) -> None:
        await stream.send(object() if stream.request == b"bad" else "good")

    async with running(send_nonsense) as pair:
        with pytest.raises(RemoteError, match="TypeError"):
            await (await pair.open(b"bad")).receive()
        assert await read_all(await pair.open(b"good")) == ["good"]


async def test_closing_a_stream_cancels_once_and_spares_the_others(autojump_clock: trio.testing.MockClock) -> None:
    server = Server()
    async with running(server) as pair:
        first, second = await pair.open(b"first"), await pair.open(b"second")
        assert [await first.receive(), await second.receive()] == ["started", "started"]
        await first.aclose()
        await first.aclose()
        await settle()
        assert server.cancelled == [b"first"]
        assert pair.a.statistics().cancels_sent == pair.b.statistics().cancels_received == 1
        assert pair.a.statistics().streams == pair.b.statistics().streams == 1


async def test_a_stream_that_is_closed_while_its_reader_is_cancelled_still_cancels(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = Server()
    async with running(server) as pair:
        with trio.move_on_after(5):
            async with await pair.open() as stream:
                assert await stream.receive() == "started"
                await stream.receive()
        await settle()
        assert server.cancelled == [b"request"]


async def test_a_stream_closed_before_its_request_has_left_is_not_served_for_long(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = Server()
    async with running(server) as pair:
        await (await pair.open(b"first")).receive()
        (await pair.open(b"second")).close()
        await settle()
        assert server.cancelled in ([b"second"], [])
        assert pair.b.statistics().streams == 1


async def test_when_a_peer_dies_its_streams_fail_after_what_they_had_received(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(Server()) as pair:
        streams = [await pair.open() for _ in range(3)]
        await settle()
        pair.far.die()
        for stream in streams:
            assert await stream.receive() == "started"
            with pytest.raises(PeerUnavailable, match="node b"):
                await stream.receive()
        assert pair.lost == ["b"]
        assert pair.a.statistics().broken_links == 1
        assert pair.a.statistics().links == pair.a.statistics().streams == 0


async def test_when_the_opener_dies_its_streams_are_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    server = Server()
    async with running(server) as pair:
        await (await pair.open()).receive()
        pair.network.ends[-1][0].die()
        await settle()
        assert server.cancelled == [b"request"]


@pytest.mark.parametrize("hung", ["executor", "entry"])
async def test_a_hung_peer_is_noticed_by_its_unanswered_pings(
    hung: str, autojump_clock: trio.testing.MockClock
) -> None:
    server = Server()
    async with running(server) as pair:
        stream = await pair.open()
        assert await stream.receive() == "started"
        began_at = trio.current_time()
        near, far = pair.network.ends[-1]
        if hung == "executor":
            far.hang()
            with pytest.raises(PeerUnavailable, match="pings"):
                await stream.receive()
        else:
            near.hang()
            while not server.cancelled:
                await trio.sleep(0.1)
        assert 1.5 <= trio.current_time() - began_at <= 2.2


async def test_a_peer_that_stops_for_a_second_and_a_half_keeps_its_streams(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = Server()
    async with running(server) as pair:
        stream = await pair.open()
        assert await stream.receive() == "started"
        pair.far.stop()
        await trio.sleep(1.4)
        pair.far.go_on()
        await trio.sleep(3)
        await server.streams[0].send("still here")
        assert await stream.receive() == "still here"
        assert pair.lost == []


async def test_a_process_that_stood_still_blames_no_peer_for_answers_it_has_not_read(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = Server()
    async with running(server) as pair:
        stream = await pair.open()
        assert await stream.receive() == "started"
        pair.far.stop()
        await trio.sleep(1.8)  # three pings are unanswered: the next turn would break the link
        pair.far.go_on()
        autojump_clock.jump(5)  # no task runs meanwhile
        await trio.sleep(3)
        await server.streams[0].send("still here")
        assert await stream.receive() == "still here"
        assert pair.lost == []


async def test_a_process_that_stood_still_gives_a_hung_peer_as_long_as_before(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(Server()) as pair:
        stream = await pair.open()
        assert await stream.receive() == "started"
        pair.far.hang()
        await trio.sleep(1)
        autojump_clock.jump(5)
        began_at = trio.current_time()
        with pytest.raises(PeerUnavailable, match="pings"):
            await stream.receive()
        assert 1.4 <= trio.current_time() - began_at <= 2.2


async def test_a_process_that_stood_still_while_it_wrote_does_not_count_that_as_the_peers_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(never) as pair:
        await pair.a.ping("b", ADDRESS)
        near = pair.network.ends[-1][0]
        near.stop()  # the peer's window is full
        with trio.move_on_after(1):
            await pair.a.ping("b", ADDRESS)
        autojump_clock.jump(30)
        await trio.sleep(1)
        near.go_on()
        await pair.a.ping("b", ADDRESS)
        assert pair.lost == []


async def test_a_slow_stream_is_no_hang(autojump_clock: trio.testing.MockClock) -> None:
    async def slow(stream: IncomingStream) -> None:
        await trio.sleep(500)
        await stream.send("at last")

    async with running(slow) as pair:
        assert await read_all(await pair.open()) == ["at last"]
        assert pair.lost == []


async def test_a_reader_that_falls_behind_loses_its_stream_and_nobody_else(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def flood(stream: IncomingStream) -> None:
        for number in range(STREAM_EVENTS_MAX + 100):
            await stream.send(number)
        await trio.sleep_forever()

    async def serve(stream: IncomingStream) -> None:
        await (flood(stream) if stream.request == b"flood" else echo(stream))

    async with running(serve) as pair:
        lazy = await pair.open(b"flood")
        await settle()
        assert await read_all(await pair.open(b"other")) == [["other"], ["a"]]
        assert pair.b.statistics().streams == 0, "the serving task was cancelled"
        assert [await lazy.receive() for _ in range(STREAM_EVENTS_MAX)] == list(range(STREAM_EVENTS_MAX))
        with pytest.raises(RemoteError, match=str(STREAM_EVENTS_MAX)):
            await lazy.receive()
        assert pair.a.statistics().overflows == 1


async def test_a_server_too_far_ahead_of_a_peer_that_reads_nothing_is_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    sent = 0

    async def flood(stream: IncomingStream) -> None:
        nonlocal sent
        while True:
            await stream.send(sent)
            sent += 1

    async with running(flood) as pair:
        await pair.a.ping("b", ADDRESS)
        pair.far.block()
        await pair.open()
        await settle()
        assert STREAM_EVENTS_MAX <= sent <= STREAM_EVENTS_MAX + 10
        assert pair.b.statistics().overflows == 1


async def test_a_peer_that_does_not_drain_is_broken_after_ten_seconds(autojump_clock: trio.testing.MockClock) -> None:
    async with running(never) as pair:
        await pair.a.ping("b", ADDRESS)
        began_at = trio.current_time()
        pair.network.ends[-1][0].block()
        with pytest.raises(PeerUnavailable):
            await pair.a.ping("b", ADDRESS)
        while not pair.lost:
            await trio.sleep(0.5)
        assert 10 <= trio.current_time() - began_at <= 12


async def test_a_link_without_streams_is_closed_after_a_minute_and_dialled_again_when_needed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(echo) as pair:
        await read_all(await pair.open())
        await trio.sleep(50)
        await read_all(await pair.open())
        await trio.sleep(50)
        assert pair.a.statistics().links == pair.b.statistics().links == 1
        await trio.sleep(15)
        assert pair.a.statistics().links == pair.b.statistics().links == 0
        assert pair.lost == []
        assert pair.a.statistics().broken_links == pair.b.statistics().broken_links == 0
        bytes_before = pair.a.statistics().bytes_out
        await read_all(await pair.open())
        assert pair.network.dials == 2
        assert pair.a.statistics().bytes_out > bytes_before, "totals outlive their links"


async def test_a_peer_that_shuts_down_fails_its_streams_but_is_not_lost(autojump_clock: trio.testing.MockClock) -> None:
    async with running(Server()) as pair:
        stream = await pair.open()
        await stream.receive()
        pair.scope_b.cancel()
        with pytest.raises(PeerUnavailable):
            await stream.receive()
        assert pair.lost == []


async def test_an_opener_that_shuts_down_cancels_its_streams_and_is_not_broken(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = Server()
    network = FakeNetwork()
    b = Forwarder(node_id="b", boot_id=b"b" * 16, keyring=KEYRING, serve=server)
    a = Forwarder(node_id="a", boot_id=b"a" * 16, keyring=KEYRING, serve=never, connect=network.connect)
    async with trio.open_nursery() as nursery:
        await nursery.start(b.run, [network.listen(ADDRESS)])
        async with trio.open_nursery() as inner:
            await inner.start(a.run, [])
            await (await a.open("b", ADDRESS, b"request")).receive()
            inner.cancel_scope.cancel()
        await settle()
        assert server.cancelled == [b"request"]
        assert b.statistics().broken_links == 0
        with pytest.raises(PeerUnavailable, match="closed"):
            await a.open("b", ADDRESS, b"request")
        nursery.cancel_scope.cancel()


async def test_a_key_that_the_peer_does_not_hold_is_refused_by_name(autojump_clock: trio.testing.MockClock) -> None:
    async with running(echo, keyring=OTHER_KEYRING) as pair:
        with pytest.raises(HandshakeRefused, match="unknown key"):
            await pair.a.ping("b", ADDRESS)
        await trio.sleep(5)
        with pytest.raises(PeerUnavailable, match="unknown key"):
            await pair.open()
        assert pair.b.statistics().rejected["unknown key"] == 2
        assert pair.a.statistics().links == pair.b.statistics().links == 0


async def test_a_peer_under_another_name_is_unavailable(autojump_clock: trio.testing.MockClock) -> None:
    async with running(echo) as pair:
        for call in (partial(pair.a.open, request=b""), pair.a.ping):
            with pytest.raises(PeerUnavailable, match="another node than c"):
                await call("c", ADDRESS)
        assert await pair.a.check_seed(ADDRESS) == "b"


async def test_an_address_that_does_not_answer_costs_the_connect_timeout_and_is_then_backed_off(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(echo) as pair:
        pair.network.black_holes.add(ADDRESS)
        began_at = trio.current_time()
        with pytest.raises(PeerUnavailable, match="did not answer within 2 s"):
            await pair.open()
        assert trio.current_time() - began_at == pytest.approx(2.0)
        with pytest.raises(PeerUnavailable, match="next try in"):
            await pair.open()
        assert pair.network.dials == 1


async def test_a_handshake_that_stalls_costs_the_connect_timeout(autojump_clock: trio.testing.MockClock) -> None:
    async with running(echo) as pair:
        silent = Address("10.0.0.3", 7946)
        pair.network.listen(silent)
        with pytest.raises(PeerUnavailable, match="did not answer"):
            await pair.a.check_seed(silent)


async def test_the_pause_after_failed_dials_grows_to_its_limit_and_ends_with_the_first_success(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(echo) as pair:
        absent = Address("10.0.0.3", 7946)
        pauses = []
        for _ in range(9):
            with pytest.raises(PeerUnavailable, match="refused"):
                await pair.a.open("c", absent, b"")
            began_at = trio.current_time()
            dials = pair.network.dials
            while True:
                await trio.sleep(0.01)
                with pytest.raises(PeerUnavailable):
                    await pair.a.open("c", absent, b"")
                if pair.network.dials > dials:
                    break
            pauses.append(trio.current_time() - began_at)
            await trio.sleep(3)
        assert pauses[0] <= 0.2
        assert 0.9 <= max(pauses) <= 2.1


async def test_a_ping_dials_even_while_the_address_is_backed_off(autojump_clock: trio.testing.MockClock) -> None:
    async with running(echo) as pair:
        pair.network.black_holes.add(ADDRESS)
        with pytest.raises(PeerUnavailable):
            await pair.open()
        pair.network.black_holes.clear()
        assert await pair.a.ping("b", ADDRESS) < 1
        assert await read_all(await pair.open()) == [["request"], ["a"]]


async def test_requests_that_come_together_share_one_dial_and_the_first_may_give_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(echo) as pair:
        answers = []
        gate = trio.Event()
        connect = pair.network.connect

        async def connect_later(address: Address) -> trio.abc.Stream:
            await gate.wait()
            return await connect(address)

        pair.a._connect = connect_later

        async def ask() -> None:
            answers.append(await read_all(await pair.open()))

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.5) as first:
                await pair.open()
            assert first.cancelled_caught
            for _ in range(5):
                nursery.start_soon(ask)
            await settle()
            gate.set()
        assert answers == [[["request"], ["a"]]] * 5
        assert pair.network.dials == 1


async def test_everybody_who_waits_for_a_dial_that_fails_is_told(autojump_clock: trio.testing.MockClock) -> None:
    async with running(echo) as pair:
        errors: list[PeerUnavailable] = []

        async def ask() -> None:
            try:
                await pair.a.open("c", Address("10.0.0.3", 7946), b"")
            except PeerUnavailable as exc:
                errors.append(exc)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        assert len({id(error) for error in errors}) == 3
        assert pair.network.dials == 1


async def test_a_ping_measures_the_link_and_dials_it_first(autojump_clock: trio.testing.MockClock) -> None:
    async with running(echo) as pair:
        assert await pair.a.ping("b", ADDRESS) < 0.1
        pair.far.hang()
        with pytest.raises(PeerUnavailable, match="did not answer within 2 s"):
            await pair.a.ping("b", ADDRESS)


async def test_a_ping_fails_with_its_link(autojump_clock: trio.testing.MockClock) -> None:
    async with running(echo) as pair:
        await pair.a.ping("b", ADDRESS)
        pair.far.hang()
        async with trio.open_nursery() as nursery:

            async def ping() -> None:
                with pytest.raises(PeerUnavailable, match="ended"):
                    await pair.a.ping("b", ADDRESS)

            nursery.start_soon(ping)
            await settle()
            pair.far.die()


async def test_a_nodes_load_rides_on_its_answers(autojump_clock: trio.testing.MockClock) -> None:
    reports = iter(range(1000))

    async def slow(stream: IncomingStream) -> None:
        for number in range(3):
            await trio.sleep(1.03)
            await stream.send(number)

    async with running(slow, load=lambda: b"load %d" % next(reports)) as pair:
        await pair.a.ping("b", ADDRESS)
        assert pair.loads == [("b", b"load 0")]
        await read_all(await pair.open())
        assert {node_id for node_id, _ in pair.loads} == {"b"}
        assert 4 <= len(pair.loads) <= 12
        assert [report for _, report in pair.loads] == [b"load %d" % number for number in range(len(pair.loads))]


async def test_strangers_that_say_nothing_are_few_and_do_not_stay(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(echo) as pair:
        strangers = [await pair.network.connect(ADDRESS) for _ in range(HANDSHAKES_MAX + 10)]
        await settle()
        assert pair.b.statistics().rejected["too many"] == 10
        assert await strangers[0].receive_some() == b"", "the oldest made room"
        assert await read_all(await pair.open()) == [["request"], ["a"]], "they keep no peer out"
        await trio.sleep(6)
        rejected = pair.b.statistics().rejected
        assert (rejected["too many"], rejected["timeout"]) == (11, HANDSHAKES_MAX - 1)
        for stranger in strangers:
            await stranger.aclose()
    warnings = [record for record in caplog.records if record.message == "rejected a peer link"]
    assert len(warnings) <= 14, "the log grows with the logarithm of what strangers do"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "gone", id="nothing"),
        pytest.param(b"\x00\x00\x00\x02\x01\x80", "malformed", id="an empty hello"),
        pytest.param(b"\xff" * 2000, "malformed", id="an oversized frame"),
    ],
)
async def test_a_stranger_is_counted_by_what_it_did(
    data: bytes, reason: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(echo) as pair:
        stranger = await pair.network.connect(ADDRESS)
        await stranger.send_all(data)
        await stranger.aclose()
        await settle()
        assert pair.b.statistics().rejected == dict.fromkeys(REJECTIONS, 0) | {reason: 1}
        assert await read_all(await pair.open()) == [["request"], ["a"]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"\x00\x00\x00\x20" + b"x" * 32, "tampered", id="a frame that does not open"),
        pytest.param(b"\xff" * 8, "malformed", id="an oversized frame"),
    ],
)
async def test_a_frame_that_is_not_acceptable_breaks_the_link_and_is_counted(
    data: bytes, reason: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(Server()) as pair:
        stream = await pair.open()
        await stream.receive()
        await pair.network.ends[-1][0].send_all(data)
        with pytest.raises(PeerUnavailable):
            await stream.receive()
        assert pair.b.statistics().rejected[reason] == 1
        assert pair.b.statistics().broken_links == 1


async def test_something_else_at_the_address_is_unavailable(autojump_clock: trio.testing.MockClock) -> None:
    async with running(echo) as pair:
        other = Address("10.0.0.3", 80)
        listener = pair.network.listen(other)

        async def answer() -> None:
            await (await listener.accept()).send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        pair.nursery.start_soon(answer)
        with pytest.raises(PeerUnavailable, match="does not speak"):
            await pair.a.check_seed(other)


async def test_serving_that_fails_while_it_is_cancelled_does_not_break_the_node(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail_late(stream: IncomingStream) -> None:
        async def fail() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while cleaning up")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            nursery.start_soon(trio.sleep_forever)
            await stream.send("started")

    async with running(fail_late) as pair:
        for how in ("cancelled", "died"):
            stream = await pair.open()
            assert await stream.receive() == "started"
            if how == "cancelled":
                await stream.aclose()
            else:
                pair.network.ends[-1][0].die()
            await settle()
        assert pair.b.statistics().streams == pair.b.statistics().links == 0
    assert sum(record.levelno == logging.ERROR for record in caplog.records) == 2


async def test_the_limits_of_a_refusal_are_the_servers_error() -> None:
    for code in ("", "x" * 65):
        with pytest.raises(ValueError, match="64"):
            StreamRefused(code, "message")


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_no_stream_is_left_and_no_event_is_out_of_order(
    seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    """Openers that read to the end, stop in the middle or only close, while links die and hang under them."""
    rng = random.Random(seed)
    serving = 0
    outcomes: list[str] = []

    async def count(stream: IncomingStream) -> None:
        nonlocal serving
        serving += 1
        try:
            for number in range(int(stream.request)):
                await stream.send(number)
                if number % 7 == 0:
                    await trio.sleep(0.05)
        finally:
            serving -= 1

    async with running(count) as pair:

        async def ask(length: int, read_at_most: int) -> None:
            await trio.sleep(rng.uniform(0, 20))
            try:
                async with await pair.open(str(length).encode()) as stream:
                    for expected in range(min(length, read_at_most)):
                        assert await stream.receive() == expected
                    if read_at_most > length:
                        with pytest.raises(trio.EndOfChannel):
                            await stream.receive()
                        outcomes.append("complete")
                    else:
                        outcomes.append("closed")
            except PeerUnavailable:
                outcomes.append("failed")

        async def sabotage() -> None:
            for _ in range(6):
                await trio.sleep(rng.uniform(1, 4))
                if pair.network.ends:
                    end = rng.choice(pair.network.ends[-1])
                    rng.choice((end.die, end.hang, end.block))()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sabotage)
            for _ in range(200):
                nursery.start_soon(ask, rng.randrange(200), rng.choice((0, 10, 1000)))
        await trio.sleep(40)  # the longest a broken link goes unnoticed at its far end
        assert len(outcomes) == 200
        assert set(outcomes) == {"complete", "closed", "failed"}
        assert serving == 0
        assert pair.a.statistics().streams == pair.b.statistics().streams == 0
        assert await read_all(await pair.open(b"3")) == [0, 1, 2], "a new link serves as before"


# Rotation of keys.


def two_rings() -> list[Keyring]:
    return [Keyring([DEVELOPMENT_KEY, b"n" * KEY_BYTES]) for _ in range(2)]


async def test_streams_outlive_the_rotation_of_the_key_under_them(autojump_clock: trio.testing.MockClock) -> None:
    server, rings = Server(), two_rings()
    async with running(server, keyring=rings[0], keyring_b=rings[1]) as pair:
        stream = await pair.open()
        assert await stream.receive() == "started"
        for change in (lambda ring: ring.use(key_id(b"n" * KEY_BYTES)), lambda ring: ring.remove(KEYRING.primary_id)):
            for ring, forwarder in zip(rings, (pair.a, pair.b), strict=True):
                change(ring)
                forwarder.keyring_changed()
                await server.streams[0].send("during")
                assert await stream.receive() == "during"
        await trio.sleep(2 * REKEY_GRACE_S)
        await server.streams[0].send("after")
        assert await stream.receive() == "after"
        assert await read_first(pair, b"another") == "started"
        assert pair.network.dials == 1
        assert pair.a.statistics().broken_links == pair.b.statistics().broken_links == 0


async def read_first(pair: Pair, request: bytes) -> object:
    async with await pair.open(request) as stream:
        return await stream.receive()


async def test_a_link_whose_peer_keeps_to_a_removed_key_is_closed_and_no_new_one_is_taken(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server, (ring, _) = Server(), two_rings()
    async with running(server, keyring_b=ring) as pair:
        stream = await pair.open()
        assert await stream.receive() == "started"
        await settle()
        ring.use(key_id(b"n" * KEY_BYTES))
        ring.remove(KEYRING.primary_id)
        pair.b.keyring_changed()
        with pytest.raises(PeerUnavailable):
            await stream.receive()
        await settle()
        assert pair.b.statistics().links == 0
        with pytest.raises(PeerUnavailable, match="unknown key"):
            await pair.open()


async def test_a_link_that_was_being_dialled_when_the_key_changed_follows(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, rings = Server(), two_rings()
    async with running(server, keyring=rings[0], keyring_b=rings[1]) as pair:

        async def connect(address: Address) -> FakeStream:
            stream = await pair.network.connect(address)
            receive_some = stream.receive_some

            async def change_key_and_receive(max_bytes: int | None = None) -> bytes:
                rings[0].use(key_id(b"n" * KEY_BYTES))  # the hello has been sent under the former one
                return await receive_some(max_bytes)

            monkeypatch.setattr(stream, "receive_some", change_key_and_receive)
            return stream

        monkeypatch.setattr(pair.a, "_connect", connect)
        stream = await pair.open()
        assert await stream.receive() == "started"
        rings[1].use(key_id(b"n" * KEY_BYTES))
        for ring in rings:
            ring.remove(KEYRING.primary_id)
        pair.b.keyring_changed()
        await trio.sleep(2 * REKEY_GRACE_S)
        await server.streams[0].send("after")
        assert await stream.receive() == "after"
