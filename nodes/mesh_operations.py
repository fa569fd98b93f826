"""What an operator asks of the whole mesh through one node: every live member is asked over its peer link, and each
answer is told as it comes.

No member coordinates: the node asked sends the same operation to all, itself included, so whatever failed can be asked
again, here or at another node. What would cut members off from each other is checked at all of them before.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import trio

from mesh.errors import HandshakeRefused, NoCapacity, PeerUnavailable
from mesh.seal import key_id as id_of_key
from mesh.view import Address, ClusterView, MemberStatus, MemberView, Readiness
from nodes import node_operations as names
from nodes.peer_operations import Answer, Arguments, Handler, OperationFailed

logger = logging.getLogger(__name__)

NODES_AT_ONCE_MAX = 16  # asked at the same time
NODE_TIMEOUT_S = 5.0  # for one node's answer: a dial, and a file written durably
OPERATIONS_MAX = 16  # at once through this node
LINES_MAX = 64  # of progress not yet read; beyond it the operation waits for its reader
JOIN_WAIT_S = 15.0  # for gossip with a seed that has accepted the handshake
LEAVE_WAIT_S = 45.0  # for a member to finish its streams and say farewell; beyond it the operator looks again
DRAIN_WAIT_S = 45.0  # for a drained node to finish or move its streams; beyond it the operator looks again
POLL_S = 0.05
ABSENT_NAMED_MAX = 5

EVERYONE = "*"  # no node id: those begin with a letter or digit

# Asks one peer: PeerOperations over a Forwarder, or a fake.
Ask = Callable[[MemberView, str, Arguments], Awaitable[Answer]]
Line = Mapping[str, object]


@dataclass(slots=True)
class Report:
    """One operation's progress: a line for each node, then one summary.

    {"node", "ok": true, ...}, {"node", "ok": false, "error"}, {"node", "skipped"} or {"node", "warning"}; at the end
    {"summary": {"ok", "failed", "skipped"}, "done", "message"}, where done says that all was done as asked."""

    lines: trio.MemorySendChannel[Line]
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("ok", "failed", "skipped"), 0))

    async def ok(self, node_id: str, fields: Mapping[str, object]) -> None:
        await self._tell("ok", {**fields, "node": node_id, "ok": True})

    async def failed(self, node_id: str, error: str) -> None:
        await self._tell("failed", {"node": node_id, "ok": False, "error": error})

    async def warn(self, node_id: str, warning: str) -> None:
        """What is done all the same."""
        await self.lines.send({"node": node_id, "warning": warning})

    async def skipped(self, node_id: str, reason: str) -> None:
        await self._tell("skipped", {"node": node_id, "skipped": reason})

    async def end(self, message: str, *, is_done: bool) -> None:
        await self.lines.send({"summary": dict(self.counts), "done": is_done, "message": message})

    async def _tell(self, count: str, line: Line) -> None:
        self.counts[count] += 1
        await self.lines.send(line)


Operation = Callable[[Report], Awaitable[None]]


class MeshOperations:
    """The operations of one node; run() owns their tasks.

    local: what this node itself does when asked. check_seed: Forwarder.check_seed. add_seed: Gossip.add_seed."""

    def __init__(
        self,
        *,
        view: Callable[[], ClusterView],
        local: Mapping[str, Handler],
        ask: Ask,
        check_seed: Callable[[Address], Awaitable[str]],
        add_seed: Callable[[Address], None],
    ) -> None:
        self._view = view
        self._local = local
        self._ask = ask
        self._check_seed = check_seed
        self._add_seed = add_seed
        self._nursery: trio.Nursery | None = None
        self._running = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; operations under way end then, without a summary."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def start(self, operation: Operation) -> trio.MemoryReceiveChannel[Line]:
        """Begin one of the operations below. Closing the channel asks no further nodes.

        Raises NoCapacity at OPERATIONS_MAX."""
        if self._nursery is None or self._running >= OPERATIONS_MAX:
            raise NoCapacity(f"{self._running} operations run through this node, the limit is {OPERATIONS_MAX}", 1.0)
        sender, receiver = trio.open_memory_channel[Line](LINES_MAX)
        self._running += 1
        self._nursery.start_soon(self._run_one, operation, Report(sender))
        return receiver

    async def _run_one(self, operation: Operation, report: Report) -> None:
        try:
            async with report.lines:
                await operation(report)
        except* trio.BrokenResourceError:
            logger.info("an operation ended before its time: whoever asked for it has left")
        except* Exception as group:  # a fault of ours must not end the node; the reader misses the summary
            logger.error("an operation failed", exc_info=group)
        finally:
            self._running -= 1

    # The keyring.

    async def list_keys(self, report: Report) -> None:
        """Which keys each node holds, and which one it seals with."""
        await self._everywhere(report, names.KEYRING_LIST, {})
        await self._end(report, "every live member answered")

    def install(self, key: bytes, *, is_here_only: bool) -> Operation:
        """Every live member accepts the key; nobody seals with it yet."""
        identity = id_of_key(key).hex()

        async def operation(report: Report) -> None:
            await self._everywhere(report, names.KEYRING_INSTALL, {"key": key}, is_here_only=is_here_only)
            await self._end(
                report, f"the key is installed{self._absent()}; the next step is: ai-cluster keyring use {identity}"
            )

        return operation

    def use(self, key_id: bytes, *, is_forced: bool, is_here_only: bool) -> Operation:
        """Every live member seals with the key. Refused while one lacks it: nobody would be able to read the others."""

        holders = 0

        def fault(answer: Answer) -> str | None:
            nonlocal holders
            lacks_it = key_id.hex() not in answer["keys"]
            holders += not lacks_it
            return f"key {key_id.hex()} is not installed there; run keyring install again" if lacks_it else None

        async def operation(report: Report) -> None:
            if not is_forced and not await self._all_are_fit(report, fault):
                way = "--force uses it at those nodes that have it, and cuts them off from the others"
                if not holders:
                    way = "no node that answered has it; ai-cluster keyring list shows those there are"
                await report.end(f"key {key_id.hex()} is used nowhere anew; {way}", is_done=False)
                return
            await self._everywhere(report, names.KEYRING_USE, {"key_id": key_id}, is_here_only=is_here_only)
            await self._end(
                report, f"the key is used{self._absent()}; the next step is: ai-cluster keyring remove OLD-ID"
            )

        return operation

    def remove(self, key_id: bytes, *, is_forced: bool, is_here_only: bool) -> Operation:
        """Nobody accepts the key any more. Refused while a live member seals with it: nobody would hear that one."""

        holders = sealers = 0

        def fault(answer: Answer) -> str | None:
            nonlocal holders, sealers
            seals_with_it = answer["primary"] == key_id.hex()
            holders += key_id.hex() in answer["keys"]
            sealers += seals_with_it
            return f"still seals with key {key_id.hex()}; run keyring use with another key" if seals_with_it else None

        async def operation(report: Report) -> None:
            if not is_forced and not await self._all_are_fit(report, fault):
                way = "--force removes it at those nodes that do not seal with it, and cuts them off from the others"
                if holders == sealers:
                    way = "no node that answered could do without it; first: ai-cluster keyring use ANOTHER-ID"
                await report.end(f"key {key_id.hex()} was removed nowhere; {way}", is_done=False)
                return
            if not is_forced and not holders:
                await report.end(f"no live member has key {key_id.hex()}: nothing was removed", is_done=True)
                return
            await self._everywhere(report, names.KEYRING_REMOVE, {"key_id": key_id}, is_here_only=is_here_only)
            await self._end(
                report, f"the key is refused from now on{self._absent()}; put the new key into every cluster_key_file"
            )

        return operation

    def _absent(self) -> str:
        """Who may come back with the keys of before, for a message."""
        left = sorted(m.node_id for m in self._view().members.values() if m.status is MemberStatus.LEFT)
        if not left:
            return ""
        named = ", ".join(left[:ABSENT_NAMED_MAX]) + (", …" if len(left) > ABSENT_NAMED_MAX else "")
        return (
            f" ({named} {'has' if len(left) == 1 else 'have'} left and {'was' if len(left) == 1 else 'were'} not asked)"
        )

    # Members.

    def members(self, of: str | None) -> Operation:
        """What one node, or EVERYONE, believes of each member. None: this node. Raises OperationFailed."""

        asked = None if of == EVERYONE else self._member(of)

        async def operation(report: Report) -> None:
            if asked is None:
                await self._everywhere(report, names.MEMBERS, {})
            else:
                await self._at(report, asked, names.MEMBERS, {})
            await self._end(report, "")

        return operation

    def join(self, address: Address) -> Operation:
        """This node calls the address from now on, as if it had been configured as a seed."""

        async def operation(report: Report) -> None:
            me = self._view().self_id
            try:
                found = await self._check_seed(address)
            except HandshakeRefused as exc:
                fix = _HANDSHAKE_FIXES.get(exc.reason, "its log may say more")
                await report.failed(me, f"{address} refuses this node: {exc.reason}; {fix}")
            except PeerUnavailable as exc:
                await report.failed(me, f"{exc}; is a node's mesh port there, and open for TCP and UDP?")
            else:
                if found == me:
                    await report.failed(me, f"{address} is this very node; give the mesh address of another one")
                else:
                    self._add_seed(address)
                    await self._await_join(report, me, found, address)
            await self._end(report, "joined; give that address as --join too, so that a restart finds it")

        return operation

    async def _await_join(self, report: Report, me: str, found: str, address: Address) -> None:
        with trio.move_on_after(JOIN_WAIT_S):
            while (member := self._view().members.get(found)) is None or not member.is_live:
                await trio.sleep(POLL_S)
            live = sum(member.is_live for member in self._view().members.values())
            await report.ok(me, {"found": found, "members": live})
            return
        await report.failed(
            me, f"{found} at {address} takes links, but no gossip came within {JOIN_WAIT_S:g} s; is UDP let through?"
        )

    def leave(self, node_id: str | None) -> Operation:
        """A node finishes its streams and ends. None: this one. Raises OperationFailed."""
        member = self._member(node_id)

        async def operation(report: Report) -> None:
            if member.is_self:
                await report.ok(member.node_id, {"state": "finishes its streams, then ends"})
                await self._end(report, "")
                await self._local[names.LEAVE]({})  # last: the drain ends this task too
                return
            if not member.is_live:
                fix = "; take it off the list with: ai-cluster forget" if member.status is MemberStatus.DEAD else ""
                await report.skipped(member.node_id, f"is {member.status.name.lower()} already{fix}")
            elif await self._at(report, member, names.LEAVE, {}, told=False) is not None:
                await self._await_leave(report, member)
            await self._end(report, "")

        return operation

    async def _await_leave(self, report: Report, before: MemberView) -> None:
        with trio.move_on_after(LEAVE_WAIT_S):
            while (now := self._view().members.get(before.node_id)) is not None:
                if now.status is MemberStatus.LEFT or now.generation != before.generation:
                    break
                await trio.sleep(POLL_S)
            await report.ok(before.node_id, {"state": "has left"})
            return
        await report.ok(before.node_id, {"state": f"still finishes its streams after {LEAVE_WAIT_S:g} s"})

    def drain(self, node_id: str | None, *, is_undone: bool) -> Operation:
        """A node takes no new requests and stays a member, or takes them again. None: this one. Raises OperationFailed,
        also for a member that is not there to be asked."""
        member = self._member(node_id)
        if not member.is_live:
            raise OperationFailed(f"{member.node_id} is {member.status.name.lower()}, and takes no requests anyway")

        async def operation(report: Report) -> None:
            if is_undone:
                await self._at(report, member, names.UNDO_DRAIN, {})
            else:
                if alone := self._served_alone(member):
                    await report.warn(
                        member.node_id,
                        f"is the last node ready to serve {', '.join(alone)}: requests are refused (503) until another "
                        "one is",
                    )
                await self._await_drained(report, member)
            back = (
                f"{member.node_id} goes on as a member and an entry: who asks it is answered by other nodes; it comes "
                f"back with: ai-cluster drain --undo {member.node_id}, or a restart"
            )
            await self._end(report, "" if is_undone else back)

        return operation

    def _served_alone(self, member: MemberView) -> list[str]:
        """Its models that no other member is ready to serve; none for one that serves nothing itself at present."""
        ready = [m for m in self._view().members.values() if m.is_live and m.load.readiness is Readiness.READY]
        if all(m.node_id != member.node_id for m in ready):
            return []
        others = [m for m in ready if m.node_id != member.node_id]
        return [model.name for model in member.profile.models if not any(m.model(model.name) for m in others)]

    async def _await_drained(self, report: Report, member: MemberView) -> None:
        deadline = trio.current_time() + DRAIN_WAIT_S
        while (answer := await self._at(report, member, names.DRAIN, {}, told=False)) is not None:
            running = answer.get("running")
            if not running:
                await report.ok(member.node_id, {"state": "takes no requests, and none runs"})
                return
            if trio.current_time() >= deadline:
                state = f"takes no new requests; {running} still run after {DRAIN_WAIT_S:g} s"
                await report.ok(member.node_id, {"state": state})
                return

    def forget(self, node_id: str) -> Operation:
        """A dead member no longer counts and is not called again, at any node. If it comes back, it is a member.

        Raises OperationFailed for a member that is not dead."""
        member = self._member(node_id)
        if member.is_live:
            is_alive = member.status is MemberStatus.ALIVE
            fix = "stop it first: ai-cluster leave" if is_alive else "wait until it is found dead"
            age = f"heard of {member.age_s:.1f} s ago"
            raise OperationFailed(f"{node_id} is {member.status.name.lower()}, {age}; {fix}")

        async def operation(report: Report) -> None:
            await self._everywhere(report, names.FORGET, {"node_id": node_id}, tells_absent=False)
            await self._end(report, f"{node_id} is forgotten")

        return operation

    # How members are asked.

    def _member(self, node_id: str | None) -> MemberView:
        """Raises OperationFailed."""
        view = self._view()
        member = view.members.get(node_id or view.self_id)
        if member is None:
            raise OperationFailed(f"no member is named {node_id!r}; ai-cluster members lists them")
        return member

    async def _everywhere(
        self,
        report: Report,
        name: str,
        arguments: Arguments,
        *,
        is_here_only: bool = False,
        tells_absent: bool = True,
    ) -> None:
        """Ask every live member, this node last: until then it can still speak to them as before."""
        view = self._view()
        if not is_here_only:
            if tells_absent:
                for member in view.members.values():
                    if member.status is MemberStatus.DEAD:
                        await report.skipped(member.node_id, "is dead and was not asked")
            limiter = trio.CapacityLimiter(NODES_AT_ONCE_MAX)

            async def ask_one(member: MemberView) -> None:
                async with limiter:
                    await self._at(report, member, name, arguments)

            async with trio.open_nursery() as nursery:
                for member in view.members.values():
                    if member.is_live and not member.is_self:
                        nursery.start_soon(ask_one, member)
        await self._at(report, view.me, name, arguments)

    async def _at(
        self, report: Report, member: MemberView, name: str, arguments: Arguments, *, told: bool = True
    ) -> Answer | None:
        """Ask one, and tell what it answered (told: also when it did as asked). None when it did not."""
        try:
            answer = await self._answer(member, name, arguments)
        except OperationFailed as exc:
            await report.failed(member.node_id, str(exc))
            return None
        if told:
            await report.ok(member.node_id, answer)
        return answer

    async def _answer(self, member: MemberView, name: str, arguments: Arguments) -> Answer:
        """Raises OperationFailed, also after NODE_TIMEOUT_S."""
        with trio.move_on_after(NODE_TIMEOUT_S):
            if member.is_self:
                return await self._local[name](arguments)
            return await self._ask(member, name, arguments)
        raise OperationFailed(f"gave no answer within {NODE_TIMEOUT_S:g} s")

    async def _all_are_fit(self, report: Report, fault: Callable[[Answer], str | None]) -> bool:
        """True when every live member answered, and `fault` finds none in its keys. Each fault is told."""
        view = self._view()
        limiter = trio.CapacityLimiter(NODES_AT_ONCE_MAX)

        async def check(member: MemberView) -> None:
            async with limiter:
                try:
                    found = fault(await self._answer(member, names.KEYRING_LIST, {}))
                except OperationFailed as exc:
                    found = str(exc)
                except (KeyError, TypeError):
                    found = "told its keys in a form that this version cannot read"
                if found is not None:
                    await report.failed(member.node_id, found)

        async with trio.open_nursery() as nursery:
            for member in view.members.values():
                if member.is_live:
                    nursery.start_soon(check, member)
        return report.counts["failed"] == 0

    async def _end(self, report: Report, message: str) -> None:
        """The summary. message: what a person is told when all was done."""
        counts = report.counts
        if counts["failed"]:
            asked = counts["ok"] + counts["failed"]
            message = f"{counts['failed']} of {asked} nodes failed; the command can be repeated"
        await report.end(message, is_done=not counts["failed"])


_HANDSHAKE_FIXES = {
    "fenced": "it is this very node, or has its name: give the mesh address of another, and each node its own --name",
    "unknown key": "its mesh has another cluster key: ai-cluster keyring list at both",
    "wrong key": "its mesh has another cluster key: ai-cluster keyring list at both",
    "other cluster": "its mesh has another --cluster-name",
    "protocol version": "run versions of AI Cluster that share a protocol version",
}
