"""Seeds that accept, refuse and are not there, in virtual time."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

from mesh.errors import HandshakeRefused, PeerUnavailable
from mesh.view import Address
from nodes.config import ConfigInvalid
from nodes.seed_check import SEED_CHECK_INTERVAL_S, SeedCheck

FIRST, SECOND = Address("192.0.2.1", 7946), Address("192.0.2.2", 7946)
Outcome = Exception | None


class Seeds:
    """Answer handshakes with the given outcomes, one after the other; the last one again and again."""

    def __init__(self, **outcomes: list[Outcome]) -> None:
        self.asked: list[Address] = []
        self._outcomes = {FIRST: outcomes["first"], SECOND: outcomes["second"]}

    async def shake_hands(self, seed: Address) -> None:
        await trio.lowlevel.checkpoint()
        self.asked.append(seed)
        outcomes = self._outcomes[seed]
        outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
        if outcome is not None:
            raise outcome

    def check(self) -> SeedCheck:
        return SeedCheck((FIRST, SECOND), self.shake_hands, "a", "blue")


def refused(reason: str) -> HandshakeRefused:
    return HandshakeRefused(reason)


@pytest.mark.parametrize(
    ("reasons", "fix"),
    [
        (("unknown key", "unknown key"), "--cluster-key-file"),
        (("other cluster", "other cluster"), "--cluster-name is 'blue'"),
        (("fenced", "fenced"), "own name, 'a'"),
        (("protocol version", "protocol version"), "share a protocol version"),
        (("fenced", "other cluster"), "--cluster-key-file"),
    ],
)
async def test_refused_by_all_that_answer_at_the_start_it_ends_and_names_the_fix(
    autojump_clock: trio.testing.MockClock, reasons: tuple[str, str], fix: str
) -> None:
    seeds = Seeds(first=[refused(reasons[0])], second=[refused(reasons[1])])
    with pytest.raises(ConfigInvalid, match=fix) as caught:
        await seeds.check().run()
    assert str(FIRST) in str(caught.value)
    assert str(SECOND) in str(caught.value)


async def test_a_seed_that_is_not_there_does_not_count_and_is_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    absent = PeerUnavailable("nobody there")
    seeds = Seeds(first=[absent, absent, None], second=[absent])
    with trio.move_on_after(10 * SEED_CHECK_INTERVAL_S):
        await seeds.check().run()
    assert seeds.asked == [FIRST, SECOND, FIRST, SECOND, FIRST]


async def test_refused_by_the_only_one_that_answers_it_ends(autojump_clock: trio.testing.MockClock) -> None:
    seeds = Seeds(first=[PeerUnavailable("nobody there")], second=[refused("unknown key")])
    with pytest.raises(ConfigInvalid, match=str(SECOND)) as caught:
        await seeds.check().run()
    assert str(FIRST) not in str(caught.value)


async def test_one_that_accepts_is_enough_until_gossip_finds_a_seed_silent(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    seeds = Seeds(first=[refused("unknown key")], second=[None, refused("unknown key")])
    check = seeds.check()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(check.run)
        await trio.sleep(10 * SEED_CHECK_INTERVAL_S)
        assert seeds.asked == [FIRST, SECOND]
        with caplog.at_level(logging.ERROR):
            check.note_silence()
            await trio.sleep(5.5 * SEED_CHECK_INTERVAL_S)  # now all refuse: told once, and the node goes on
        assert len(seeds.asked) > 6
        nursery.cancel_scope.cancel()
    assert [record.message for record in caplog.records] == ["every seed that answers refuses this node"]


async def test_without_seeds_there_is_nothing_to_check() -> None:
    await SeedCheck((), Seeds(first=[None], second=[None]).shake_hands, "a", "blue").run()
