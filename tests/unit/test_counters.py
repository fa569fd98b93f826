"""Usage that nodes tell each other: the laws of merging, the windows, and what fits a section."""

from __future__ import annotations

import contextlib
from random import Random

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.counters import (
    BUCKET_S,
    FINE_BUCKET_S,
    GAUGE_AGE_MAX_S,
    GENERATIONS_MAX,
    KEYS_PER_NODE_MAX,
    WINDOW_S,
    Counted,
    PeerCounters,
    Used,
    Window,
    merge,
)
from mesh.counters_wire import (
    KEY_BYTES_MAX,
    SECTION_ROWS_MAX,
    TOTAL_MAX,
    USAGE_BYTES_MAX,
    Report,
    Totals,
    Usage,
    decode_usage,
    encode_usage,
)
from mesh.errors import MalformedDatagram
from mesh.own_counters import OWN_KEYS_MAX, TRANSIT_S, OwnCounters, Unheard

small = st.integers(0, 40)
totals = st.builds(Totals, small, small, small)
counted = st.builds(Counted, totals, small, small, small)
keys = st.sampled_from(["a", "b", "c"])


@st.composite
def reports(draw: st.DrawFn, names: st.SearchStrategy[str] = keys) -> Report:
    total = draw(totals)
    recent_requests = draw(st.integers(0, total.requests))
    return Report(draw(names), total, draw(small), draw(small), recent_requests, draw(st.integers(0, total.tokens)))


usages = st.builds(Usage, st.integers(1, GENERATIONS_MAX), small, st.lists(reports(), max_size=4).map(tuple))
nodes = st.sampled_from(["n1", "n2"])


# Merging.


@given(counted, counted, counted)
def test_merging_counts_is_commutative_associative_and_idempotent(a: Counted, b: Counted, c: Counted) -> None:
    assert merge(a, b) == merge(b, a)
    assert merge(a, merge(b, c)) == merge(merge(a, b), c)
    assert merge(a, a) == a


@given(st.lists(st.tuples(nodes, usages), max_size=8), st.data())
def test_the_same_reports_in_any_order_and_number_give_the_same_counts(
    told: list[tuple[str, Usage]], data: st.DataObject
) -> None:
    one, other = PeerCounters(), PeerCounters()
    for node, usage in told:
        one.merge(node, usage, 0.0)
    again = data.draw(st.lists(st.sampled_from(told), max_size=4)) if told else []
    for node, usage in data.draw(st.permutations(told + again)):
        other.merge(node, usage, 0.0)
    assert one.counted() == other.counted()
    for node in ("n1", "n2"):
        for key in ("a", "b", "c"):
            assert one.totals(node, key) == other.totals(node, key)


@given(st.lists(st.tuples(nodes, st.integers(1, 9), usages), max_size=30))
def test_totals_never_fall_however_many_generations_come(told: list[tuple[str, int, Usage]]) -> None:
    peers = PeerCounters()
    for node, generation, usage in told:
        before = {(n, k): peers.totals(n, k) for n in ("n1", "n2") for k in ("a", "b", "c")}
        peers.merge(node, Usage(generation, usage.sequence, usage.reports), 0.0)
        for (n, k), total in before.items():
            assert peers.totals(n, k) == peers.totals(n, k).maximum(total)


def test_what_former_generations_counted_stays_counted_once() -> None:
    peers = PeerCounters()
    for generation in range(1, 2 * GENERATIONS_MAX):
        for total in (3, 5, 5):
            peers.merge("n", Usage(generation, total, (Report("k", Totals(total, 10, 1)),)), 0.0)
    assert peers.totals("n", "k") == Totals(5 * 7, 10 * 7, 1 * 7)
    assert len(peers.counted()) == GENERATIONS_MAX


