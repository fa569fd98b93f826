"""/cluster/events and /cluster/views: who listens, what they get, and that they cost the node nothing unbounded."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import msgpack
import pytest
import trio

from mesh.errors import NoCapacity, PeerUnavailable
from mesh.view import ClusterView, MemberStatus, MemberView
from nodes.api import cluster as cluster_api
from nodes.api.cluster_events import _stream
from nodes.event_feed import LISTENERS_MAX, LISTENERS_OF_ADDRESS_MAX, EventFeed
from nodes.events import Happening
from nodes.member_views import VIEWS_S, MemberViews, disputed
from tests.unit.scripted_api import Api, ScriptedDispatch, view

JOINED = Happening("joined", "c", "ready")
LOST = Happening("failover", "b", "link", "a")


def feed() -> EventFeed:
    return EventFeed(view, wall_clock=lambda: 1_000.0)


def parsed(block: bytes) -> tuple[str, str, Any]:
    """(event, id, data) of a block; comments and `retry` have no data."""
    fields = dict(line.split(": ", 1) for line in block.decode().strip().split("\n"))
    return fields.get("event", ""), fields.get("id", ""), json.loads(fields["data"]) if "data" in fields else None


async def read(stream: AsyncGenerator[bytes, None], count: int) -> list[tuple[str, str, Any]]:
    return [parsed(await anext(stream)) for _ in range(count)]


async def test_the_recent_events_come_first_and_then_the_new_ones(autojump_clock: trio.testing.MockClock) -> None:
    events = feed()
    events.add(JOINED)
    events.add(LOST)
    stream = _stream(events, "", None)
    retry, joined, lost = await read(stream, 3)
    assert retry == ("", "", None)
    assert joined[2] == {
        "id": f"{events.boot}-1",
        "at": 1_000.0,
        "kind": "joined",
        "node_id": "c",
        "reason": "ready",
        "count": 1,
    }
    assert lost[2]["origin"] == "a"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_later, events)
        name, event_id, data = parsed(await anext(stream))
    assert (name, event_id, data["count"]) == ("cluster", f"{events.boot}-3", 2)
    await stream.aclose()


async def _later(events: EventFeed) -> None:
    await trio.sleep(3)
    events.add(JOINED)


async def test_a_client_that_comes_again_gets_what_it_missed(autojump_clock: trio.testing.MockClock) -> None:
    events = feed()
    events.add(JOINED)
    events.add(LOST)
    for last_id, expected in (
        (f"{events.boot}-1", [2]),
        ("other-1", [1, 2]),
        (f"{events.boot}-x", [1, 2]),
        ("", [1, 2]),
    ):
        stream = _stream(events, last_id, None)
        blocks = await read(stream, 1 + len(expected))
        assert [int(event_id.partition("-")[2]) for _, event_id, _ in blocks[1:]] == expected
        await stream.aclose()


async def test_silence_is_a_keep_alive_and_with_status_the_status_each_second(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stream = _stream(feed(), "", None)
    await anext(stream)
    began = trio.current_time()
    assert await anext(stream) == b": keep-alive\n\n"
    assert trio.current_time() - began == pytest.approx(5)
    await stream.aclose()
    stream = _stream(feed(), "", lambda: b'{"node_id":"a"}')
    await anext(stream)
    began = trio.current_time()
    assert await read(stream, 3) == [("status", "", {"node_id": "a"})] * 3
    assert trio.current_time() - began == pytest.approx(2)
    await stream.aclose()


async def test_the_status_comes_once_a_second_also_while_much_happens(autojump_clock: trio.testing.MockClock) -> None:
    events = feed()
    stream = _stream(events, "", lambda: b"{}")
    names = []

    async def happen() -> None:
        while True:
            await trio.sleep(0.05)
            events.add(JOINED)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(happen)
        began = trio.current_time()
        async for block in stream:
            names.append(block.split(b"\n")[0])
            if trio.current_time() - began >= 3.5:
                break
        nursery.cancel_scope.cancel()
    assert names.count(b"event: status") == 4
    assert names.count(b"event: cluster") > 20
    await stream.aclose()


async def test_a_flood_reaches_a_listener_as_one_event(autojump_clock: trio.testing.MockClock) -> None:
    events = feed()
    stream = _stream(events, "", None)
    await anext(stream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_flood, events)
        _, _, data = parsed(await anext(stream))
    assert data["count"] == 500
    await stream.aclose()


async def _flood(events: EventFeed) -> None:
    for _ in range(500):
        events.add(LOST)


async def test_the_end_of_the_node_ends_every_listener(autojump_clock: trio.testing.MockClock) -> None:
    events = feed()
    stream = _stream(events, "", None)
    await anext(stream)

    async def close() -> None:
        await trio.sleep(1)
        events.close()

    with trio.fail_after(4):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            assert [block async for block in stream] == []
    with pytest.raises(NoCapacity):
        events.listen("")


async def test_listeners_are_bounded_and_a_place_is_free_again_when_one_has_left() -> None:
    api = Api(ScriptedDispatch())
    listeners = [api.events.listen("") for _ in range(LISTENERS_MAX)]
    refused = await api.client.get("/cluster/events")
    assert refused.status_code == 503
    assert "the limit is 64" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"] == "10"
    await listeners[0].aclose()
    await listeners[0].aclose()  # twice is once
    assert api.events.listeners == LISTENERS_MAX - 1
    api.events.listen("")
    with pytest.raises(NoCapacity):
        api.events.listen("")


async def test_listeners_of_one_address_are_bounded_by_themselves() -> None:
    events = feed()
    for addresses in (["192.0.2.1"] * 8, [f"2001:db8::{index:x}" for index in range(8)]):
        listeners = [events.listen(address) for address in addresses]
        with pytest.raises(NoCapacity, match="of this address"):
            events.listen(addresses[0].replace("::0", "::99"))
        await listeners[0].aclose()
        events.listen(addresses[0])
    events.listen("2001:db8:0:1::1")
    for _ in range(LISTENERS_OF_ADDRESS_MAX + 1):
        events.listen("127.0.0.1")
    assert events.listeners == 2 * 8 + 1 + LISTENERS_OF_ADDRESS_MAX + 1


async def test_a_client_that_leaves_frees_its_place() -> None:
    api = Api(ScriptedDispatch())
    sent: list[Any] = []
    left = trio.Event()

    async def receive() -> Any:
        if not sent:
            await trio.sleep(0)
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body"):
            assert api.events.listeners == 1
            left.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/cluster/events",
        "raw_path": b"/cluster/events",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
    with trio.fail_after(5):
        await api.app(scope, receive, send)
    assert sent[0]["status"] == 200
    assert (b"content-type", b"text/event-stream; charset=utf-8") in sent[0]["headers"]
    assert api.events.listeners == 0


async def test_the_view_is_looked_at_when_gossip_says_so_and_each_second(
    autojump_clock: trio.testing.MockClock,
) -> None:
    looks = 0

    def looked_at() -> ClusterView:
        nonlocal looks
        looks += 1
        return view()

    events = EventFeed(looked_at)
    for _ in range(30):
        events.step()
        await trio.sleep(0.1)
    assert looks == 3
    events.view_changed()
    events.step()
    assert looks == 4


def member(status: MemberStatus, node_id: str = "b") -> MemberView:
    return replace(view(a="f").members["a"], node_id=node_id, status=status, is_self=False)


def cluster(*others: MemberView) -> ClusterView:
    members = {one.node_id: one for one in (view(a="f").members["a"], *others)}
    return ClusterView("a", 0.0, MappingProxyType(members))


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({"a": {"a": "alive", "b": "alive"}, "b": {"a": "alive", "b": "alive"}}, ()),
        ({"a": {"a": "alive", "b": "dead"}, "b": {"a": "alive", "b": "alive"}}, ("b",)),
        ({"a": {"a": "alive", "c": "dead"}, "b": {"a": "alive", "c": "left"}}, ()),
        ({"a": {"a": "alive", "c": "dead"}, "b": {"a": "alive"}}, ()),
        ({"a": {"a": "alive", "c": "alive"}, "b": {"a": "alive"}}, ("c",)),
        ({"a": {"a": "alive", "c": "alive"}, "b": {"a": "alive", "c": "suspect"}}, ("c",)),
    ],
)
def test_members_of_which_observers_believe_different_things_are_disputed(
    statuses: dict[str, dict[str, str]], expected: tuple[str, ...]
) -> None:
    assert disputed(statuses) == expected


async def test_live_members_are_asked_and_silent_ones_named(autojump_clock: trio.testing.MockClock) -> None:
    asked: list[str] = []

    async def ask(peer: MemberView, question: bytes) -> bytes:
        asked.append(peer.node_id)
        if peer.node_id == "c":
            raise PeerUnavailable("gone")
        if peer.node_id == "d":
            await trio.sleep_forever()
        if peer.node_id == "e":
            return b"\xc1 no msgpack"
        return msgpack.packb({"a": "alive", "b": "alive", "c": "dead", "d": "alive", "e": "alive"})  # type: ignore[no-any-return]

    others = [member(MemberStatus.ALIVE, name) for name in "bcde"] + [member(MemberStatus.DEAD, "f")]
    views = MemberViews(lambda: cluster(*others), ask)
    told = await views.views()
    assert sorted(asked) == ["b", "c", "d", "e"]
    assert (set(told.statuses), told.silent, told.disputed) == ({"a", "b"}, ("c", "d", "e"), ("c",))
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(views.views)
    assert len(asked) == 4  # what is recent is not asked again, however many look
    await trio.sleep(VIEWS_S)
    await views.views()
    assert len(asked) == 8


async def test_what_a_node_answers_a_peer_can_read() -> None:
    views = MemberViews(lambda: cluster(member(MemberStatus.SUSPECT)), None)  # type: ignore[arg-type]
    assert msgpack.unpackb(await views.answer(b"")) == {"a": "alive", "b": "suspect"}


async def test_the_status_is_made_once_however_many_ask_at_the_same_time(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    real = cluster_api._cluster_status

    def counted(*arguments: Any) -> dict[str, Any]:
        nonlocal made
        made += 1
        return real(*arguments)

    monkeypatch.setattr(cluster_api, "_cluster_status", counted)
    services = SimpleNamespace(view=view, node_id="a", cluster_name="test", version="0.1", nodes_expected=None)
    status = cluster_api.status_source(services)  # type: ignore[arg-type]
    for _ in range(5):
        assert json.loads(status())["members"][0]["reason"] == ""
    assert made == 1
    await trio.sleep(cluster_api.STATUS_REUSE_S)
    status()
    assert made == 2
