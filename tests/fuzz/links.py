"""Link.receive under fuzzing: clear handshake bytes, hellos proven though mutated, and sealed frames of odd content.

What a link rejects closes it and changes no stream; what it accepts leaves bounded state that still sends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgpack

from mesh.errors import HandshakeRefused, MalformedFrame, SealRejected
from mesh.link import STREAMS_MAX, Link
from mesh.link_events import LinkEvent
from mesh.link_handshake import Role, encode_hello
from mesh.link_seal import LENGTH_BYTES, prove
from mesh.seal import BOOT_ID_BYTES, DEVELOPMENT_KEY, Keyring
from tests.fuzz.messages import frames

KEYS = Keyring([DEVELOPMENT_KEY])
# How the rest of an input is taken, by its first byte.
CLEAR_TO_RESPONDER, CLEAR_TO_INITIATOR, PROVEN_HELLO, SEALED_TO_RESPONDER, SEALED_TO_INITIATOR, UNSEALED = range(6)
MODES = (CLEAR_TO_RESPONDER, CLEAR_TO_INITIATOR, PROVEN_HELLO, UNSEALED) + 4 * (
    SEALED_TO_RESPONDER,
    SEALED_TO_INITIATOR,
)
FRAMES_A_LINK = 500  # then a fresh pair takes over
STREAMS_A_PAIR = 8
HANDSHAKE_WEIGHT = 10  # handshakes among the seeds: as many as frames of one kind
MALFORMED = "malformed"
REASONS = frozenset(
    {MALFORMED, "tampered", "unknown key", "wrong key", "other cluster", "protocol version", "unspecified", "fenced"}
)


def new_link(role: Role) -> Link:
    letter = role.value[:1]
    return Link(role, keyring=KEYS, node_id=letter.decode(), boot_id=letter * BOOT_ID_BYTES, nonce=letter * 32)


class Pair:
    """Two ends that have shaken hands, with streams open on them."""

    def __init__(self) -> None:
        self.initiator, self.responder = new_link(Role.INITIATOR), new_link(Role.RESPONDER)
        for _ in range(2):
            self.responder.receive(self.initiator.data_to_send())
            self.initiator.receive(self.responder.data_to_send())
        for _ in range(STREAMS_A_PAIR):
            self.initiator.queue_open(b"request")
        self.responder.receive(self.initiator.data_to_send())
        assert self.initiator.is_open
        assert self.responder.is_open
        self.frames = 0

    def end(self, role: Role) -> Link:
        return self.initiator if role is Role.INITIATOR else self.responder


def state_of(link: Link) -> tuple[object, ...]:
    """What a frame can change, its counts of frames and bytes left out."""
    return set(link._streams), link._last_stream_id, link._pong_due, link.pending_bytes, link.has_data_to_send


class LinkSubject:
    """Either end of a link, before, in and after the handshake."""

    name = "link"

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self._pair = Pair()

    def seeds(self) -> list[bytes]:
        hello = new_link(Role.INITIATOR).data_to_send()
        responder = new_link(Role.RESPONDER)
        responder.receive(hello)
        clear = [bytes([CLEAR_TO_RESPONDER]) + hello, bytes([CLEAR_TO_INITIATOR]) + responder.data_to_send()]
        clear.append(bytes([CLEAR_TO_INITIATOR]) + b"\x00\x00\x00\x0d\x02" + msgpack.packb("unknown key"))
        own = new_link(Role.INITIATOR)._handshake._own
        sealed = [bytes([mode]) + frame for mode in range(3, len(MODES)) for frame in frames()]
        return [*clear, bytes([PROVEN_HELLO]) + encode_hello(own)] * HANDSHAKE_WEIGHT + sealed

    def feed(self, data: bytes) -> None:
        mode = MODES[data[0] % len(MODES)] if data else CLEAR_TO_RESPONDER
        body = data[1:]
        if mode in (CLEAR_TO_RESPONDER, CLEAR_TO_INITIATOR):
            link = new_link(Role.RESPONDER if mode == CLEAR_TO_RESPONDER else Role.INITIATOR)
            for frame in frame_by_frame(body):
                if not link.is_closed:
                    self._receive(link, frame)
        elif mode == PROVEN_HELLO:
            said = b"\x01" + body
            proof = prove(KEYS, KEYS.primary_id, Role.INITIATOR.value, said)
            self._receive(new_link(Role.RESPONDER), framed(said + proof))
        else:
            self._receive_sealed(mode, body)

    def _receive_sealed(self, mode: int, body: bytes) -> None:
        pair = self._pair
        if pair.frames >= FRAMES_A_LINK or pair.initiator.is_closed or pair.responder.is_closed:
            pair = self._pair = Pair()
        pair.frames += 1
        role = Role.INITIATOR if mode == SEALED_TO_INITIATOR else Role.RESPONDER
        session = pair.end(role.other)._session
        assert session is not None
        self._receive(pair.end(role), framed(body) if mode == UNSEALED else session.sealer.seal(body))

    def _receive(self, link: Link, data: bytes) -> None:
        before = state_of(link)
        was_waiting = not link.is_open
        try:
            events = link.receive(data)
        except MalformedFrame:
            self._rejected(link, before, MALFORMED, is_refusing=False)
        except (SealRejected, HandshakeRefused) as exc:
            is_refusing = isinstance(exc, HandshakeRefused) and link.role is Role.RESPONDER
            self._rejected(link, before, exc.reason, is_refusing=is_refusing)
        else:
            assert all(isinstance(event, LinkEvent) for event in events)
            self.outcomes["accepted handshake" if was_waiting else "accepted frame"] += 1
            assert link.stream_count <= STREAMS_MAX
            assert len(link._buffer) <= len(data)
            assert isinstance(link.data_to_send(), bytes)

    def _rejected(self, link: Link, before: tuple[object, ...], reason: str, *, is_refusing: bool) -> None:
        assert reason in REASONS, f"an unknown reason {reason!r}"
        self.outcomes[reason] += 1
        assert link.is_closed, f"a link that rejected ({reason}) is not closed"
        assert not link._buffer
        assert link.receive(b"more") == []
        # A responder that declines owes the peer a word; nothing else is left behind.
        assert is_refusing or state_of(link) == before, f"what was rejected ({reason}) changed the link"
        assert isinstance(link.data_to_send(), bytes)


def frame_by_frame(data: bytes) -> Iterator[bytes]:
    """The frames that the data begins with, then the rest: one that is rejected is compared with what was before it."""
    while len(data) >= LENGTH_BYTES:
        end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "big")
        if end >= len(data):
            break
        yield data[:end]
        data = data[end:]
    yield data


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(LENGTH_BYTES, "big") + body