def test_a_late_report_of_a_folded_generation_changes_nothing() -> None:
    peers = PeerCounters()
    for generation in range(1, GENERATIONS_MAX + 2):
        peers.merge("n", Usage(generation, 1, (Report("k", Totals(2)),)), 0.0)
    peers.merge("n", Usage(1, 9, (Report("k", Totals(50), 1, 1, 50, 0),)), 0.0)
    assert peers.totals("n", "k") == Totals(2 * (GENERATIONS_MAX + 1))
    assert peers.used("k", 0.0) == Used()


# Windows.


@given(
    st.lists(st.tuples(st.floats(0, 200), st.integers(0, 5), st.integers(0, 100)), max_size=60),
    st.floats(0, 300),
)
def test_a_window_holds_the_last_minute_and_at_most_a_bucket_more(
    uses: list[tuple[float, int, int]], later_s: float
) -> None:
    window = Window()
    uses.sort()
    for at, requests, tokens in uses:
        window.add(requests, tokens, at)
    now = (uses[-1][0] if uses else 0.0) + later_s
    window.expire(now)
    assert window.requests >= sum(r for at, r, _ in uses if now - at < WINDOW_S)
    assert window.requests <= sum(r for at, r, _ in uses if now - at <= WINDOW_S + BUCKET_S)
    assert window.tokens >= sum(t for at, _, t in uses if now - at < WINDOW_S)
    assert window.tokens <= sum(t for at, _, t in uses if now - at <= WINDOW_S + BUCKET_S)


def test_a_window_used_all_the_time_has_one_entry_a_second() -> None:
    window = Window()
    for i in range(100_000):
        window.add(1, 7, i / 100)
    assert len(window._buckets) <= WINDOW_S / BUCKET_S + 1


class Witness:
    """A receiver, and what one must expect of it: which uses it was told of, and when it first was."""

    def __init__(self) -> None:
        self.peers = PeerCounters()
        self._told_at: dict[str, dict[tuple[float, int], float]] = {}

    def receive(self, section: bytes, uses: dict[str, list[tuple[float, int]]], now: float) -> None:
        """uses: by key, those of the section's generation up to its publication, of its last minute."""
        self.peers.receive("owner", section, now)
        for key, recent in uses.items():
            told_at = self._told_at.setdefault(key, {})
            for use in recent:
                told_at.setdefault(use, now)

    def check(self, key: str, now: float) -> None:
        seen = self.peers.used(key, now)
        told_at = self._told_at.get(key, {})
        least = [use for use in told_at if now - use[0] < WINDOW_S]
        most = [use for use, at in told_at.items() if now - at <= WINDOW_S + BUCKET_S]
        assert len(least) <= seen.requests <= len(most)
        assert sum(tokens for _, tokens in least) <= seen.tokens <= sum(tokens for _, tokens in most)


@pytest.mark.parametrize("seed", range(4))
def test_peers_never_count_less_than_was_told_of_the_last_minute(seed: int) -> None:
    """Two fifths of the sections are lost, the others late, some twice; the owner restarts, a receiver comes late."""
    rng = Random(seed)
    names = [f"key-{i}" for i in range(2 + seed % 2 * 40)]
    owner = OwnCounters(1)
    uses: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    flying: list[tuple[float, bytes, dict[str, list[tuple[float, int]]]]] = []
    early, late = Witness(), Witness()
    now = 0.0
    for _ in range(600):
        now += rng.random() * 0.5
        if rng.random() < 0.005:
            owner = OwnCounters(owner.generation + 1)
            uses = {name: [] for name in names}
        for _ in range(rng.randrange(3)):
            key, tokens = rng.choice(names), rng.randrange(300)
            owner.begin(key, 0, now)
            owner.count(key, tokens, 0, now)
            owner.end(key, 0)
            uses[key].append((now, tokens))
        if section := owner.section(now):
            told = [report.key for report in decode_usage(section).reports]
            recent = {key: [use for use in uses[key] if now - use[0] <= WINDOW_S + BUCKET_S] for key in told}
            copies = rng.choice((0, 0, 1, 1, 2))
            flying += [(now + rng.random() * 3, section, recent) for _ in range(copies)]
        for arrival in [f for f in flying if f[0] <= now]:
            flying.remove(arrival)
            for witness in (early, late) if now > 90 else (early,):
                witness.receive(arrival[1], arrival[2], now)
        for witness in (early, late):
            key = rng.choice(names)
            witness.check(key, now)
            together, alone = witness.peers.used(key, now), witness.peers.used_by("owner", key, now)
            assert together.requests <= alone.requests  # in finer buckets, so held less long
            assert together.tokens <= alone.tokens


