"""The link protocol between two ends in memory: every frame crosses as bytes, cut wherever the test likes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh import link as link_module
from mesh.errors import HandshakeRefused, MalformedFrame, NoCapacity, SealRejected
from mesh.link import (
    CODE_CHARS_MAX,
    CODE_NO_CAPACITY,
    EVENT_BYTES_MAX,
    EVENTS_BYTES_MAX,
    FRAME_BYTES_MAX,
    LOAD_BYTES_MAX,
    MESSAGE_CHARS_MAX,
    REQUEST_BYTES_MAX,
    Link,
    LinkState,
)
from mesh.link_events import (
    Established,
    EventsReceived,
    LinkClosed,
    LinkEvent,
    PongReceived,
    StreamCancelled,
    StreamEnded,
    StreamOpened,
)
from mesh.link_handshake import (
    HANDSHAKE_BYTES_MAX,
    NODE_ID_BYTES_MAX,
    UNSPECIFIED,
    Hello,
    Role,
    cluster_hash,
    decode_hello,
    encode_hello,
    encode_refusal,
)
from mesh.link_seal import TAG_BYTES, FrameSealer, prove
from mesh.seal import DEVELOPMENT_KEY, KEY_BYTES, Keyring, key_id

KEYRING = Keyring([DEVELOPMENT_KEY])
OTHER_KEY = b"o" * KEY_BYTES
HELLO = Hello(1, 1, cluster_hash("ai-cluster"), KEYRING.primary_id, "a", b"A" * 16, b"1" * 32)


def initiator(keyring: Keyring = KEYRING, expected: str | None = "b") -> Link:
    return Link(
        Role.INITIATOR, keyring=keyring, node_id="a", boot_id=b"A" * 16, nonce=b"1" * 32, expected_node_id=expected
    )


def responder(keyring: Keyring = KEYRING, nonce: bytes = b"2" * 32) -> Link:
    return Link(Role.RESPONDER, keyring=keyring, node_id="b", boot_id=b"B" * 16, nonce=nonce)


def pair() -> tuple[Link, Link]:
    """Both OPEN, with nothing on the way."""
    a, b = initiator(), responder()
    b.receive(a.data_to_send())
    a.receive(b.data_to_send())
    b.receive(a.data_to_send())
    a.receive(b.data_to_send())
    assert a.is_open
    assert b.is_open
    return a, b


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def hello_frame(hello: Hello, keyring: Keyring = KEYRING) -> bytes:
    """A hello as an initiator with that keyring sends it, proven under its first key."""
    said = b"\x01" + encode_hello(hello)
    return frame(said + prove(keyring, keyring.primary_id, Role.INITIATOR.value, said))


def sealed(link: Link, fields: object) -> bytes:
    """A frame of any content under the session of `link`, as its peer would read it."""
    assert link._session is not None
    return link._session.sealer.seal(msgpack.packb(fields))


def test_a_handshake_makes_both_ends_known_to_each_other() -> None:
    a, b = initiator(), responder()
    assert b.receive(a.data_to_send()) == []
    assert b.state is LinkState.AWAIT_PROOF
    assert a.receive(b.data_to_send()) == [Established("b", b"B" * 16, 1)]
    assert b.receive(a.data_to_send()) == [Established("a", b"A" * 16, 1)]
    assert a.receive(b.data_to_send(b"load")) == [PongReceived(1, b"load")]
    assert a.is_open
    assert b.is_open


@pytest.mark.parametrize(
    ("keys", "cluster_name", "reason"),
    [
        pytest.param([OTHER_KEY], "ai-cluster", "unknown key", id="another key"),
        pytest.param([DEVELOPMENT_KEY], "staging", "other cluster", id="another cluster name"),
        pytest.param([OTHER_KEY], "staging", "other cluster", id="another key and cluster name"),
    ],
)
def test_a_responder_says_why_it_refuses_and_both_ends_close(keys: list[bytes], cluster_name: str, reason: str) -> None:
    a, b = initiator(Keyring(keys, cluster_name)), responder()
    with pytest.raises(HandshakeRefused) as at_responder:
        b.receive(a.data_to_send())
    with pytest.raises(HandshakeRefused) as at_initiator:
        a.receive(b.data_to_send())
    assert at_responder.value.reason == at_initiator.value.reason == reason
    assert a.is_closed
    assert b.is_closed


@pytest.mark.parametrize(
    ("hello", "keyring", "reason"),
    [
        pytest.param(
            replace(HELLO, version_min=2, version_max=3), KEYRING, "protocol version", id="only later versions"
        ),
        pytest.param(
            replace(HELLO, version_min=-1, version_max=0), KEYRING, "protocol version", id="only older versions"
        ),
        pytest.param(HELLO, Keyring([OTHER_KEY]), "wrong key", id="the id of a key it does not hold"),
        pytest.param(replace(HELLO, node_id="b"), KEYRING, "fenced", id="the responder's own name"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused(hello: Hello, keyring: Keyring, reason: str) -> None:
    b = responder()
    with pytest.raises(HandshakeRefused, match=reason):
        b.receive(hello_frame(hello, keyring))
    assert encode_refusal(reason) in b.data_to_send()


def test_versions_that_overlap_agree_on_the_highest_common_one() -> None:
    b = responder()
    b.receive(hello_frame(replace(HELLO, version_min=0, version_max=9)))
    assert b.state is LinkState.AWAIT_PROOF


def test_while_keys_are_rotated_the_initiators_key_is_used() -> None:
    a = initiator(Keyring([DEVELOPMENT_KEY, OTHER_KEY]))
    b = responder(Keyring([OTHER_KEY, DEVELOPMENT_KEY]))
    b.receive(a.data_to_send())
    assert [type(event) for event in a.receive(b.data_to_send())] == [Established]


def test_a_refusal_in_words_of_a_later_version_is_unspecified() -> None:
    with pytest.raises(HandshakeRefused) as raised:
        initiator().receive(frame(encode_refusal("x" * 500)))
    assert raised.value.reason == UNSPECIFIED


def test_a_responder_that_does_not_hold_the_key_is_not_believed() -> None:
    a = initiator()
    said = b"\x01" + encode_hello(replace(HELLO, node_id="b"))
    with pytest.raises(SealRejected, match="wrong key"):
        a.receive(frame(said + prove(Keyring([OTHER_KEY]), Keyring([OTHER_KEY]).primary_id, b"responder", said)))


def test_an_answer_to_another_hello_is_not_believed() -> None:
    recorded = responder()
    recorded.receive(hello_frame(replace(HELLO, nonce=b"9" * 32)))
    with pytest.raises(SealRejected, match="wrong key"):
        initiator().receive(recorded.data_to_send())


def test_a_hello_sent_back_to_its_sender_is_not_believed() -> None:
    a = initiator()
    with pytest.raises(SealRejected, match="wrong key"):
        a.receive(a.data_to_send())


def test_a_peer_of_another_name_is_refused() -> None:
    a, b = initiator(expected="c"), responder()
    b.receive(a.data_to_send())
    with pytest.raises(HandshakeRefused, match="other node"):
        a.receive(b.data_to_send())
    assert not a.has_data_to_send, "whoever it is gets no proof"


def test_a_replayed_conversation_opens_nothing() -> None:
    a, b = initiator(), responder()
    hello = a.data_to_send()
    b.receive(hello)
    a.receive(b.data_to_send())
    a.queue_open(b"request")
    frames = a.data_to_send()
    again = responder(nonce=b"3" * 32)
    again.receive(hello)
    with pytest.raises(SealRejected, match="tampered"):
        again.receive(frames)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\x00", id="an unknown kind"),
        pytest.param(b"\x01", id="an empty hello"),
        pytest.param(b"\x02" + msgpack.packb("wrong key"), id="a refusal that nobody asked for"),
        pytest.param(b"\x01" + msgpack.packb([1, 2]) + b"p" * 32, id="a hello that is a list"),
        pytest.param(b"\x01" + msgpack.packb({"v": [1, 1]}) + b"p" * 32, id="a hello without fields"),
        pytest.param(b"\x01" + encode_hello(HELLO) + b"extra" + b"p" * 32, id="a hello with a second object"),
        pytest.param(b"\x01" + encode_hello(replace(HELLO, nonce=b"short")) + b"p" * 32, id="a short nonce"),
        pytest.param(b"\x01" + encode_hello(replace(HELLO, node_id="")) + b"p" * 32, id="an empty node id"),
        pytest.param(
            b"\x01" + encode_hello(replace(HELLO, node_id="n" * (NODE_ID_BYTES_MAX + 1))) + b"p" * 32,
            id="a long node id",
        ),
        pytest.param(
            b"\x01" + encode_hello(replace(HELLO, version_max="1")) + b"p" * 32,  # type: ignore[arg-type]
            id="a version that is text",
        ),
    ],
)
def test_a_malformed_hello_is_no_frame(body: bytes) -> None:
    b = responder()
    with pytest.raises(MalformedFrame):
        b.receive(frame(body))
    assert b.is_closed
    assert b.data_to_send() == b""


def test_fields_of_later_versions_in_a_hello_are_ignored() -> None:
    fields = msgpack.unpackb(encode_hello(HELLO)) | {"later": [1]}
    assert decode_hello(msgpack.packb(fields)) == HELLO


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
        pytest.param(b"\x15\x03\x01\x00\x02\x02\x28", id="a TLS alert"),
        pytest.param((HANDSHAKE_BYTES_MAX + 1).to_bytes(4, "big"), id="a length above the limit"),
        pytest.param(b"\x00" * 4, id="a length of zero"),
    ],
)
def test_a_stranger_is_known_by_its_first_four_bytes(data: bytes) -> None:
    with pytest.raises(MalformedFrame, match="bytes"):
        responder().receive(data)


@pytest.mark.parametrize("data", [b"HTTP/1.1 400 \r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28"], ids=["HTTP", "TLS"])
def test_an_http_server_that_was_taken_for_a_node_is_called_that(data: bytes) -> None:
    with pytest.raises(MalformedFrame, match="HTTP server"):
        initiator().receive(data)


def test_an_unproven_initiator_cannot_make_the_responder_hold_a_large_frame() -> None:
    a, b = initiator(), responder()
    b.receive(a.data_to_send())
    with pytest.raises(MalformedFrame, match=str(HANDSHAKE_BYTES_MAX)):
        b.receive((HANDSHAKE_BYTES_MAX + 1).to_bytes(4, "big"))


def every_frame(send: Callable[[], bytes], receive: Callable[[bytes], list[LinkEvent]], cut: int) -> list[LinkEvent]:
    data = send()
    return [event for start in range(0, len(data), cut) for event in receive(data[start : start + cut])]


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 64, 10**6], ids=lambda cut: f"{cut} bytes at a time")
def test_a_conversation_is_the_same_however_its_bytes_are_cut(cut: int) -> None:
    a, b = initiator(), responder()
    assert every_frame(a.data_to_send, b.receive, cut) == []
    assert every_frame(b.data_to_send, a.receive, cut) == [Established("b", b"B" * 16, 1)]
    first, second = a.queue_open(b"one"), a.queue_open(b"two")
    assert every_frame(a.data_to_send, b.receive, cut) == [
        Established("a", b"A" * 16, 1),
        StreamOpened(first, b"one"),
        StreamOpened(second, b"two"),
    ]
    b.queue_event(first, ["x", [1]])
    b.queue_event(second, None)
    b.queue_end(first, "busy", "later", 1.5)
    assert every_frame(lambda: b.data_to_send(b"load"), a.receive, cut) == [
        EventsReceived([[first, ["x", [1]]], [second, None]], b"load"),  # type: ignore[list-item]
        PongReceived(1, b"load"),
        StreamEnded(first, "busy", "later", 1.5),
    ]
    assert a.queue_cancel(second)
    a.queue_close()
    assert every_frame(a.data_to_send, b.receive, cut) == [StreamCancelled(second), LinkClosed()]
    assert b.is_closed


def test_what_follows_the_end_of_a_link_is_ignored() -> None:
    a, b = pair()
    a.queue_close()
    assert b.receive(a.data_to_send() + b"\xff" * 100) == [LinkClosed()]
    assert b.receive(b"\xff" * 100) == []


def test_the_events_of_all_streams_leave_in_one_frame() -> None:
    a, b = pair()
    ids = [a.queue_open(b"") for _ in range(64)]
    b.receive(a.data_to_send())
    frames_before = b.frames_out
    for stream_id in ids:
        b.queue_event(stream_id, ["token", [stream_id]])
    (received,) = a.receive(b.data_to_send())
    assert b.frames_out == frames_before + 1
    assert received == EventsReceived([[i, ["token", [i]]] for i in ids], b"")  # type: ignore[misc]
    assert b.pending_bytes == 0


def test_events_beyond_64_kib_are_cut_into_frames_and_the_end_comes_last() -> None:
    a, b = pair()
    stream_id = a.queue_open(b"")
    b.receive(a.data_to_send())
    sizes = [30_000, 30_000, 30_000, 200_000, 10]
    for size in sizes:
        b.queue_event(stream_id, b"x" * size)
    b.queue_end(stream_id, None)
    events = a.receive(b.data_to_send(b"load"))
    batches = [event for event in events if isinstance(event, EventsReceived)]
    assert [[len(item) for _, item in batch.events] for batch in batches] == [  # type: ignore[arg-type]
        [30_000, 30_000],
        [30_000],
        [200_000],
        [10],
    ]
    assert [batch.load for batch in batches] == [b"load", b"", b"", b""]
    assert events[-1] == StreamEnded(stream_id, None, "", 0.0)
    assert all(sum(len(item) for _, item in b.events) <= EVENTS_BYTES_MAX or len(b.events) == 1 for b in batches)  # type: ignore[arg-type]


def test_the_largest_request_crosses_and_a_larger_one_does_not() -> None:
    a, b = pair()
    stream_id = a.queue_open(b"r" * REQUEST_BYTES_MAX)
    (opened,) = b.receive(a.data_to_send())
    assert opened == StreamOpened(stream_id, b"r" * REQUEST_BYTES_MAX)
    with pytest.raises(ValueError, match=str(REQUEST_BYTES_MAX)):
        a.queue_open(b"r" * (REQUEST_BYTES_MAX + 1))
    assert not a.has_data_to_send


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(b"x" * EVENT_BYTES_MAX, id="too large"),
        pytest.param(object(), id="not for msgpack"),
        pytest.param("\ud800", id="half a surrogate pair"),
        pytest.param(2**70, id="an integer too large"),
    ],
)
def test_an_event_that_no_frame_can_carry_is_the_senders_error(event: object) -> None:
    a, b = pair()
    stream_id = a.queue_open(b"")
    b.receive(a.data_to_send())
    with pytest.raises((ValueError, TypeError, OverflowError)):
        b.queue_event(stream_id, event)
    b.queue_event(stream_id, "good")
    assert a.receive(b.data_to_send()) == [EventsReceived([[stream_id, "good"]], b"")]  # type: ignore[list-item]


def test_a_load_report_above_its_limit_is_the_senders_error() -> None:
    with pytest.raises(ValueError, match=str(LOAD_BYTES_MAX)):
        pair()[0].data_to_send(b"x" * (LOAD_BYTES_MAX + 1))


def test_an_end_with_a_long_or_odd_message_still_crosses() -> None:
    a, b = pair()
    stream_id = a.queue_open(b"")
    b.receive(a.data_to_send())
    b.queue_end(stream_id, "failed", "\ud800" + "m" * 10_000)
    (ended,) = a.receive(b.data_to_send())
    assert isinstance(ended, StreamEnded)
    assert len(ended.message) == MESSAGE_CHARS_MAX


def test_a_stream_ends_once() -> None:
    a, b = pair()
    stream_id = a.queue_open(b"")
    b.receive(a.data_to_send())
    b.queue_end(stream_id, None)
    b.queue_end(stream_id, "again")
    assert a.receive(b.data_to_send()) == [StreamEnded(stream_id, None, "", 0.0)]
    assert not a.queue_cancel(stream_id), "what has ended needs no cancel"
    assert a.stream_count == b.stream_count == 0


def test_a_cancel_and_an_end_that_cross_are_both_ignored() -> None:
    a, b = pair()
    stream_id = a.queue_open(b"")
    b.receive(a.data_to_send())
    assert a.queue_cancel(stream_id)
    assert not a.queue_cancel(stream_id)
    b.queue_end(stream_id, None)
    assert a.receive(b.data_to_send()) == []
    assert b.receive(a.data_to_send()) == []


def test_pings_are_answered_together_by_the_last_of_them() -> None:
    a, b = pair()
    last = [a.queue_ping() for _ in range(5)][-1]
    b.receive(a.data_to_send())
    assert a.receive(b.data_to_send()) == [PongReceived(last, b"")]
    assert b.data_to_send() == b""


def test_streams_beyond_the_limit_are_refused_at_either_end(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair()
    ids = [a.queue_open(b"") for _ in range(3)]
    monkeypatch.setattr(link_module, "STREAMS_MAX", 2)
    assert b.receive(a.data_to_send()) == [StreamOpened(ids[0], b""), StreamOpened(ids[1], b"")]
    (ended,) = a.receive(b.data_to_send())
    assert isinstance(ended, StreamEnded)
    assert (ended.stream_id, ended.code) == (ids[2], CODE_NO_CAPACITY)
    with pytest.raises(NoCapacity):
        a.queue_open(b"")


def test_unknown_frames_and_trailing_fields_of_later_versions_are_ignored() -> None:
    a, b = pair()
    assert b.receive(sealed(a, [99, {"new": True}])) == []
    assert b.receive(sealed(a, [1, 5, b"request", "new field"])) == [StreamOpened(5, b"request")]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"a": 1}, id="a map"),
        pytest.param([], id="nothing"),
        pytest.param(["open"], id="a type in words"),
        pytest.param([1], id="OPEN without fields"),
        pytest.param([1, 1, "text"], id="OPEN with a text"),
        pytest.param([1, "1", b""], id="OPEN with a text as id"),
        pytest.param([1, 0, b""], id="OPEN with an id used before"),
        pytest.param([2, []], id="EVENTS from the initiator"),
        pytest.param([3, 1, None, "", 0.0], id="END from the initiator"),
        pytest.param([4], id="CANCEL without an id"),
        pytest.param([5, None], id="PING without an id"),
        pytest.param([6, 1, "load"], id="PONG with a text as load"),
    ],
)
def test_a_sealed_frame_with_wrong_content_closes_the_responder(fields: object) -> None:
    a, b = pair()
    with pytest.raises(MalformedFrame):
        b.receive(sealed(a, fields))
    assert b.is_closed


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param([2], id="EVENTS without events"),
        pytest.param([2, [1]], id="EVENTS that are no pairs"),
        pytest.param([2, [[1, 2, 3]]], id="EVENTS that are triples"),
        pytest.param([2, [["1", 2]]], id="EVENTS with a text as id"),
        pytest.param([2, [{1: 2, 3: 4}]], id="EVENTS that are maps of two"),
        pytest.param([2, [b"ab"]], id="EVENTS that are two bytes"),
        pytest.param([2, [], "load"], id="EVENTS with a text as load"),
        pytest.param([3, 1, 5, "", 0.0], id="END with a number as code"),
        pytest.param([3, 1, "c" * (CODE_CHARS_MAX + 1), "", 0.0], id="END with a long code"),
        pytest.param([3, 1, None, None, 0.0], id="END without a message"),
        pytest.param([3, 1, None, "", float("nan")], id="END with a time that is no number"),
        pytest.param([3, 1, None, "", "soon"], id="END with a time in words"),
        pytest.param([1, 1, b""], id="OPEN from the responder"),
        pytest.param([4, 1], id="CANCEL from the responder"),
    ],
)
def test_a_sealed_frame_with_wrong_content_closes_the_initiator(fields: object) -> None:
    a, b = pair()
    with pytest.raises(MalformedFrame):
        a.receive(sealed(b, fields))
    assert a.is_closed


@pytest.mark.parametrize("size", [FRAME_BYTES_MAX + 1, TAG_BYTES - 1, 0], ids=["too large", "too small", "empty"])
def test_a_frame_of_an_impossible_size_is_refused_before_it_arrives(size: int) -> None:
    _, b = pair()
    with pytest.raises(MalformedFrame, match=str(size)):
        b.receive(size.to_bytes(4, "big"))


def replayed(frames: list[bytes]) -> bytes:
    return frames[0] + frames[0]


def swapped(frames: list[bytes]) -> bytes:
    return frames[1] + frames[0]


def lost(frames: list[bytes]) -> bytes:
    return frames[1]


def flipped(frames: list[bytes]) -> bytes:
    return frames[0][:-1] + bytes([frames[0][-1] ^ 1])


@pytest.mark.parametrize("tamper", [replayed, swapped, lost, flipped])
def test_frames_that_were_tampered_with_do_not_open(tamper: Callable[[list[bytes]], bytes]) -> None:
    a, b = pair()
    frames = [sealed(a, [1, stream_id, b""]) for stream_id in (1, 2)]
    with pytest.raises(SealRejected, match="tampered"):
        b.receive(tamper(frames))
    assert b.is_closed


def test_a_frame_of_the_other_direction_does_not_open() -> None:
    a, _ = pair()
    with pytest.raises(SealRejected, match="tampered"):
        a.receive(sealed(a, [6, 1]))


def test_a_length_that_was_tampered_with_does_not_open() -> None:
    sealer, opener = (FrameSealer(KEYRING, KEYRING.primary_id, b"initiator", b"t", b"n") for _ in range(2))
    data = sealer.seal(b"body")
    with pytest.raises(SealRejected):
        opener.open(b"\x00\x00\x00\x15", data[4:])


def test_bytes_and_frames_are_counted_alike_at_both_ends() -> None:
    a, b = pair()
    assert (a.bytes_out, a.frames_out) == (b.bytes_in, b.frames_in)
    assert (b.bytes_out, b.frames_out) == (a.bytes_in, a.frames_in)


@given(st.binary(max_size=2000))
@settings(deadline=None)
def test_any_bytes_at_first_contact_are_refused_or_waited_for(data: bytes) -> None:
    for link in (initiator(), responder()):
        try:
            assert link.receive(data) == []
        except (MalformedFrame, SealRejected, HandshakeRefused):
            assert link.is_closed


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_any_hello_is_refused_or_answered(body: bytes) -> None:
    for link in (initiator(), responder()):
        with pytest.raises((MalformedFrame, SealRejected, HandshakeRefused)):
            link.receive(frame(b"\x01" + body))


objects = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.integers(0, 9), st.lists(objects, max_size=5))
@settings(deadline=None)
def test_any_sealed_content_is_understood_or_closes_the_link(kind: int, fields: list[object]) -> None:
    a, b = pair()
    for source, target in ((a, b), (b, a)):
        try:
            events = target.receive(sealed(source, [kind, *fields]))
        except (MalformedFrame, SealRejected):
            assert target.is_closed
        else:
            assert len(events) <= 1


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_under_a_good_seal_are_understood_or_close_the_link(body: bytes) -> None:
    a, b = pair()
    assert a._session is not None
    try:
        b.receive(a._session.sealer.seal(body))
    except MalformedFrame:
        assert b.is_closed


@given(st.lists(st.tuples(st.integers(0, 3), objects), max_size=30), st.binary(max_size=40))
@settings(deadline=None)
def test_events_arrive_in_order_and_unchanged(sent: list[tuple[int, object]], load: bytes) -> None:
    a, b = pair()
    ids = [a.queue_open(b"") for _ in range(4)]
    b.receive(a.data_to_send())
    for index, item in sent:
        b.queue_event(ids[index], item)
    received = [
        pair for event in a.receive(b.data_to_send(load)) if isinstance(event, EventsReceived) for pair in event.events
    ]
    assert repr(received) == repr([[ids[index], item] for index, item in sent])


# Rotation of keys while the link lives.


def pair_of_rings() -> tuple[Keyring, Keyring, Link, Link]:
    """Both rings hold both keys, the development key first; the link is OPEN."""
    rings = [Keyring([DEVELOPMENT_KEY, OTHER_KEY]) for _ in range(2)]
    a, b = initiator(rings[0]), responder(rings[1])
    deliver(a, b)
    return rings[0], rings[1], a, b


def deliver(a: Link, b: Link) -> list[LinkEvent]:
    """Everything both have to say, until both are silent."""
    events: list[LinkEvent] = []
    while a.has_data_to_send or b.has_data_to_send:
        events += b.receive(a.data_to_send())
        events += a.receive(b.data_to_send())
    return events


def test_a_link_is_sealed_under_another_key_while_its_streams_go_on() -> None:
    ring_a, ring_b, a, b = pair_of_rings()
    stream_id = a.queue_open(b"request")
    deliver(a, b)
    for ring in (ring_a, ring_b):
        ring.use(key_id(OTHER_KEY))
    b.queue_event(stream_id, "before")
    b.queue_rekey()
    b.queue_event(stream_id, "after")
    a.queue_rekey()
    events = deliver(a, b)
    assert [pair for event in events if isinstance(event, EventsReceived) for pair in event.events] == [
        [stream_id, "before"], [stream_id, "after"],
    ]  # fmt: skip
    for ring in (ring_a, ring_b):
        ring.remove(key_id(DEVELOPMENT_KEY))
    assert {a.sealing_key_id, a.opening_key_id, b.sealing_key_id, b.opening_key_id} == {key_id(OTHER_KEY)}
    b.queue_end(stream_id, None)
    assert deliver(a, b) == [StreamEnded(stream_id, None, "", 0.0)]


def test_an_end_that_answered_under_the_peers_key_follows_when_the_peer_shows_its_own() -> None:
    ring_a, ring_b = Keyring([DEVELOPMENT_KEY, OTHER_KEY]), Keyring([OTHER_KEY, DEVELOPMENT_KEY])
    a, b = initiator(ring_a), responder(ring_b)
    deliver(a, b)
    assert b.sealing_key_id == key_id(DEVELOPMENT_KEY)
    ring_a.use(key_id(OTHER_KEY))
    a.queue_rekey()
    deliver(a, b)
    assert b.sealing_key_id == a.opening_key_id == key_id(OTHER_KEY)


def test_frames_after_a_rekey_do_not_open_under_the_former_key() -> None:
    ring_a, _, a, b = pair_of_rings()
    assert b._session is not None
    former = b._session.opener
    ring_a.use(key_id(OTHER_KEY))
    a.queue_rekey()
    a.queue_ping()
    data = a.data_to_send()
    size = 4 + int.from_bytes(data[:4], "big")
    former.open(data[:4], data[4:size])  # the rekey itself
    with pytest.raises(SealRejected, match="tampered"):
        former.open(data[size : size + 4], data[size + 4 :])


def test_there_and_back_uses_no_subkey_twice() -> None:
    ring_a, _, a, b = pair_of_rings()
    sealers = []
    for identity in (OTHER_KEY, DEVELOPMENT_KEY, OTHER_KEY):
        ring_a.use(key_id(identity))
        a.queue_rekey()
        deliver(a, b)
        assert a._session is not None
        sealers.append(a._session.sealer)
    assert len({sealer._cipher.encrypt(b"n" * 12, b"same", b"") for sealer in sealers}) == 3


def test_a_rekey_to_a_key_that_is_not_held_closes_the_link() -> None:
    a = initiator(ring := Keyring([DEVELOPMENT_KEY]))
    b = responder()
    deliver(a, b)
    ring.install(OTHER_KEY)
    ring.use(key_id(OTHER_KEY))
    a.queue_rekey()
    with pytest.raises(SealRejected, match="unknown key"):
        b.receive(a.data_to_send())
    assert b.is_closed


def test_a_rekey_to_the_key_in_use_sends_nothing() -> None:
    _, _, a, _ = pair_of_rings()
    a.queue_rekey()
    assert not a.has_data_to_send


def test_a_key_removed_during_a_handshake_opens_no_link() -> None:
    ring = Keyring([OTHER_KEY, DEVELOPMENT_KEY])
    a, b = initiator(), responder(ring)
    b.receive(a.data_to_send())
    ring.remove(key_id(DEVELOPMENT_KEY))
    a.receive(b.data_to_send())
    with pytest.raises(SealRejected, match="unknown key"):
        b.receive(a.data_to_send())


@pytest.mark.parametrize("field", [None, 3, "text", b"", b"longer"], ids=repr)
def test_a_rekey_of_a_wrong_form_closes_the_link(field: object) -> None:
    a, b = pair()
    with pytest.raises((MalformedFrame, SealRejected)):
        b.receive(sealed(a, [8, field]))
    assert b.is_closed
