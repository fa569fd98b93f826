"""Datagrams sealed by one process open in another of the same cluster, once, and in no other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import KeyRefused, SealRejected
from mesh.seal import (
    BOOTS_MAX,
    DEVELOPMENT_KEY,
    KEYS_MAX,
    OVERHEAD_BYTES,
    REPLAY_WINDOW,
    DatagramSealer,
    Keyring,
    Opened,
    key_id,
    new_key,
    parse_key,
)

KEY = DEVELOPMENT_KEY
OTHER_KEY = bytes(range(32))
BOOT = b"sender's boot id"


def sealer(boot_id: bytes = BOOT, *, keys: tuple[bytes, ...] = (KEY,), cluster: str = "c") -> DatagramSealer:
    return DatagramSealer(Keyring(list(keys), cluster), boot_id)


def receiver(*, keys: tuple[bytes, ...] = (KEY,), cluster: str = "c") -> DatagramSealer:
    """One that has admitted the sender, as of before its first datagram."""
    return receiver_with(Keyring(list(keys), cluster))


def receiver_with(ring: Keyring) -> DatagramSealer:
    made = DatagramSealer(ring, b"receiver boot id")
    made.admit(Opened(BOOT, 0, b"", is_admitted=False))
    return made


@given(st.binary(max_size=1_200))
def test_what_one_process_seals_another_opens(payload: bytes) -> None:
    datagram = sealer().seal(payload)
    assert receiver().open(datagram) == Opened(BOOT, 1, payload, is_admitted=True)
    assert len(datagram) == len(payload) + OVERHEAD_BYTES


@given(st.data())
def test_one_altered_bit_anywhere_is_rejected(data: st.DataObject) -> None:
    datagram = bytearray(sealer().seal(b"payload"))
    datagram[data.draw(st.integers(0, len(datagram) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SealRejected):
        receiver().open(bytes(datagram))


@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_rejected(datagram: bytes) -> None:
    with pytest.raises(SealRejected):
        receiver().open(datagram)


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        pytest.param(b"", "truncated", id="empty"),
        pytest.param(sealer().seal(b"")[:-1], "truncated", id="shorter than its header and tag"),
        pytest.param(b"\x02" + sealer().seal(b"p")[1:], "seal version", id="a later seal"),
        pytest.param(sealer(keys=(OTHER_KEY,)).seal(b"p"), "unknown key", id="another key"),
        pytest.param(sealer(cluster="d").seal(b"p"), "tampered", id="the same key in another cluster"),
        pytest.param(sealer().seal(b"p") + b"x", "tampered", id="something after the end"),
        pytest.param(receiver().seal(b"p"), "reflected", id="the receiver's own"),
    ],
)
def test_what_is_not_for_this_process_is_rejected_with_its_reason(datagram: bytes, reason: str) -> None:
    with pytest.raises(SealRejected) as caught:
        receiver().open(datagram)
    assert caught.value.reason == reason


def test_a_replayed_datagram_is_rejected() -> None:
    datagram, opener = sealer().seal(b"p"), receiver()
    opener.open(datagram)
    with pytest.raises(SealRejected, match="replayed"):
        opener.open(datagram)


@given(st.permutations(range(40)))
def test_datagrams_that_overtake_each_other_open_once_each(order: list[int]) -> None:
    sender, opener = sealer(), receiver()
    datagrams = [sender.seal(b"%d" % i) for i in range(40)]
    assert {opener.open(datagrams[i]).payload for i in order} == {b"%d" % i for i in range(40)}
    for datagram in datagrams:
        with pytest.raises(SealRejected, match="replayed"):
            opener.open(datagram)


def test_a_datagram_older_than_the_replay_window_is_rejected() -> None:
    sender, opener = sealer(), receiver()
    datagrams = [sender.seal(b"p") for _ in range(REPLAY_WINDOW + 1)]
    opener.open(datagrams[-1])
    opener.open(datagrams[1])
    with pytest.raises(SealRejected, match="replayed"):
        opener.open(datagrams[0])


def test_a_rejected_datagram_leaves_its_counter_free_for_the_true_one() -> None:
    sender, opener = sealer(), receiver()
    datagram = sender.seal(b"p")
    forged = datagram[:-1] + bytes([datagram[-1] ^ 1])
    for _ in range(2):
        with pytest.raises(SealRejected, match="tampered"):
            opener.open(forged)
    assert opener.open(datagram).payload == b"p"


def test_a_stranger_takes_no_room_and_its_datagram_opens_again_until_it_is_admitted() -> None:
    opener, sender = receiver(), sealer(b"a stranger's id ")
    datagram = sender.seal(b"p")
    opened = [opener.open(datagram) for _ in range(2)]
    assert [o.is_admitted for o in opened] == [False, False]
    opener.admit(opened[0])
    with pytest.raises(SealRejected, match="replayed"):
        opener.open(datagram)
    assert opener.open(sender.seal(b"next")).is_admitted


def test_processes_admitted_are_bounded_and_the_longest_silent_is_forgotten() -> None:
    opener = receiver()
    for index in range(BOOTS_MAX):
        opener.admit(Opened(index.to_bytes(16, "big"), 1, b"", is_admitted=False))
    assert len(opener._boots) == BOOTS_MAX
    assert not opener.open(sealer().seal(b"")).is_admitted


def test_a_replay_is_rejected_whatever_key_came_between() -> None:
    ring = Keyring([KEY, OTHER_KEY], "c")
    sender, opener = DatagramSealer(ring, BOOT), receiver(keys=(KEY, OTHER_KEY))
    datagram = sender.seal(b"p")
    opener.open(datagram)
    ring.primary_id = key_id(OTHER_KEY)
    assert opener.open(sender.seal(b"q")).is_admitted
    with pytest.raises(SealRejected, match="replayed"):
        opener.open(datagram)


def test_a_ring_of_two_keys_opens_both_and_seals_with_the_first() -> None:
    both = (OTHER_KEY, KEY)
    assert receiver(keys=both).open(sealer(keys=(KEY,)).seal(b"old")).payload == b"old"
    assert receiver(keys=(OTHER_KEY,)).open(sealer(keys=both).seal(b"new")).payload == b"new"


def test_a_boot_id_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes, this one 3"):
        sealer(b"abc")


def test_a_new_key_is_read_back() -> None:
    assert len(parse_key(new_key() + "\n")) == 32


@pytest.mark.parametrize("text", ["", "not base64!", "QUJD"], ids=["empty", "no base64", "three bytes"])
def test_what_is_no_key_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(ValueError, match="cluster key") as caught:
        parse_key(text)
    assert not text or text not in str(caught.value)


def test_a_ring_without_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one key"):
        Keyring([])


def test_a_rotation_is_followed_by_a_sealer_that_runs() -> None:
    ring, other = Keyring([KEY], "c"), Keyring([KEY, OTHER_KEY], "c")
    sender, opener = DatagramSealer(ring, BOOT), receiver_with(other)
    old = [sender.seal(b"old") for _ in range(2)]
    assert ring.install(OTHER_KEY) == key_id(OTHER_KEY)
    assert opener.open(sender.seal(b"still old")).payload == b"still old"
    ring.use(key_id(OTHER_KEY))
    new = sender.seal(b"new")
    assert new[1:5] == key_id(OTHER_KEY), "sealed under the new primary at once"
    assert opener.open(new).payload == b"new"
    assert opener.open(old[0]).payload == b"old", "and the old one is accepted until it is removed"
    other.use(key_id(OTHER_KEY))
    other.remove(key_id(KEY))
    with pytest.raises(SealRejected, match="unknown key"):
        opener.open(old[1])
    with pytest.raises(SealRejected, match="unknown key"):
        opener.open(old[0])


def test_a_key_that_comes_back_brings_no_replay_with_it() -> None:
    ring = Keyring([OTHER_KEY, KEY], "c")
    opener, datagram = receiver_with(ring), sealer().seal(b"p")
    opener.open(datagram)
    ring.remove(key_id(KEY))
    ring.install(KEY)
    with pytest.raises(SealRejected, match="replayed"):
        opener.open(datagram)


def test_each_change_of_a_ring_may_be_repeated() -> None:
    ring = Keyring([KEY])
    for _ in range(2):
        ring.install(OTHER_KEY)
        assert (ring.key_ids, ring.keys) == ((key_id(KEY), key_id(OTHER_KEY)), (KEY, OTHER_KEY))
    for _ in range(2):
        ring.use(key_id(OTHER_KEY))
        assert (ring.key_ids, ring.keys) == ((key_id(OTHER_KEY), key_id(KEY)), (OTHER_KEY, KEY))
    for _ in range(2):
        ring.remove(key_id(KEY))
        assert (ring.key_ids, ring.keys) == ((key_id(OTHER_KEY),), (OTHER_KEY,))


def test_a_ring_keeps_the_key_it_seals_with_and_uses_none_it_does_not_hold() -> None:
    ring = Keyring([KEY, OTHER_KEY])
    with pytest.raises(KeyRefused, match=f"{key_id(KEY).hex()} is the primary"):
        ring.remove(key_id(KEY))
    with pytest.raises(KeyRefused, match="not installed here"):
        ring.use(b"none")
    assert ring.key_ids == (key_id(KEY), key_id(OTHER_KEY))


def test_a_ring_is_bounded() -> None:
    ring = Keyring([bytes([i]) * 32 for i in range(KEYS_MAX)])
    with pytest.raises(KeyRefused, match=f"holds {KEYS_MAX} keys"):
        ring.install(KEY)
    ring.install(bytes([0]) * 32)  # held already
    assert len(ring.key_ids) == KEYS_MAX
    with pytest.raises(ValueError, match=f"exceeds {KEYS_MAX}"):
        Keyring([*ring.keys, KEY])


def test_a_key_whose_id_another_one_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Keyring([KEY])
    monkeypatch.setattr("mesh.seal.key_id", lambda key: key_id(KEY))
    with pytest.raises(KeyRefused, match="another key has the id"):
        ring.install(OTHER_KEY)
    assert ring.keys == (KEY,)