def test_a_first_sight_counts_what_is_of_the_last_minute_only() -> None:
    peers = PeerCounters()
    peers.merge("n", Usage(1, 700, (Report("k", Totals(10_000, 10**6, 0), 2, 500, 30, 900),)), 5.0)
    assert peers.used("k", 5.0) == Used(30, 900, 2, 500)
    assert peers.used("k", 5.0 + WINDOW_S + BUCKET_S) == Used()


def test_what_was_used_during_a_partition_longer_than_a_window_does_not_come_in_at_once() -> None:
    owner, peers = OwnCounters(1), PeerCounters()
    owner.count("k", 100, 0, 0.0)
    peers.receive("n", owner.section(0.0), 0.0)
    for second in range(1, 600):
        owner.count("k", 10, 0, float(second))
    peers.receive("n", owner.section(600.0), 600.0)
    assert 590 <= peers.used("k", 600.0).tokens <= 610
    assert peers.totals("n", "k").tokens == 100 + 5_990


def test_usage_is_told_by_node_and_of_all_together() -> None:
    peers = PeerCounters()
    peers.merge("n1", Usage(1, 1, (Report("k", Totals(3, 5, 1), 1, 40, 3, 6),)), 0.0)
    peers.merge("n2", Usage(1, 1, (Report("k", Totals(4, 5, 2), 2, 50, 4, 7),)), 0.0)
    assert peers.used_by("n1", "k", 1.0) == Used(3, 6, 1, 40)
    assert peers.used_by("n2", "k", 1.0) == Used(4, 7, 2, 50)
    assert peers.used("k", 1.0) == Used(7, 13, 3, 90)
    assert peers.used("other", 1.0) == peers.used_by("n3", "k", 1.0) == Used()


# What runs now.


def one(generation: int, sequence: int, running: int) -> Usage:
    return Usage(generation, sequence, (Report("k", Totals(9), running, 10 * running, 0, 0),))


def test_the_gauges_published_last_count_whatever_comes_later() -> None:
    peers = PeerCounters()
    for sequence, running in ((1, 3), (3, 1), (2, 7)):
        peers.merge("n", one(1, sequence, running), 0.0)
    assert peers.used("k", 0.0) == Used(0, 0, 1, 10)


def test_nothing_runs_on_a_node_that_is_gone_until_it_speaks_again() -> None:
    peers = PeerCounters()
    peers.merge("n", one(1, 5, 3), 0.0)
    peers.gone("n")
    peers.merge("n", one(1, 4, 2), 0.0)  # on its way since before
    assert peers.used("k", 0.0).running == 0
    peers.merge("n", one(1, 6, 4), 0.0)
    assert peers.used("k", 0.0).running == 4


def test_nothing_runs_of_a_former_life() -> None:
    peers = PeerCounters()
    peers.merge("n", one(1, 5, 3), 0.0)
    peers.merge("n", Usage(2, 1, (Report("other", Totals(1)),)), 0.0)
    assert peers.used("k", 0.0).running == 0


def test_a_node_that_says_nothing_for_long_runs_nothing() -> None:
    peers = PeerCounters()
    peers.merge("n", one(1, 5, 3), 0.0)
    assert peers.used("k", GAUGE_AGE_MAX_S).running == 3
    assert peers.used("k", GAUGE_AGE_MAX_S + 0.1).running == 0


