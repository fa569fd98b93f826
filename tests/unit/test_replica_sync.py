"""Replicas that talk: any history of edits, losses, restarts and late messages ends in equal replicas."""

from __future__ import annotations

import contextlib
from random import Random

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import MalformedDatagram
from mesh.replica import RECORD_ID_BYTES_MAX, VALUE_BYTES_MAX, EditRefused, Record, Replica
from mesh.replica_sync import (
    LISTING_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    RECORDS_PER_MESSAGE,
    Asker,
    answer,
    give,
)


class Exchange:
    """One comparison that went through, and what it took."""

    def __init__(self, asker: Replica, answerer: Replica) -> None:
        self.messages: list[bytes] = []
        self.changed_here: list[Record] = []
        self.changed_there: list[Record] = []
        session = Asker(asker)
        request: bytes | None = session.first()
        while request is not None:
            answered = answer(answerer, request)
            self.messages += [request, answered.message]
            self.changed_there += answered.changed
            step = session.receive(answered.message)
            self.changed_here += step.changed
            request = step.request

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.messages))


def filled(writer: str, count: int, prefix: str = "k") -> Replica:
    return Replica(writer, 1, [Record(f"{prefix}{i:05}", i, writer, 1, b"%d" % i * 20) for i in range(count)])


# One comparison.


def test_equal_replicas_notice_with_one_small_message_each_way() -> None:
    exchange = Exchange(filled("a", 500), filled("a", 500))
    assert len(exchange.messages) == 2
    assert exchange.size_bytes < 32
    assert exchange.changed_here == exchange.changed_there == []


def test_one_difference_among_many_records_costs_about_one_bucket() -> None:
    a, b = filled("a", 5_000), filled("a", 5_000)
    a.merge([a.draft("k00007", b"edited here")])
    b.merge([b.draft("k04000", b"edited there")])
    exchange = Exchange(a, b)
    assert a.digest() == b.digest()
    assert len(exchange.changed_here) == len(exchange.changed_there) == 1
    assert exchange.size_bytes < 15_000


@pytest.mark.parametrize("here", [0, 3_000])
def test_an_empty_replica_is_filled_from_either_side_in_messages_that_are_bounded(here: int) -> None:
    a, b = filled("a", here), filled("b", 3_000 - here)
    exchange = Exchange(a, b)
    assert a.digest() == b.digest()
    assert len(a.records) == 3_000
    assert max(map(len, exchange.messages)) <= MESSAGE_BYTES_MAX
    assert len(exchange.changed_here) + len(exchange.changed_there) == 3_000


def test_records_of_the_greatest_size_fit_their_messages() -> None:
    a, b = Replica("a", 1), Replica("b", 1)
    writer = "w" * 64
    for i in range(2 * RECORDS_PER_MESSAGE + 1):
        name = f"{i}".rjust(RECORD_ID_BYTES_MAX, "x")
        b.merge([Record(name, 2**63 - 1, writer, 2**63 - 1, bytes(VALUE_BYTES_MAX))])
    for asker, answerer in ((a, b), (b, Replica("c", 1))):
        exchange = Exchange(asker, answerer)
        assert max(map(len, exchange.messages)) <= MESSAGE_BYTES_MAX
        assert asker.digest() == answerer.digest()


def test_a_listing_longer_than_its_page_goes_on_where_it_ended() -> None:
    a, b = filled("a", 4_000), filled("b", 4_000, "other")
    exchange = Exchange(a, b)
    assert a.digest() == b.digest()
    listings = [message for message in exchange.messages if msgpack.unpackb(message)[0] == 7]
    assert len(listings) >= 2
    assert max(map(len, listings)) < LISTING_BYTES_MAX + 2_000


def test_a_difference_found_in_one_page_of_many_is_all_that_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.replica_sync.LISTING_BYTES_MAX", 300)
    a, b = filled("a", 1_000), filled("a", 1_000)
    names = [f"k{i:05}" for i in range(1_000)]
    for name in names[::100]:
        a.merge([a.draft(name, b"edited here")])
        b.merge([b.draft(f"new{name}", b"made there")])
    exchange = Exchange(a, b)
    assert a.digest() == b.digest()
    sent = [m for m in exchange.messages if msgpack.unpackb(m)[0] in (4, 8)]
    assert sum(len(msgpack.unpackb(m)[1]) for m in sent) == 20
    assert max(map(len, exchange.messages)) < 2_000


