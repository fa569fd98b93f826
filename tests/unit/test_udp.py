"""The UDP loop on real loopback sockets, with a clock that can be set forward: what arrives, is logged, is survived."""

from __future__ import annotations

import logging
import random
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import pytest
import trio
import trio.testing

from mesh.errors import PeerUnavailable
from mesh.gossip import Gossip, GossipConfig, MemberChanged
from mesh.seal import DEVELOPMENT_KEY, Keyring
from mesh.udp import GossipSocket, address_of, bind
from mesh.view import Address, MemberStatus, ModelInfo, NodeLoad, NodeProfile, Readiness
from mesh.wire import DATAGRAM_BYTES_MAX

DEADLINE_S = 20.0  # far beyond what loopback takes; only a hang reaches it


class Node:
    """A Gossip on a socket of its own, and what it told."""

    def __init__(self, name: str, bound: socket.socket, seeds: tuple[Address, ...] = ()) -> None:
        self.skipped_s = 0.0
        self.bound = bound
        self.pinged: list[str] = []
        self.link_error: Exception | None = None
        self._send, self.changes = trio.open_memory_channel[MemberChanged](100)
        boot_id, rng = secrets.token_bytes(16), random.Random(name)
        self.gossip = Gossip(
            GossipConfig(), name, 1, address_of(bound), seeds, Keyring([DEVELOPMENT_KEY]), boot_id, rng, self.clock()
        )
        self.socket = GossipSocket(
            self.gossip,
            bound,
            ping_link=self.ping_link,
            ask_link=self.ask_link,
            on_change=self._send.send_nowait,
            clock=self.clock,
        )

    async def ping_link(self, node_id: str, address: Address) -> None:
        self.pinged.append(node_id)
        if self.link_error is not None:
            raise self.link_error

    async def ask_link(self, node_id: str, address: Address, question: bytes) -> bytes:
        raise PeerUnavailable("these nodes have no links")

    def clock(self) -> float:
        return trio.current_time() + self.skipped_s

    def advance(self, duration_s: float) -> None:
        """Set this node's clock forward, by less than would be a stall; timers in between are due at once."""
        self.skipped_s += duration_s
        self.socket.wake()

    def status(self, name: str) -> MemberStatus | None:
        member = self.gossip.view(self.clock()).members.get(name)
        return None if member is None else member.status


@contextmanager
def sockets(count: int) -> Iterator[list[socket.socket]]:
    bound = [bind("127.0.0.1", 0) for _ in range(count)]
    try:
        yield bound
    finally:
        for one in bound:
            one.close()


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            for node in nodes:
                await nursery.start(node.socket.run)
            yield
            nursery.cancel_scope.cancel()


async def step_until_suspect(node: Node) -> None:
    """Let the clock run in tenths of a second until a member is suspected."""
    while True:
        node.advance(0.1)
        await trio.testing.wait_all_tasks_blocked()
        with suppress(trio.WouldBlock):
            if node.changes.receive_nowait().after.status is MemberStatus.SUSPECT:
                return