# The node's own.


def test_a_request_is_counted_at_its_begin_and_its_tokens_as_they_come() -> None:
    owner, peers = OwnCounters(4), PeerCounters()
    owner.begin("k", 500, 10.0)
    owner.begin("k", 200, 10.0)
    owner.count("k", 100, 0, 10.2)
    owner.count("k", 0, 30, 11.0)
    owner.end("k", 200)
    assert owner.used("k", 11.0) == Used(2, 130, 1, 500)
    peers.receive("n", owner.section(11.0), 11.5)
    assert peers.used("k", 12.0) == Used(2, 130, 1, 500)
    owner.end("k", 500)
    peers.receive("n", owner.section(12.0), 12.5)
    assert peers.used("k", 13.0) == Used(2, 130, 0, 0)
    assert dict(owner.totals()) == {"k": Totals(2, 100, 30)}


def test_a_node_that_serves_nobody_publishes_nothing() -> None:
    owner = OwnCounters(1)
    assert owner.section(0.0) == b""
    owner.count("k", 1, 1, 0.0)
    assert owner.section(0.0)
    assert owner.section(1.0), "told again while it is of the last minute: the first may be lost"
    assert owner.section(WINDOW_S + BUCKET_S) == b""
    PeerCounters().receive("n", b"", 0.0)


