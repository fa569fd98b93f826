"""Keys, limits and usage of a node, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from mesh import replica_sync
from mesh.own_counters import OwnCounters
from mesh.replica import Record
from mesh.view import Address, ClusterView, MemberStatus, MemberView, NodeLoad, NodeProfile
from nodes.access.api_key import KeySettings
from nodes.access.gate import LimitReached
from nodes.node_access import NodeAccess
from nodes.store import open_store


def member(name: str, status: MemberStatus) -> MemberView:
    return MemberView(name, Address("127.0.0.1", 1), status, 1, 1, NodeLoad(), NodeProfile(), 0.0, is_self=name == "a")


@asynccontextmanager
async def access_of(folder: Path) -> AsyncIterator[NodeAccess]:
    async with open_store(folder) as store:
        yield NodeAccess(
            node_id="a",
            generation=1,
            store=store,
            records=(),
            own_counters=OwnCounters(1),
            forwarder=None,  # type: ignore[arg-type]
            view=lambda: ClusterView("a", trio.current_time(), {"a": member("a", MemberStatus.ALIVE)}),
            publish=lambda digest: None,
            usage_changed=lambda: None,
            is_open=True,
            has_seeds=False,
            hold_s=600.0,
        )


async def use(access: NodeAccess, token: str) -> None:
    caller = await access.gate.authenticate(f"Bearer {token}", "127.0.0.1")
    await (await access.gate.admit(caller, "m", 10, 40)).aclose()


async def test_a_family_whose_last_key_is_revoked_is_counted_no_longer(tmp_path: Path) -> None:
    async with access_of(tmp_path) as access:
        own = access._own_counters
        first, other, third = [await access.key_admin.create(KeySettings(name)) for name in ("alice", "bob", "carol")]
        for created in (first, other, third):
            await use(access, created.token)
        await access.key_admin.rotate("alice", 0)
        assert len(list(own.totals())) == 3
        await access.key_admin.revoke("alice")
        assert {family for family, _ in own.totals()} == {other.key.family, third.key.family}
        await access.answerers["records"](replica_sync.give([Record(other.key.record_id)]))  # a peer's revocation
        assert {family for family, _ in own.totals()} == {third.key.family}
        later = Record("key/other", 10, "z", 1, b"a later version's")
        await access.answerers["records"](replica_sync.give([later, Record(third.key.record_id)]))
        assert {family for family, _ in own.totals()} == {third.key.family}


@pytest.mark.parametrize("status", [MemberStatus.DEAD, MemberStatus.LEFT])
async def test_what_ran_on_a_node_that_is_gone_has_ended(tmp_path: Path, status: MemberStatus) -> None:
    async with access_of(tmp_path) as access:
        created = await access.key_admin.create(KeySettings("alice", concurrency=1, tokens_per_minute=100))
        caller = await access.gate.authenticate(f"Bearer {created.token}", "127.0.0.1")
        there = OwnCounters(1)
        there.begin(created.key.family, 80, trio.current_time())
        access.hear_usage("b", there.section(trio.current_time()))
        for still_there in (MemberStatus.ALIVE, MemberStatus.SUSPECT):
            access.member_changed(member("b", still_there))
            with pytest.raises(LimitReached):
                await access.gate.admit(caller, "m", 10, 40)
        access.member_changed(member("b", status))
        await (await access.gate.admit(caller, "m", 10, 40)).aclose()