async def test_two_nodes_join_over_loopback(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mesh.udp")
    with sockets(2) as (one, two):
        a, b = Node("a", one), Node("b", two, (address_of(one),))
        async with running(a, b):
            change = await a.changes.receive()
            assert (change.before, change.after.node_id, change.after.address) == (None, "b", address_of(two))
            await b.changes.receive()
        joined = [record.__dict__ for record in caplog.records if record.message == "a member joined"]
        assert ("b", str(address_of(two))) in [(record["peer"], record["address"]) for record in joined]


async def test_news_published_from_outside_leave_without_waiting_for_a_timer() -> None:
    with sockets(2) as (one, two):
        a, b = Node("a", one), Node("b", two, (address_of(one),))
        async with running(a, b):
            await a.changes.receive()
            b.skipped_s += 0.1  # past the spacing of urgent news
            b.socket.set_load(NodeLoad(Readiness.READY))
            change = await a.changes.receive()
            assert change.after.load.readiness is Readiness.READY
            b.skipped_s += 0.1
            b.socket.set_profile(NodeProfile(models=(ModelInfo("demo", "ab", 64, 1),)))
            while not change.after.profile.models:
                change = await a.changes.receive()


async def test_a_farewell_is_logged_where_it_arrives(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mesh.udp")
    with sockets(2) as (one, two):
        a, b = Node("a", one), Node("b", two, (address_of(one),))
        async with running(a, b):
            await a.changes.receive()
            await b.changes.receive()
            b.socket.leave()
            change = await a.changes.receive()
            assert change.after.status is MemberStatus.LEFT
    assert "a member left" in caplog.messages


async def test_garbage_is_counted_by_its_reason_and_the_loop_goes_on() -> None:
    with sockets(2) as (one, two):
        a, b = Node("a", one), Node("b", two, (address_of(one),))
        target = (address_of(one).host, address_of(one).port)
        for garbage in (b"", b"x", bytes(DATAGRAM_BYTES_MAX), bytes(DATAGRAM_BYTES_MAX + 1), bytes(9_000)):
            two.sendto(garbage, target)
        async with running(a, b):
            await a.changes.receive()
            assert dict(a.gossip.statistics().rejects) == {"truncated": 2, "seal version": 1, "oversized": 2}
            assert a.socket.statistics().datagrams_received >= 6


async def test_a_seed_given_by_name_is_looked_up() -> None:
    with sockets(2) as (one, two):
        a, b = Node("a", one), Node("b", two, (Address("localhost", address_of(one).port),))
        async with running(a, b):
            await a.changes.receive()
            await b.changes.receive()
    assert b.socket.statistics().send_errors == 0


async def test_an_unreachable_seed_is_called_again_and_once_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mesh.udp")
    with sockets(2) as (one, silent):
        a = Node("a", one, (address_of(silent),))
        async with running(a):
            for _ in range(200):
                a.advance(0.1)
                await trio.testing.wait_all_tasks_blocked()
        lines = [record for record in caplog.records if getattr(record, "address", "") == str(address_of(silent))]
        assert [record.levelname for record in lines].count("WARNING") == 1
        assert {record.levelname for record in lines[:3]} == {"INFO"}  # nodes that start together
        assert a.gossip.statistics().packets_sent["join"] >= 6


async def test_what_the_kernel_refuses_to_send_is_counted_and_survived() -> None:
    with sockets(1) as (one,):
        a = Node("a", one, (Address("::1", 9),))
        async with running(a):
            await trio.testing.wait_all_tasks_blocked()
            assert a.socket.statistics().send_errors == 1


@pytest.mark.parametrize("answers", [True, False], ids=["link answers", "link fails"])
async def test_a_silent_member_is_pinged_over_its_link(answers: bool, caplog: pytest.LogCaptureFixture) -> None:
    with sockets(2) as (one, two):
        a, b = Node("a", one), Node("b", two, (address_of(one),))
        if not answers:
            a.link_error = PeerUnavailable("b does not answer")
        async with running(a):
            async with running(b):
                await a.changes.receive()
                await b.changes.receive()
            if answers:
                for _ in range(40):
                    a.advance(0.1)
                    await trio.testing.wait_all_tasks_blocked()
                assert a.status("b") is MemberStatus.ALIVE
            else:
                await step_until_suspect(a)
                assert any(m.startswith("a member is suspect") for m in caplog.messages)
        assert "b" in a.pinged


async def test_a_failed_forward_has_its_member_probed_at_once() -> None:
    with sockets(2) as (one, two):
        a, b = Node("a", one), Node("b", two, (address_of(one),))
        async with running(a, b):
            await a.changes.receive()
            before = a.gossip.statistics().probes
            a.socket.link_failed("b")
            while a.gossip.statistics().probes == before:
                await trio.testing.wait_all_tasks_blocked()


async def test_cancelling_leaves_the_socket_to_the_caller() -> None:
    with sockets(1) as (one,):
        async with running(Node("a", one)):
            pass
        assert one.getsockname()[1] != 0


def test_a_port_in_use_is_refused() -> None:
    with sockets(1) as (one,), pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", address_of(one).port)