def test_tombstones_travel_in_the_listing_itself() -> None:
    a, b = filled("a", 100), filled("a", 100)
    b.merge([b.draft_deletion("k00042")])
    exchange = Exchange(a, b)
    assert a.value("k00042") is None
    assert exchange.changed_here == [Record("k00042")]
    assert len(exchange.messages) == 4


def test_equal_versions_of_different_values_become_one() -> None:
    a = Replica("a", 1, [Record("k", 1, "w", 1, b"x")])
    b = Replica("b", 1, [Record("k", 1, "w", 1, b"y")])
    Exchange(a, b)
    assert a.value("k") == b.value("k") == b"y"


def test_an_answerer_that_changes_meanwhile_is_equal_after_the_next_comparison() -> None:
    a, b = filled("a", 300), filled("b", 300, "other")
    session = Asker(a)
    request: bytes | None = session.first()
    edits = 0
    while request is not None:
        step = session.receive(answer(b, request).message)
        for replica in (a, b):
            record_id = f"k{edits:05}"
            edits += 1
            replica.merge([replica.draft(record_id, b"meanwhile")])
            replica.merge([replica.draft_deletion(f"{'k' if replica is a else 'other'}00299")])
        request = step.request
    Exchange(a, b)
    assert a.digest() == b.digest()


def test_a_rumour_brings_fresh_records_and_says_which_were_news() -> None:
    a, b, c = Replica("a", 1), Replica("b", 1), Replica("c", 1)
    fresh = [a.draft("k", b"1"), a.draft("l", b"2")]
    a.merge(fresh)
    assert answer(b, give(fresh)).changed == fresh
    assert answer(b, give(fresh)).changed == [], "so that it ends where it comes by a second way"
    assert answer(c, give(list(b.records.values()))).changed == fresh


# Histories.