@pytest.mark.parametrize("key_count", [1, 15, 400])
def test_every_key_in_use_is_told_in_turn_and_changed_ones_before_others(key_count: int) -> None:
    owner = OwnCounters(1)
    names = [f"{i:016x}" for i in range(key_count)]
    for name in names:
        owner.begin(name, 900, 0.0)
        owner.count(name, 80_000, 9_000, 0.0)
    told: list[str] = []
    for _ in range(-(-key_count // 12)):
        section = owner.section(1.0)
        assert len(section) <= USAGE_BYTES_MAX
        told += [report.key for report in decode_usage(section).reports]
    assert owner.untold_count == 0
    assert told[:key_count] == names, "in the order in which they changed, none left out"
    again: list[str] = []
    while len(again) < 2 * key_count:
        again += [report.key for report in decode_usage(owner.section(1.0)).reports]
    assert set(again[:key_count]) == set(again[key_count : 2 * key_count]) == set(names)
    owner.count(names[-1], 1, 0, 1.0)
    assert decode_usage(owner.section(1.0)).reports[0].key == names[-1]


def test_a_section_holds_twelve_usual_keys() -> None:
    owner = OwnCounters(70)
    for i in range(40):
        owner.begin(f"{i:016x}", 2_000, 0.0)
        owner.count(f"{i:016x}", 3_000_000, 400_000, 0.0)
    assert len(decode_usage(owner.section(0.0)).reports) >= 12


def test_one_key_that_changes_all_the_time_does_not_keep_others_waiting() -> None:
    owner = OwnCounters(1)
    names = [f"{i:060x}" for i in range(40)]
    for name in names:
        owner.count(name, 1, 1, 0.0)
    told = set()
    for _ in range(8):
        owner.count(names[0], 1, 1, 0.0)
        told |= {report.key for report in decode_usage(owner.section(0.0)).reports}
    assert told == set(names)


def test_a_generation_that_peers_remembered_is_taken_up_and_nothing_told_before_is_missed() -> None:
    peers = PeerCounters()
    for generation in range(6, 6 + GENERATIONS_MAX):
        peers.merge("n", Usage(generation, 90, (Report("k", Totals(50)),)), 0.0)
    owner = OwnCounters(1)  # its data directory is lost
    owner.count("k", 100, 0, 0.0)
    peers.receive("n", owner.section(0.0), 0.0)
    assert peers.used("k", 0.0).tokens == 0
    owner.renew(20)
    owner.count("k", 10, 0, 0.0)
    peers.receive("n", owner.section(0.0), 0.0)
    assert peers.used("k", 0.0).tokens == 110


def test_keys_beyond_the_bound_are_refused_until_some_are_forgotten() -> None:
    owner = OwnCounters(1)
    for i in range(OWN_KEYS_MAX):
        owner.count(str(i), 1, 1, 0.0)
    with pytest.raises(ValueError, match=r"16384 keys is counted already; forget"):
        owner.begin("one more", 0, 0.0)
    owner.forget("7")
    owner.begin("one more", 0, 0.0)
    assert owner.used("7", 0.0) == Used()


def test_a_key_that_is_revoked_while_it_runs_is_counted_to_its_end() -> None:
    owner = OwnCounters(1)
    owner.begin("k", 10, 0.0)
    owner.forget("k")
    owner.count("k", 5, 5, 1.0)
    assert dict(owner.totals()) == {"k": Totals(1, 5, 5)}
    owner.end("k", 10)
    owner.forget("k")
    assert dict(owner.totals()) == {}
    assert owner.section(2.0) == b""


@pytest.mark.parametrize("key", ["", "x" * (KEY_BYTES_MAX + 1)])
def test_a_key_that_peers_would_refuse_is_refused_at_home(key: str) -> None:
    owner = OwnCounters(1)
    with pytest.raises(ValueError, match=rf"between 1 and {KEY_BYTES_MAX}"):
        owner.begin(key, 0, 0.0)
    assert owner.section(0.0) == b""


# Bounds.


def test_memory_is_bounded_whatever_comes_and_what_is_in_use_is_kept() -> None:
    peers = PeerCounters(rows_max=500)
    rng = Random(3)
    for i in range(1_000):
        told = tuple(Report(f"k{rng.randrange(10**6)}", Totals(1), 0, 0, 1, 0) for _ in range(8))
        peers.merge(f"n{rng.randrange(200)}", Usage(rng.randrange(50), i, told), i / 10)
        assert peers.row_count <= 500
        assert peers.used(told[-1].key, i / 10).requests >= 1
    assert peers.row_count == sum(len(node.rows) for node in peers._nodes.values())
    assert peers.row_count == sum(len(key.rows) for key in peers._keys.values())
    assert len(peers._nodes) <= 500


def test_of_one_node_the_keys_longest_unchanged_are_forgotten_and_come_back_right() -> None:
    peers = PeerCounters()
    peers.merge("n", Usage(1, 1, (Report("old", Totals(7, 70, 0), 0, 0, 7, 70),)), 0.0)
    for i in range(KEYS_PER_NODE_MAX):
        peers.merge("n", Usage(1, 2, (Report(str(i), Totals(1)),)), 100.0)
    assert peers.row_count == KEYS_PER_NODE_MAX
    assert peers.totals("n", "old") == Totals()
    peers.merge("n", Usage(1, 3, (Report("old", Totals(9, 90, 0), 0, 0, 2, 20),)), 200.0)
    assert peers.used("old", 200.0) == Used(2, 20)


# Bytes.


@given(usages)
def test_usage_is_decoded_as_it_was_encoded(usage: Usage) -> None:
    assert decode_usage(encode_usage(usage)) == usage


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_usage_or_refused(section: bytes) -> None:
    with contextlib.suppress(MalformedDatagram):
        decode_usage(section)


@given(usages, usages, st.data())
def test_a_mutated_section_is_taken_whole_or_changes_nothing(before: Usage, usage: Usage, data: st.DataObject) -> None:
    peers = PeerCounters()
    peers.merge("n", before, 0.0)
    state = peers.counted()
    section = bytearray(encode_usage(usage))
    for _ in range(data.draw(st.integers(1, 3))):
        section[data.draw(st.integers(0, len(section) - 1))] = data.draw(st.integers(0, 255))
    try:
        peers.receive("n", bytes(section), 0.0)
    except MalformedDatagram:
        assert peers.counted() == state


def row(*fields: object) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


GOOD = row("k", 5, 40, 3, 1, 100, 2, 20)


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(row(1), id="no sequence"),
        pytest.param(row(1, 2) + row("k", 1, 1, 1, 1, 1, 1), id="a field is missing"),
        pytest.param(row(1, 2) + GOOD + row("", 1, 1, 1, 1, 1, 1, 1), id="a key without a name"),
        pytest.param(row(1, 2) + GOOD + row("x" * 65, 1, 1, 1, 1, 1, 1, 1), id="a long key"),
        pytest.param(row(1, 2) + GOOD + row("k", -1, 1, 1, 1, 1, 0, 0), id="a negative count"),
        pytest.param(row(1, 2) + GOOD + row("k", TOTAL_MAX + 1, 1, 1, 1, 1, 0, 0), id="a count beyond its limit"),
        pytest.param(row(1, 2) + GOOD + row("k", 5, 1, 1, 1, 1, 6, 0), id="more requests lately than ever"),
        pytest.param(row(1, 2) + GOOD + row("k", 5, 1, 1, 1, 1, 0, 3), id="more tokens lately than ever"),
        pytest.param(row(1, 2) + GOOD[:-1], id="cut short"),
        pytest.param(row(1, 2) + row("k", *[0] * 7) * (SECTION_ROWS_MAX + 1), id="too many keys"),
        pytest.param(row(1, 2) + row("x" * 64, *[0] * 7) * 13, id="too long"),
        pytest.param(row(1.0, 2), id="a float for a generation"),
        pytest.param(b"\x80", id="a map"),
        pytest.param(b"\xc1", id="a byte msgpack never uses"),
    ],
)
def test_what_is_no_usage_is_refused_whole(section: bytes) -> None:
    peers = PeerCounters()
    with pytest.raises(MalformedDatagram):
        peers.receive("n", section, 0.0)
    assert peers.counted() == {}


