"""Operations on a whole mesh whose peers are scripted: who is asked, in which order, what is told, what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import MappingProxyType

import pytest
import trio
import trio.testing

from mesh.errors import HandshakeRefused, NoCapacity, PeerUnavailable
from mesh.seal import DEVELOPMENT_KEY, Keyring, key_id
from mesh.view import Address, ClusterView, MemberStatus, MemberView, ModelInfo, NodeLoad, NodeProfile, Readiness
from nodes.mesh_operations import (
    EVERYONE,
    LINES_MAX,
    NODE_TIMEOUT_S,
    NODES_AT_ONCE_MAX,
    OPERATIONS_MAX,
    Line,
    MeshOperations,
    Operation,
)
from nodes.node_operations import FORGET_WAIT_S, NodeOperations
from nodes.peer_operations import Answer, Arguments, OperationFailed

OLD, NEW = bytes(32), b"n" * 32
OLD_ID, NEW_ID = key_id(OLD), key_id(NEW)
ADDRESS = Address("10.0.0.9", 7946)


def member(name: str, status: MemberStatus = MemberStatus.ALIVE, generation: int = 1) -> MemberView:
    return MemberView(
        name, Address("10.0.0.1", 7946), status, generation, 7, NodeLoad(), NodeProfile(), 0.4, is_self=name == "a"
    )


def serving(name: str, *models: str) -> MemberView:
    infos = tuple(ModelInfo(model, "f", 1024, slots=8) for model in models)
    return replace(member(name), load=NodeLoad(readiness=Readiness.READY), profile=NodeProfile("", "", infos))


class KeyringInMemory:
    """A KeyringKeeper without a file, and so without threads, which would let a clock jump."""

    def __init__(self, ring: Keyring) -> None:
        self.ring = ring

    async def install(self, key: bytes) -> None:
        self.ring.install(key)

    async def use(self, identity: bytes) -> None:
        self.ring.use(identity)

    async def remove(self, identity: bytes) -> None:
        self.ring.remove(identity)


class FakeMesh:
    """The node `a` as it is, and peers that are NodeOperations without a link. broken: peers and how they fail."""

    def __init__(self, *names: str) -> None:
        self.members = {name: member(name) for name in ("a", *names)}
        self.asked: list[tuple[str, str]] = []
        self.seeds: list[Address] = []
        self.forgotten: list[str] = []
        self.stopped: list[str] = []
        self.draining: list[str] = []
        self.running = 0
        self.broken: dict[str, Callable[[], None]] = {}
        self.seed_answer: str | Exception = "b"
        self.asking = self.asking_most = 0
        self.pause_s = 0.0
        self.rings = {name: Keyring([OLD]) for name in self.members}
        self.nodes = {name: self._node(name) for name in self.members}
        self.operations = MeshOperations(
            view=self.view,
            local=self.nodes["a"].handlers,
            ask=self._ask,
            check_seed=self._check_seed,
            add_seed=self.seeds.append,
        )

    def view(self) -> ClusterView:
        return ClusterView("a", 0.0, MappingProxyType(dict(self.members)))

    def _node(self, name: str) -> NodeOperations:
        return NodeOperations(
            keyring=KeyringInMemory(self.rings[name]),
            view=self.view,
            keyring_changed=lambda: None,
            forget=self._forget,
            stop=lambda: self.stopped.append(name),
            begin_drain=lambda: self._begin_drain(name),
            undo_drain=lambda: self._undo_drain(name),
            running=lambda: self.running,
        )

    def _begin_drain(self, name: str) -> None:
        if name not in self.draining:
            self.draining.append(name)

    def _undo_drain(self, name: str) -> None:
        if name in self.stopped:
            raise OperationFailed("is about to end")
        if name in self.draining:
            self.draining.remove(name)

    def _forget(self, node_id: str) -> bool:
        if self.members[node_id].status is not MemberStatus.DEAD:
            return False
        self.forgotten.append(node_id)
        self.members[node_id] = member(node_id, MemberStatus.LEFT)
        return True

    async def _ask(self, peer: MemberView, name: str, arguments: Arguments) -> Answer:
        self.asked.append((peer.node_id, name))
        self.asking += 1
        self.asking_most = max(self.asking_most, self.asking)
        try:
            await trio.sleep(self.pause_s)
            if peer.node_id in self.broken:
                self.broken[peer.node_id]()
                await trio.sleep_forever()
            return await self.nodes[peer.node_id].handlers[name](arguments)
        finally:
            self.asking -= 1

    async def _check_seed(self, address: Address) -> str:
        await trio.lowlevel.checkpoint()
        if isinstance(self.seed_answer, Exception):
            raise self.seed_answer
        return self.seed_answer

    async def lines(self, operation: Operation) -> list[Line]:
        return [line async for line in self.operations.start(operation)]

    async def summary(self, operation: Operation) -> Line:
        return (await self.lines(operation))[-1]

    def fail(self, name: str, message: str) -> None:
        def raise_it() -> None:
            raise OperationFailed(message)

        self.broken[name] = raise_it

    def hang(self, name: str) -> None:
        self.broken[name] = lambda: None


@asynccontextmanager
async def running(mesh: FakeMesh) -> AsyncIterator[FakeMesh]:
    async with trio.open_nursery() as nursery:
        await nursery.start(mesh.operations.run)
        yield mesh
        nursery.cancel_scope.cancel()


def install(mesh: FakeMesh) -> Operation:
    return mesh.operations.install(NEW, is_here_only=False)


def use(mesh: FakeMesh, identity: bytes = NEW_ID, *, is_forced: bool = False, is_here_only: bool = False) -> Operation:
    return mesh.operations.use(identity, is_forced=is_forced, is_here_only=is_here_only)


def remove(mesh: FakeMesh, *, is_forced: bool = False) -> Operation:
    return mesh.operations.remove(OLD_ID, is_forced=is_forced, is_here_only=False)


async def test_a_rotation_reaches_every_live_member_and_the_asked_node_last() -> None:
    async with running(FakeMesh("b", "c")) as mesh:
        for operation in (install(mesh), use(mesh), remove(mesh)):
            *lines, summary = await mesh.lines(operation)
            assert {line["node"] for line in lines} == {"a", "b", "c"}
            assert all(line["ok"] for line in lines)
            assert lines[-1]["node"] == "a"
            assert summary["done"]
        assert {name: ring.keys for name, ring in mesh.rings.items()} == dict.fromkeys("abc", (NEW,))


async def test_use_is_refused_at_all_nodes_while_one_lacks_the_key() -> None:
    async with running(FakeMesh("b", "c")) as mesh:
        mesh.rings["a"].install(NEW)
        mesh.rings["b"].install(NEW)
        lines = await mesh.lines(use(mesh))
        assert [(line["node"], line["error"]) for line in lines[:-1]] == [
            ("c", f"key {NEW_ID.hex()} is not installed there; run keyring install again")
        ]
        assert not lines[-1]["done"]
        assert "--force" in str(lines[-1]["message"])
        assert {ring.primary_id for ring in mesh.rings.values()} == {OLD_ID}
        *_, summary = await mesh.lines(use(mesh, is_forced=True))
        assert summary["summary"] == {"ok": 2, "failed": 1, "skipped": 0}, "force does not make c use what it lacks"
        assert [ring.primary_id for ring in mesh.rings.values()] == [NEW_ID, NEW_ID, OLD_ID]


async def test_remove_is_refused_at_all_nodes_while_one_seals_with_the_key() -> None:
    async with running(FakeMesh("b", "c")) as mesh:
        await mesh.lines(install(mesh))
        mesh.rings["a"].use(NEW_ID)
        mesh.rings["c"].use(NEW_ID)
        lines = await mesh.lines(remove(mesh))
        assert [line["node"] for line in lines[:-1]] == ["b"]
        assert "still seals with" in str(lines[0]["error"])
        assert all(OLD_ID in ring for ring in mesh.rings.values())
        await mesh.lines(remove(mesh, is_forced=True))
        assert [OLD_ID in ring for ring in mesh.rings.values()] == [False, True, False]


async def test_force_is_offered_only_where_some_node_could_do_it() -> None:
    async with running(FakeMesh("b")) as mesh:
        unknown = str((await mesh.summary(use(mesh)))["message"])
        assert unknown.startswith(f"key {NEW_ID.hex()} is used nowhere anew; no node that answered has it")
        everywhere = str((await mesh.summary(remove(mesh)))["message"])
        assert everywhere.startswith(f"key {OLD_ID.hex()} was removed nowhere; no node that answered could do without")
        assert "--force" not in unknown + everywhere
        mesh.rings["a"].install(NEW)
        assert "--force uses it at those nodes that have it" in str((await mesh.summary(use(mesh)))["message"])
        mesh.rings["a"].use(NEW_ID)
        assert "--force removes it at those nodes" in str((await mesh.summary(remove(mesh)))["message"])


async def test_use_and_remove_are_refused_while_a_member_gives_no_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(FakeMesh("b")) as mesh:
        await mesh.lines(install(mesh))
        mesh.hang("b")
        for operation in (use(mesh), remove(mesh)):
            *lines, summary = await mesh.lines(operation)
            assert any("no answer" in str(line.get("error")) for line in lines)
            assert not summary["done"]
        assert mesh.rings["a"].key_ids == (OLD_ID, NEW_ID)


async def test_a_node_that_fails_or_hangs_is_named_and_the_command_repeated(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(FakeMesh("b", "c", "d")) as mesh:
        mesh.fail("b", "the disk is full")
        mesh.hang("c")
        started = trio.current_time()
        *lines, summary = await mesh.lines(install(mesh))
        assert trio.current_time() - started == NODE_TIMEOUT_S
        errors = {line["node"]: line["error"] for line in lines if not line["ok"]}
        assert errors == {"b": "the disk is full", "c": f"gave no answer within {NODE_TIMEOUT_S:g} s"}
        assert summary["summary"] == {"ok": 2, "failed": 2, "skipped": 0}
        assert summary["message"] == "2 of 4 nodes failed; the command can be repeated"
        mesh.broken.clear()
        assert (await mesh.summary(install(mesh)))["done"]
        assert all(NEW_ID in ring for ring in mesh.rings.values())


async def test_the_dead_are_named_and_not_asked_and_those_who_left_are_mentioned() -> None:
    async with running(FakeMesh("b", "c", "d")) as mesh:
        mesh.members["b"] = member("b", MemberStatus.DEAD)
        mesh.members["c"] = member("c", MemberStatus.LEFT)
        mesh.members["d"] = member("d", MemberStatus.SUSPECT)
        *lines, summary = await mesh.lines(install(mesh))
        assert {"node": "b", "skipped": "is dead and was not asked"} in lines
        assert [name for name, _ in mesh.asked] == ["d"]
        assert "(c has left and was not asked)" in str(summary["message"])
        assert str(summary["message"]).endswith(f"ai-cluster keyring use {NEW_ID.hex()}")
        assert (await mesh.summary(use(mesh)))["done"]


async def test_here_changes_the_asked_node_alone() -> None:
    async with running(FakeMesh("b")) as mesh:
        await mesh.lines(mesh.operations.install(NEW, is_here_only=True))
        assert [NEW_ID in ring for ring in mesh.rings.values()] == [True, False]
        assert not (await mesh.summary(use(mesh, is_here_only=True)))["done"], "b could not read this node"


async def test_the_public_development_key_is_not_installed() -> None:
    async with running(FakeMesh()) as mesh:
        lines = await mesh.lines(mesh.operations.install(DEVELOPMENT_KEY, is_here_only=False))
        assert "public" in str(lines[0]["error"])


async def test_nodes_asked_at_once_are_bounded(autojump_clock: trio.testing.MockClock) -> None:
    async with running(FakeMesh(*(f"n{i}" for i in range(NODES_AT_ONCE_MAX + 20)))) as mesh:
        mesh.pause_s = 1.0
        summary = await mesh.summary(mesh.operations.list_keys)
        assert (mesh.asking_most, summary["done"]) == (NODES_AT_ONCE_MAX, True)


async def test_operations_at_once_are_bounded(autojump_clock: trio.testing.MockClock) -> None:
    async with running(FakeMesh("b")) as mesh:
        mesh.hang("b")
        channels = [mesh.operations.start(mesh.operations.list_keys) for _ in range(OPERATIONS_MAX)]
        with pytest.raises(NoCapacity, match=f"limit is {OPERATIONS_MAX}"):
            mesh.operations.start(mesh.operations.list_keys)
        for channel in channels:
            assert [line async for line in channel][-1]["summary"] == {"ok": 1, "failed": 1, "skipped": 0}
        mesh.operations.start(mesh.operations.list_keys).close()


async def test_whoever_closes_the_channel_asks_no_further_nodes(autojump_clock: trio.testing.MockClock) -> None:
    count = 4 * LINES_MAX
    async with running(FakeMesh(*(f"n{i}" for i in range(count)))) as mesh:
        mesh.pause_s = 1.0
        channel = mesh.operations.start(mesh.operations.list_keys)
        await channel.receive()
        channel.close()
        await trio.sleep(count)
        assert len(mesh.asked) < count / 2
        assert mesh.operations._running == 0


async def test_a_fault_of_an_operation_is_logged_and_ends_it_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(report: object) -> None:
        raise KeyError("ours")

    async with running(FakeMesh()) as mesh:
        assert await mesh.lines(fail) == []
        await trio.testing.wait_all_tasks_blocked()
        assert "an operation failed" in caplog.text
        assert (await mesh.summary(mesh.operations.list_keys))["done"]


async def test_what_members_believe_is_asked_of_one_or_of_everyone() -> None:
    async with running(FakeMesh("b", "c")) as mesh:
        assert [line.get("node") for line in await mesh.lines(mesh.operations.members(None))] == ["a", None]
        assert [line.get("node") for line in await mesh.lines(mesh.operations.members("b"))] == ["b", None]
        lines = await mesh.lines(mesh.operations.members(EVERYONE))
        assert {line["node"] for line in lines[:-1]} == {"a", "b", "c"}
        beliefs = lines[0]["members"]
        assert isinstance(beliefs, list)
        assert (beliefs[1]["node_id"], beliefs[1]["membership"], beliefs[1]["age_s"]) == ("b", "alive", 0.4)
        with pytest.raises(OperationFailed, match="no member is named 'x'"):
            mesh.operations.members("x")


async def test_a_dead_member_is_forgotten_at_every_node() -> None:
    async with running(FakeMesh("b", "c")) as mesh:
        mesh.members["c"] = member("c", MemberStatus.DEAD)
        for _ in range(2):  # it can be repeated
            *lines, summary = await mesh.lines(mesh.operations.forget("c"))
            assert [line["node"] for line in lines] == ["b", "a"]
            assert (summary["done"], summary["message"]) == (True, "c is forgotten")
        assert mesh.forgotten == ["c"]


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("b", MemberStatus.ALIVE, r"b is alive, heard of 0\.4 s ago; stop it first"),
        ("b", MemberStatus.SUSPECT, r"b is suspect, .*; wait until it is found dead"),
        ("x", MemberStatus.DEAD, "no member is named 'x'"),
        ("a", MemberStatus.ALIVE, "a is alive"),
    ],
)
def test_who_is_not_dead_is_not_forgotten(name: str, status: MemberStatus, message: str) -> None:
    mesh = FakeMesh("b")
    mesh.members["b"] = member("b", status)
    with pytest.raises(OperationFailed, match=message):
        mesh.operations.forget(name)


async def test_a_node_that_holds_a_member_for_alive_forgets_it_as_soon_as_it_hears_better(
    autojump_clock: trio.testing.MockClock,
) -> None:
    mesh = FakeMesh("b")
    handler = mesh.nodes["a"].handlers["forget"]
    with pytest.raises(OperationFailed, match=r"holds b for alive, heard of 0\.4 s ago"):
        await handler({"node_id": "b"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(handler, {"node_id": "b"})
        await trio.sleep(FORGET_WAIT_S / 2)
        mesh.members["b"] = member("b", MemberStatus.DEAD)
    assert mesh.forgotten == ["b"]


async def test_the_node_asked_leaves_after_it_has_said_so() -> None:
    async with running(FakeMesh("b")) as mesh:
        channel = mesh.operations.start(mesh.operations.leave(None))
        assert (await channel.receive())["node"] == "a"
        assert [line async for line in channel][-1]["done"]
        assert mesh.stopped == ["a"]


async def test_another_node_is_told_to_leave_and_awaited(autojump_clock: trio.testing.MockClock) -> None:
    async with running(FakeMesh("b", "c")) as mesh:
        channel = mesh.operations.start(mesh.operations.leave("b"))
        await trio.sleep(10)
        assert mesh.stopped == ["b"]
        mesh.members["b"] = member("b", MemberStatus.LEFT)
        assert await channel.receive() == {"node": "b", "ok": True, "state": "has left"}
        lines = await mesh.lines(mesh.operations.leave("b"))
        assert lines[0] == {"node": "b", "skipped": "is left already"}
        lines = await mesh.lines(mesh.operations.leave("c"))
        assert "still finishes its streams" in str(lines[0]["state"])
        assert mesh.stopped == ["b", "c"]


@pytest.mark.parametrize("name", ["a", "b"])
async def test_a_node_is_drained_until_nothing_runs_there_and_taken_back(
    name: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(FakeMesh("b")) as mesh:
        mesh.running = 2
        channel = mesh.operations.start(mesh.operations.drain(name if name != "a" else None, is_undone=False))
        await trio.sleep(10)
        assert mesh.draining == [name]
        mesh.running = 0
        told = [line async for line in channel]
        assert told[0] == {"node": name, "ok": True, "state": "takes no requests, and none runs"}
        assert f"{name} goes on as a member and an entry" in str(told[1]["message"])
        assert f"it comes back with: ai-cluster drain --undo {name}, or a restart" in str(told[1]["message"])
        assert trio.current_time() < 11
        for _ in range(2):  # it can be repeated
            told = await mesh.lines(mesh.operations.drain(name, is_undone=True))
            assert told[0] == {"node": name, "ok": True, "state": "takes requests again"}
            assert (told[1]["done"], told[1]["message"]) == (True, "")
        assert mesh.draining == []


async def test_the_last_node_that_serves_a_model_is_drained_with_a_warning(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(FakeMesh("b", "c")) as mesh:
        mesh.members["a"] = serving("a", "x")
        mesh.members["b"] = serving("b", "x", "y", "z")
        mesh.members["c"] = replace(serving("c", "y"), load=NodeLoad(readiness=Readiness.DRAINING))
        warned, drained, summary = await mesh.lines(mesh.operations.drain("b", is_undone=False))
        assert (warned["node"], "last node ready to serve y, z:" in str(warned["warning"])) == ("b", True)
        assert (drained["ok"], summary["done"], mesh.draining) == (True, True, ["b"])
        lines = await mesh.lines(mesh.operations.drain("a", is_undone=False))
        assert all("warning" not in line for line in lines)  # b serves x
        lines = await mesh.lines(mesh.operations.drain("c", is_undone=False))
        assert all("warning" not in line for line in lines)  # it served nothing before


async def test_a_drain_that_takes_long_is_not_waited_for_to_the_end(autojump_clock: trio.testing.MockClock) -> None:
    async with running(FakeMesh("b")) as mesh:
        mesh.running = 3
        told = await mesh.lines(mesh.operations.drain("b", is_undone=False))
        assert told[0]["state"] == "takes no new requests; 3 still run after 45 s"
        assert told[1]["done"]


async def test_who_cannot_be_drained_is_told(autojump_clock: trio.testing.MockClock) -> None:
    async with running(FakeMesh("b", "c")) as mesh:
        mesh.members["c"] = member("c", MemberStatus.DEAD)
        with pytest.raises(OperationFailed, match="c is dead, and takes no requests anyway"):
            mesh.operations.drain("c", is_undone=False)
        mesh.stopped.append("b")
        told = await mesh.lines(mesh.operations.drain("b", is_undone=True))
        assert told[0] == {"node": "b", "ok": False, "error": "is about to end"}
        assert not told[1]["done"]
        mesh.hang("b")
        told = await mesh.lines(mesh.operations.drain("b", is_undone=False))
        assert "gave no answer" in str(told[0]["error"])
        assert told[1]["message"] == "1 of 1 nodes failed; the command can be repeated"


async def test_a_seed_that_takes_this_node_is_called_and_awaited(autojump_clock: trio.testing.MockClock) -> None:
    async with running(FakeMesh()) as mesh:
        channel = mesh.operations.start(mesh.operations.join(ADDRESS))
        await trio.sleep(1)
        assert mesh.seeds == [ADDRESS]
        mesh.members["b"] = member("b")
        assert await channel.receive() == {"node": "a", "ok": True, "found": "b", "members": 2}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (HandshakeRefused("unknown key"), "refuses this node: unknown key; its mesh has another cluster key"),
        (HandshakeRefused("other cluster"), "another --cluster-name"),
        (HandshakeRefused("fenced"), "it is this very node, or has its name: give the mesh address of another,"),
        (HandshakeRefused("of a later version"), "its log may say more"),
        (PeerUnavailable("10.0.0.9:7946 cannot be reached"), "cannot be reached; is a node's mesh port there"),
        ("a", "is this very node"),
        ("b", "is UDP let through"),
    ],
)
async def test_a_seed_that_does_not_lead_anywhere_is_named_with_the_fix(
    answer: str | Exception, words: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(FakeMesh()) as mesh:
        mesh.seed_answer = answer
        line, summary = await mesh.lines(mesh.operations.join(ADDRESS))
        assert words in str(line["error"])
        assert not summary["done"]
        assert mesh.seeds == ([ADDRESS] if answer == "b" else [])