class Node:
    """A replica with a disk. What is merged from peers reaches it a while later, what is acknowledged at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.generation = 0
        self.disk: dict[str, Record] = {}
        self.unkept: list[Record] = []
        self.restart()

    def restart(self) -> None:
        self.generation += 1
        self.unkept.clear()
        self.replica = Replica(self.name, self.generation, self.disk.values())

    def keep(self, records: list[Record]) -> None:
        for record in records:
            known = self.disk.get(record.record_id)
            if known is None or known.rank < record.rank:
                self.disk[record.record_id] = record


class World:
    """Nodes, a network that loses, doubles, delays and reorders, and what was acknowledged."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.nodes = [Node(f"n{i}") for i in range(rng.randint(3, 5))]
        self.flying: list[tuple[Node, Node, bytes]] = []  # rumours
        self.deleted: set[str] = set()
        self.edited: set[str] = set()
        self.ids = [f"k{i}" for i in range(6)]

    def step(self) -> None:
        node = self.rng.choice(self.nodes)
        other = self.rng.choice([n for n in self.nodes if n is not node])
        often = [self.edit, self.push, self.deliver]
        self.rng.choice([*often, *often, self.delete, self.compare, self.crash])(node, other)
        self.check()

    def edit(self, node: Node, other: Node) -> None:
        record_id = self.rng.choice(self.ids)
        with contextlib.suppress(EditRefused):
            draft = node.replica.draft(record_id, self.rng.randbytes(2))
            if self.rng.random() < 0.1:
                node.restart()  # before it was on disk
                return
            node.keep([draft])
            self.edited.add(record_id)
            if self.rng.random() < 0.1:
                node.restart()  # on disk, but neither merged nor acknowledged
                return
            node.replica.merge([draft])

    def delete(self, node: Node, other: Node) -> None:
        if self.rng.random() < 0.6:
            return
        record_id = self.rng.choice(self.ids)
        with contextlib.suppress(EditRefused):
            tombstone = node.replica.draft_deletion(record_id)
            node.keep([tombstone])
            node.replica.merge([tombstone])
            self.deleted.add(record_id)

    def push(self, node: Node, other: Node) -> None:
        known = list(node.replica.records.values())
        records = self.rng.sample(known, min(len(known), self.rng.randint(1, 3)))
        for _ in range(self.rng.choice((0, 1, 1, 2))):
            self.flying.append((node, other, give(records)))

    def deliver(self, node: Node, other: Node) -> None:
        if self.flying:
            _, to, message = self.flying.pop(self.rng.randrange(len(self.flying)))
            to.unkept += answer(to.replica, message).changed
            if self.rng.random() < 0.5:
                to.keep(to.unkept)
                to.unkept.clear()

    def compare(self, node: Node, other: Node) -> None:
        """May be cut at any message, in either direction."""
        session = Asker(node.replica)
        request: bytes | None = session.first()
        while request is not None and self.rng.random() > 0.1:
            answered = answer(other.replica, request)
            other.keep(answered.changed)
            if self.rng.random() < 0.1:
                return
            step = session.receive(answered.message)
            node.keep(step.changed)
            request = step.request

    def crash(self, node: Node, other: Node) -> None:
        if self.rng.random() < 0.5:
            node.restart()

    def check(self) -> None:
        for node in self.nodes:
            for record_id in self.deleted & node.replica.records.keys():
                record = node.replica.records[record_id]
                if node.disk.get(record_id, record).is_deleted:
                    assert record.is_deleted, f"{record_id} came back on {node.name}"

    def settle(self) -> None:
        """Old messages arrive at last, then everybody compares with the next until all is told."""
        while self.flying:
            self.deliver(self.nodes[0], self.nodes[1])
        for node in self.nodes:
            node.restart()
        for _ in range(2):
            for i, node in enumerate(self.nodes):
                other = self.nodes[(i + 1) % len(self.nodes)]
                exchange = Exchange(node.replica, other.replica)
                node.keep(exchange.changed_here)
                other.keep(exchange.changed_there)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(10, 150))
def test_every_history_ends_in_equal_replicas_without_what_was_deleted(seed: int, step_count: int) -> None:
    world = World(Random(seed))
    for _ in range(step_count):
        world.step()
    world.settle()
    first = world.nodes[0].replica
    for node in world.nodes:
        assert node.replica.records == first.records
        assert node.replica.digest() == first.digest()
        assert node.disk == first.records
    assert first.records.keys() >= world.edited
    assert {record_id for record_id in world.deleted if not first.records[record_id].is_deleted} == set()


def test_a_node_that_was_away_for_all_of_it_revives_nothing() -> None:
    a, b, away = filled("a", 50), filled("a", 50), filled("a", 50)
    for i in range(50):
        a.merge([a.draft_deletion(f"k{i:05}")])
        for _ in range(3):
            away.merge([away.draft(f"k{i:05}", b"edited while away")])
    Exchange(away, b)  # the one that heard of no deletion first
    Exchange(b, a)
    Exchange(away, a)
    for replica in (a, b, away):
        assert all(record.is_deleted for record in replica.records.values())


# Bad input.


def message(*fields: object) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


def packed(*items: object) -> list[bytes]:
    return [msgpack.packb(item) for item in items]


GOOD = ["k", 5, "w", 1, b"v"]


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1", id="a byte msgpack never uses"),
        pytest.param(b"\x91" * 2_000, id="nested deep"),
        pytest.param(message(1, b"x" * 16) + b"\x00", id="trailing bytes"),
        pytest.param(message(77), id="unknown type"),
        pytest.param(message(5), id="an answer"),
        pytest.param(message(1), id="no digest"),
        pytest.param(message(1, b"x" * 15), id="a short digest"),
        pytest.param(message(2, [64], ""), id="a bucket there is not"),
        pytest.param(message(2, [1] * 65, ""), id="too many buckets"),
        pytest.param(message(2, [1], 5), id="a number for an id"),
        pytest.param(message(3, ["k"] * 129), id="too many ids"),
        pytest.param(message(3, "k"), id="a text for ids"),
        pytest.param(message(4, packed(GOOD, ["l"], ["m", 1])), id="a record cut short among good ones"),
        pytest.param(message(4, [*packed(GOOD), b"\xc1"]), id="a record that is none among good ones"),
        pytest.param(message(4, [*packed(GOOD), ["k"]]), id="a record that is not packed"),
        pytest.param(message(4, packed(["k"]) * 129), id="too many records"),
        pytest.param(message(4, [bytes(MESSAGE_BYTES_MAX)]), id="larger than a message"),
    ],
)
def test_what_is_no_request_is_refused_and_changes_nothing(request_: bytes) -> None:
    replica = filled("a", 3)
    digest = replica.digest()
    with pytest.raises(MalformedDatagram):
        answer(replica, request_)
    assert replica.digest() == digest