def test_fields_of_a_newer_version_are_ignored() -> None:
    section = row(1, 2, "later") + row("k", 5, 40, 3, 1, 100, 2, 20, {"of": "later"})
    assert decode_usage(section) == Usage(1, 2, (Report("k", Totals(5, 40, 3), 1, 100, 2, 20),))


def test_what_was_begun_is_unheard_until_it_was_told_and_has_arrived() -> None:
    owner = OwnCounters(1)
    assert owner.unheard("k", 0.0) == Unheard()
    owner.begin("k", 100, 1.0)
    owner.begin("k", 20, 1.0)
    owner.end("k", 20)
    assert owner.unheard("k", 50.0) == Unheard(2, 120)
    assert owner.section(50.0)
    owner.begin("k", 7, 50.1)
    assert owner.unheard("k", 50.1) == Unheard(3, 127)
    assert owner.unheard("k", 50.01 + TRANSIT_S) == Unheard(1, 7)
    assert owner.section(51.0)
    assert owner.unheard("k", 51.01 + TRANSIT_S) == Unheard()


def test_a_window_says_when_it_lets_go() -> None:
    window = Window(0.25)
    window.add(1, 10, 0.1)
    window.add(2, 20, 0.2)
    window.add(1, 5, 7.0)
    assert list(window.expiries()) == [(WINDOW_S + 0.25, 3, 30), (WINDOW_S + 7.25, 1, 5)]
    window.expire(WINDOW_S + 0.25)
    assert (window.requests, window.tokens) == (1, 5)


def test_a_window_says_when_all_of_it_will_have_been_let_go() -> None:
    window = Window(FINE_BUCKET_S)
    assert window.last_expiry is None
    for at in (1.0, 2.1, 2.2):
        window.add(1, 10, at)
    assert window.last_expiry == max(when for when, *_ in window.expiries())
    window.expire(window.last_expiry)
    assert (window.requests, window.last_expiry) == (0, None)
