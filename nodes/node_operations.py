"""What one node does when an operator asks it, through its own HTTP address or from a peer. Each may be repeated."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import trio

from mesh.errors import KeyRefused
from mesh.seal import DEVELOPMENT_KEY, KEY_BYTES, KEY_ID_BYTES, Keyring, key_id
from mesh.view import ClusterView, MemberStatus, MemberView
from nodes.peer_operations import Answer, Arguments, Handler, OperationFailed

logger = logging.getLogger(__name__)

KEYRING_LIST = "keyring.list"
KEYRING_INSTALL = "keyring.install"
KEYRING_USE = "keyring.use"
KEYRING_REMOVE = "keyring.remove"
MEMBERS = "members"
FORGET = "forget"
LEAVE = "leave"
DRAIN = "drain"
UNDO_DRAIN = "drain.undo"

# Members told in one answer; at about 300 bytes each they fit one event of a link.
MEMBERS_TOLD_MAX = 4_096
# How long a peer may take to hear by gossip that a member was forgotten, while it still holds that for suspect.
FORGET_WAIT_S = 3.0
FORGET_POLL_S = 0.05
# How long one question for a drain waits for its end; whoever wants to wait longer asks again.
DRAIN_WAIT_S = 3.0
DRAIN_POLL_S = 0.05


class KeyringKeeper(Protocol):
    """nodes.keyring_file.KeyringFile is the real one. Each change raises KeyRefused or OSError with nothing changed."""

    @property
    def ring(self) -> Keyring: ...
    async def install(self, key: bytes) -> None: ...
    async def use(self, identity: bytes) -> None: ...
    async def remove(self, identity: bytes) -> None: ...


class NodeOperations:
    """view is instant. keyring_changed: called after each change of the ring. forget: Gossip.forget. stop: begins the
    drain, after which the node ends. begin_drain, undo_drain, running: of nodes.drain.Drain."""

    def __init__(
        self,
        *,
        keyring: KeyringKeeper,
        view: Callable[[], ClusterView],
        keyring_changed: Callable[[], None],
        forget: Callable[[str], bool],
        stop: Callable[[], None],
        begin_drain: Callable[[], None],
        undo_drain: Callable[[], None],
        running: Callable[[], int],
    ) -> None:
        self._keyring = keyring
        self._view = view
        self._keyring_changed = keyring_changed
        self._forget = forget
        self._stop = stop
        self._begin_drain = begin_drain
        self._undo_drain = undo_drain
        self._running = running
        self.handlers: Mapping[str, Handler] = {
            KEYRING_LIST: self._list_keys,
            KEYRING_INSTALL: self._install,
            KEYRING_USE: self._use,
            KEYRING_REMOVE: self._remove,
            MEMBERS: self._members,
            FORGET: self._forget_member,
            LEAVE: self._leave,
            DRAIN: self._drain,
            UNDO_DRAIN: self._undo,
        }

    async def _list_keys(self, arguments: Arguments) -> Answer:
        await trio.lowlevel.checkpoint()
        return self._keys()

    async def _install(self, arguments: Arguments) -> Answer:
        key = _bytes(arguments, "key", KEY_BYTES)
        if key == DEVELOPMENT_KEY:
            raise OperationFailed("the development key is public and guards nothing; make one: ai-cluster keyring new")
        return await self._changed("installed a cluster key", self._keyring.install, key)

    async def _use(self, arguments: Arguments) -> Answer:
        identity = _bytes(arguments, "key_id", KEY_ID_BYTES)
        return await self._changed("uses another cluster key", self._keyring.use, identity)

    async def _remove(self, arguments: Arguments) -> Answer:
        identity = _bytes(arguments, "key_id", KEY_ID_BYTES)
        return await self._changed("removed a cluster key", self._keyring.remove, identity)

    async def _changed(self, what: str, change: Callable[[bytes], Awaitable[None]], argument: bytes) -> Answer:
        before = self._keyring.ring.key_ids
        try:
            await change(argument)
        except KeyRefused as exc:
            raise OperationFailed(str(exc)) from exc
        except OSError as exc:
            raise OperationFailed(f"the keyring file cannot be written: {exc.strerror}; nothing was changed") from exc
        if self._keyring.ring.key_ids != before:
            changed = argument if len(argument) == KEY_ID_BYTES else key_id(argument)
            ring = [identity.hex() for identity in self._keyring.ring.key_ids]
            logger.info(what, extra={"cluster_key_id": changed.hex(), "keyring": ring})
            self._keyring_changed()
        return self._keys()

    def _keys(self) -> Answer:
        ring = self._keyring.ring
        return {"primary": ring.primary_id.hex(), "keys": [identity.hex() for identity in ring.key_ids]}

    async def _members(self, arguments: Arguments) -> Answer:
        await trio.lowlevel.checkpoint()
        view = self._view()
        told = sorted(view.members)[:MEMBERS_TOLD_MAX]
        return {
            "members": [_belief(view, view.members[node_id]) for node_id in told],
            "untold": len(view.members) - len(told),
        }

    async def _forget_member(self, arguments: Arguments) -> Answer:
        node_id = str(arguments.get("node_id", ""))
        deadline = trio.current_time() + FORGET_WAIT_S
        while True:
            member = self._view().members.get(node_id)
            if member is None or member.status is MemberStatus.LEFT or self._forget(node_id):
                return {}
            if trio.current_time() >= deadline:
                status = member.status.name.lower()
                raise OperationFailed(f"holds {node_id} for {status}, heard of {member.age_s:.1f} s ago")
            await trio.sleep(FORGET_POLL_S)

    async def _leave(self, arguments: Arguments) -> Answer:
        await trio.lowlevel.checkpoint()
        logger.info("an operator asks this node to leave")
        self._stop()
        return {}

    async def _drain(self, arguments: Arguments) -> Answer:
        """Tells how many requests still run after DRAIN_WAIT_S, or 0 as soon as none does."""
        self._begin_drain()
        with trio.move_on_after(DRAIN_WAIT_S):
            while self._running():
                await trio.sleep(DRAIN_POLL_S)
        await trio.lowlevel.checkpoint()
        return {"running": self._running()}

    async def _undo(self, arguments: Arguments) -> Answer:
        await trio.lowlevel.checkpoint()
        self._undo_drain()
        return {"state": "takes requests again"}


def _belief(view: ClusterView, member: MemberView) -> Answer:
    """What this node believes of one member. age_s: since the last sign of life, on this node's clock."""
    return {
        "node_id": member.node_id,
        "is_self": member.is_self,
        "membership": member.status.name.lower(),
        "status": view.status(member).value,
        "readiness": member.load.readiness.value,
        "age_s": round(member.age_s, 3),
        "mesh": str(member.address),
        "http": member.profile.http_address,
        "version": member.profile.version,
        "generation": member.generation,
        "state_version": member.version,
        "models": [model.name for model in member.profile.models],
    }


def _bytes(arguments: Arguments, name: str, size: int) -> bytes:
    value = arguments.get(name)
    if not isinstance(value, bytes) or len(value) != size:
        raise OperationFailed(f"{name} has to be {size} bytes")
    return value