def listing(*chunks: object) -> bytes:
    return message(7, list(chunks))


ENTRY = ["k", 5, "w", 1, b"hash8888"]


@pytest.mark.parametrize(
    "listed",
    [
        pytest.param(listing(), id="nothing"),
        pytest.param(listing([1, True, []]), id="a bucket not asked for"),
        pytest.param(listing([0, True, []], [0, True, []]), id="a bucket twice"),
        pytest.param(listing([0, False, []]), id="no progress"),
        pytest.param(listing([0, False, packed(["a"])], [1, True, []]), id="a gap"),
        pytest.param(listing([0, True, packed(["b"], ["a"])]), id="ids that fall"),
        pytest.param(listing([0, True, packed(["b"], ["b"])]), id="an id twice"),
        pytest.param(listing([0, 1, []]), id="no truth value"),
        pytest.param(listing([0, True, packed(["a"], ENTRY[:4])]), id="an entry cut short"),
        pytest.param(listing([0, True, packed(["a"], [*ENTRY[:4], b"hash"])]), id="a short hash"),
        pytest.param(listing([0, True, [["a"]]]), id="an entry that is not packed"),
        pytest.param(listing([0]), id="a chunk cut short"),
        pytest.param(message(8, []), id="records, which nobody asked for"),
        pytest.param(message(1, b"x" * 16), id="a request"),
    ],
)
def test_what_is_no_listing_is_refused_and_changes_nothing(listed: bytes) -> None:
    replica = filled("a", 3)
    digest = replica.digest()
    session = Asker(replica)
    session.receive(message(6, [b"\xff" * 16] * 64))
    with pytest.raises(MalformedDatagram):
        session.receive(listed)
    assert replica.digest() == digest


def test_an_answerer_that_lists_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.replica_sync.IDS_MERGED_MAX", 1_000)
    session = Asker(Replica("a", 1))
    session.receive(message(6, [b"\xff" * 16] * 64))
    pages = [
        listing([0, False, packed(*([f"{page:03}-{i:03}", *ENTRY[1:]] for i in range(100)))]) for page in range(11)
    ]
    for page in pages[:10]:
        session.receive(page)
    with pytest.raises(MalformedDatagram, match="more than 1000 ids"):
        session.receive(pages[10])


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_a_message_or_refused(data: bytes) -> None:
    replica = filled("a", 3)
    with contextlib.suppress(MalformedDatagram):
        answer(replica, data)
    with contextlib.suppress(MalformedDatagram):
        Asker(replica).receive(data)


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_a_mutated_message_is_taken_whole_or_changes_nothing(seed: int) -> None:
    rng = Random(seed)
    for at in range(6):
        a, b = filled("a", 40), filled("b", 40, "other")
        session = Asker(a)
        request: bytes | None = session.first()
        for turn in range(4):
            assert request is not None
            answers = answer(b, request).message
            for is_request in (True, False):
                if at == 2 * turn + is_request:
                    mutated = bytearray(request if is_request else answers)
                    for _ in range(rng.randint(1, 3)):
                        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
                    digests = a.digest(), b.digest()
                    try:
                        if is_request:
                            answer(b, bytes(mutated))
                        else:
                            session.receive(bytes(mutated))
                    except MalformedDatagram:
                        assert (a.digest(), b.digest()) == digests
                    break
            else:
                request = session.receive(answers).request
                continue
            break
