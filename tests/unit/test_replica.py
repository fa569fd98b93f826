"""The replicated map: its laws, what an edit may do, its bounds. How two become equal is in test_replica_sync.py."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import MalformedDatagram
from mesh.replica import (
    BUCKETS,
    RECORD_ID_BYTES_MAX,
    VALUE_BYTES_MAX,
    EditRefused,
    Record,
    Replica,
    bucket_of,
    encode_record,
    read_record,
)
from mesh.wire import COUNT_MAX

ids = st.sampled_from(["a", "b", "c"])
few = st.integers(0, 3)
records = st.one_of(
    st.builds(Record, ids),
    st.builds(Record, ids, few, st.sampled_from(["n1", "n2"]), few, st.sampled_from([b"", b"x", b"y"])),
)
histories = st.lists(records, max_size=12)


def replica_of(history: list[Record]) -> Replica:
    return Replica("me", 1, history)


def commit(replica: Replica, record_id: str, value: bytes) -> Record:
    record = replica.draft(record_id, value)
    assert replica.merge([record]) == [record]
    return record


def delete(replica: Replica, record_id: str) -> Record:
    record = replica.draft_deletion(record_id)
    replica.merge([record])
    return record


# Laws.


@given(histories, st.data())
def test_the_same_records_in_any_order_and_number_make_equal_replicas(
    history: list[Record], data: st.DataObject
) -> None:
    again = data.draw(st.lists(st.sampled_from(history), max_size=4)) if history else []
    one, other = replica_of(history), replica_of(data.draw(st.permutations(history + again)))
    assert one.records == other.records
    assert one.digest() == other.digest()


@given(histories, histories, histories)
def test_merging_replicas_is_commutative_associative_and_idempotent(
    a: list[Record], b: list[Record], c: list[Record]
) -> None:
    def merged(*parts: Replica) -> Replica:
        return replica_of([record for part in parts for record in part.records.values()])

    x, y, z = replica_of(a), replica_of(b), replica_of(c)
    assert merged(x, y).records == merged(y, x).records
    assert merged(merged(x, y), z).records == merged(x, merged(y, z)).records
    assert merged(x, x).records == x.records


@given(histories, histories)
def test_digests_are_equal_exactly_where_replicas_are(a: list[Record], b: list[Record]) -> None:
    one, other = replica_of(a), replica_of(b)
    assert (one.digest() == other.digest()) is (one.records == other.records)
    differing = {i for i in range(BUCKETS) if one.bucket_digests()[i] != other.bucket_digests()[i]}
    assert differing == {bucket_of(i) for i in "abc" if one.records.get(i) != other.records.get(i)}


@given(histories, records)
def test_what_merging_returns_is_what_changed(history: list[Record], record: Record) -> None:
    replica = replica_of(history)
    before, position = dict(replica.records), replica.position
    changed = replica.merge([record])
    assert changed == ([record] if replica.records != before else [])
    assert replica.position == position + len(changed)
    assert replica.merge([record]) == []


# Editing.


def test_an_edit_outdoes_whatever_its_replica_has_seen() -> None:
    replica = Replica("a", 1, [Record("k", 70, "z", 9, b"old"), Record("other", 900, "z", 9, b"")])
    commit(replica, "k", b"new")
    assert replica.value("k") == b"new"
    assert replica.records["k"] == Record("k", 901, "a", 1, b"new")


def test_a_draft_changes_nothing_until_it_is_merged() -> None:
    replica = Replica("a", 1)
    digest = replica.digest()
    first, second = replica.draft("k", b"1"), replica.draft("k", b"2")
    assert (replica.digest(), dict(replica.records), replica.position) == (digest, {}, 0)
    replica.merge([second])
    assert replica.merge([first]) == [], "drafted earlier, so it is the older one"
    assert replica.value("k") == b"2"


def test_of_concurrent_edits_of_one_record_one_wins_whole_and_the_same_one_everywhere() -> None:
    base = Record("k", 1, "a", 1, b"name=x limit=5")
    a, b = Replica("a", 1, [base]), Replica("b", 1, [base])
    renamed, limited = a.draft("k", b"name=y limit=5"), b.draft("k", b"name=x limit=9")
    results = set()
    for order in permutations([base, renamed, limited]):
        results.add(Replica("c", 1, order).value("k"))
    assert results == {b"name=x limit=9"}


@pytest.mark.parametrize("edits", [1, 50])
def test_a_deletion_wins_over_edits_made_meanwhile_however_many(edits: int) -> None:
    a = Replica("a", 1)
    base = commit(a, "k", b"works")
    b = Replica("b", 1, [base])
    tombstone = delete(a, "k")
    for i in range(edits):
        commit(b, "k", b"works %d" % i)
    edited = b.records["k"]
    assert b.merge([tombstone]) == [tombstone]
    assert a.merge([edited]) == []
    assert a.value("k") is b.value("k") is None
    assert a.digest() == b.digest()


def test_a_deleted_id_is_never_used_again() -> None:
    replica = Replica("a", 1)
    commit(replica, "k", b"works")
    delete(replica, "k")
    with pytest.raises(EditRefused, match=r"'k' was deleted, which is for ever; create a new one"):
        replica.draft("k", b"again")
    assert replica.merge([Record("k", COUNT_MAX, "z", COUNT_MAX, b"again")]) == []
    assert delete(replica, "k") == Record("k")


def test_an_id_that_is_not_known_is_not_deleted() -> None:
    with pytest.raises(EditRefused, match="'k' is not known on this node"):
        Replica("a", 1).draft_deletion("k")


def test_a_node_that_lost_its_data_and_reuses_a_version_does_not_split_the_mesh() -> None:
    before, after = Record("k", 1, "a", 1, b"before"), Record("k", 1, "a", 1, b"after")
    one, other = Replica("b", 1, [before, after]), Replica("c", 1, [after, before])
    assert one.digest() == other.digest()


def test_a_replica_that_starts_from_disk_goes_on_where_it_was() -> None:
    replica = Replica("a", 1)
    for i in range(30):
        commit(replica, f"k{i % 7}", b"%d" % i)
    delete(replica, "k3")
    again = Replica("a", 2, replica.records.values())
    assert again.records == replica.records
    assert again.digest() == replica.digest()
    assert again.statistics() == replica.statistics()
    commit(again, "k1", b"newer")
    assert replica.merge([again.records["k1"]]), "an edit after the restart outdoes those before it"


# Bounds.


def test_a_replica_that_is_full_refuses_new_ids_but_no_edit_and_no_deletion() -> None:
    replica = Replica("a", 1, records_max=3, ids_max=5, ids_merged_max=8)
    for i in range(3):
        commit(replica, f"k{i}", b"")
    with pytest.raises(EditRefused, match="at most 3 records"):
        replica.draft("k3", b"")
    commit(replica, "k1", b"edited")
    delete(replica, "k0")
    delete(replica, "k1")
    for i in (3, 4):
        commit(replica, f"k{i}", b"")
    delete(replica, "k2")
    with pytest.raises(EditRefused, match="at most 5 ids"):
        replica.draft("k5", b"")
    delete(replica, "k3")
    delete(replica, "k4")
    assert replica.statistics().tombstones == 5


def test_at_the_last_bound_tombstones_stay_and_what_is_refused_cannot_come_back() -> None:
    replica = Replica("a", 1, records_max=3, ids_max=5, ids_merged_max=8)
    replica.merge([Record(f"k{i}", 1, "b", 1, b"works") for i in range(8)])
    assert replica.merge([Record("k8")]) == [], "revoked elsewhere, but there is no place for it"
    assert replica.merge([Record("k8", 1, "b", 1, b"works")]) == [], "nor for the record it revokes"
    assert replica.statistics().refused == 2
    for i in range(8):
        assert replica.merge([Record(f"k{i}")]), "a known one is revoked always"
    assert replica.merge([Record("k8", 1, "b", 1, b"works")]) == []
    assert all(record.is_deleted for record in replica.records.values())
    assert len(replica.records) == 8


def test_replicas_that_were_filled_apart_still_become_equal() -> None:
    parts = []
    for name in ("a", "b", "c"):
        part = Replica(name, 1, records_max=10, ids_max=12, ids_merged_max=48)
        for i in range(10):
            commit(part, f"{name}{i}", b"")
        parts.append(part)
    everything = [record for part in parts for record in part.records.values()]
    for part in parts:
        part.merge(everything)
    assert len({part.digest() for part in parts}) == 1
    assert parts[0].statistics().records == 30


@pytest.mark.parametrize(
    ("record_id", "value"),
    [
        pytest.param("", b"", id="no id"),
        pytest.param("x" * (RECORD_ID_BYTES_MAX + 1), b"", id="long id"),
        pytest.param("k", bytes(VALUE_BYTES_MAX + 1), id="large value"),
    ],
)
def test_an_edit_that_peers_would_refuse_is_refused_at_home(record_id: str, value: bytes) -> None:
    with pytest.raises(ValueError, match=r"\d+ bytes (is not between|exceeds)"):
        Replica("a", 1).draft(record_id, value)


def test_a_clock_at_its_limit_refuses_edits_and_names_itself() -> None:
    replica = Replica("a", 1, [Record("k", COUNT_MAX, "b", 1, b"")])
    with pytest.raises(EditRefused, match=f"limit of {COUNT_MAX}"):
        replica.draft("k", b"")
    delete(replica, "k")


# Fields.


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param([], id="empty"),
        pytest.param("k", id="a text"),
        pytest.param(["k", 1, "a", 1], id="a field is missing"),
        pytest.param(["", 1, "a", 1, b""], id="no id"),
        pytest.param(["x" * 65, 1, "a", 1, b""], id="long id"),
        pytest.param(["k", -1, "a", 1, b""], id="negative clock"),
        pytest.param(["k", 1, "", 1, b""], id="no writer"),
        pytest.param(["k", 1, "a", True, b""], id="a truth value for a generation"),
        pytest.param(["k", 1, "a", 1, "text"], id="a text for a value"),
        pytest.param(["k", 1, "a", 1, None], id="no value"),
        pytest.param(["k", 1, "a", 1, bytes(VALUE_BYTES_MAX + 1)], id="large value"),
    ],
)
def test_what_is_no_record_is_refused(fields: object) -> None:
    with pytest.raises(MalformedDatagram):
        read_record(fields)


def test_fields_of_a_newer_version_are_ignored() -> None:
    assert read_record(["k", 1, "a", 2, b"v", "later"]) == Record("k", 1, "a", 2, b"v")


def test_a_tombstone_is_as_small_as_its_id() -> None:
    assert len(encode_record(Record("0123456789abcdef"))) == 18
