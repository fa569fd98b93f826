"""Members that ask each other over nothing: what peers answer is called directly, unless they are cut off."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from mesh.errors import PeerUnavailable
from mesh.view import Address, ClusterView, MemberStatus, MemberView, NodeLoad, NodeProfile

Answerer = Callable[[bytes], Awaitable[bytes]]


class FakePeers:
    """digests: what each one's profile says. cut: pairs that cannot reach each other; they see each other dead.
    suspects: whom all suspect."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.answerers: dict[str, Answerer] = {}
        self.digests: dict[str, str] = {}
        self.suspects: set[str] = set()
        self.cut: set[frozenset[str]] = set()
        self.asked: list[tuple[str, str]] = []

    def view_of(self, name: str) -> ClusterView:
        return ClusterView(name, trio.current_time(), {other: self._member(name, other) for other in self.names})

    def asker_of(self, name: str) -> Callable[[MemberView, bytes], Awaitable[bytes]]:
        async def ask(member: MemberView, question: bytes) -> bytes:
            await trio.sleep(0.01)
            self.asked.append((name, member.node_id))
            if frozenset((name, member.node_id)) in self.cut or member.node_id not in self.answerers:
                raise PeerUnavailable(f"{member.node_id} is out of reach")
            return await self.answerers[member.node_id](question)

        return ask

    def publisher_of(self, name: str) -> Callable[[str], None]:
        return lambda digest: self.digests.__setitem__(name, digest)

    def _member(self, seer: str, name: str) -> MemberView:
        status = MemberStatus.SUSPECT if name in self.suspects else MemberStatus.ALIVE
        if frozenset((seer, name)) in self.cut:
            status = MemberStatus.DEAD
        profile = NodeProfile(records_digest=self.digests.get(name, ""))
        return MemberView(name, Address("127.0.0.1", 1), status, 1, 1, NodeLoad(), profile, 0.0, is_self=seer == name)
