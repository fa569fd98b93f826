"""The protocol of one peer link: bytes in, events out; calls in, bytes out. Sees no socket, no clock, no randomness.

A link is one TCP connection between two nodes that share a key. Its initiator opens streams on it, the responder serves
them. Each end is in one of four states:

    state        initiator                                 responder
    AWAIT_HELLO  has sent HELLO; a proven HELLO -> OPEN    HELLO with its proof -> answers HELLO -> AWAIT_PROOF
    AWAIT_PROOF  -                                         a sealed frame that opens -> OPEN
    OPEN         sealed frames                             sealed frames
    CLOSED       REFUSED, CLOSE or any error leads here    the same; sends REFUSED in clear when it declines

Handshake frames (link_handshake.py) are clear text: a length, a kind, msgpack. Until the first sealed frame has opened
the responder serves nothing and takes no frame above 1 KiB; the initiator sends that frame, a PING, at once.

Sealed frames are AES-256-GCM under a counter nonce, so their order is authenticated; the body is a msgpack array, its
first element the type. Unknown types and trailing elements are ignored: they belong to later versions. Events wait for
data_to_send() and leave together, those of all streams in one frame.

Either end may change the key of what it sends at any time: REKEY is its last frame under the former one. So a cluster
key is rotated, and the old one removed, while streams run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum, auto

import msgpack

from mesh.errors import HandshakeRefused, MalformedFrame, MeshError, NoCapacity, SealRejected
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
from mesh.link_handshake import HANDSHAKE_BYTES_MAX, Handshake, Role, Session, encode_refusal, unpack
from mesh.link_seal import LENGTH_BYTES, TAG_BYTES
from mesh.seal import Keyring

REQUEST_BYTES_MAX = 8 * 1024 * 1024  # the HTTP body limit is below it
LOAD_BYTES_MAX = 16 * 1024  # 24 bytes a model: room for hundreds
FRAME_BYTES_MAX = REQUEST_BYTES_MAX + LOAD_BYTES_MAX + 1024  # the largest request, its envelope and its tag
_HTTP_BEGINNINGS = (b"HTTP", b"\x15\x03")  # of an answer, and of a TLS alert; read as a length, each is above any
EVENTS_BYTES_MAX = 64 * 1024  # an EVENTS frame is cut here, so that the reader acts before a long one has arrived
EVENT_BYTES_MAX = 4 * 1024 * 1024  # one event, alone in its frame when large; half a frame leaves room for the rest
STREAMS_MAX = 4096  # open at once on one link: beyond any engine's slots and queue
CODE_CHARS_MAX = 64
MESSAGE_CHARS_MAX = 4096  # of an error's message; what is beyond is cut
CODE_NO_CAPACITY = "no_capacity"

_OPEN, _EVENTS, _END, _CANCEL, _PING, _PONG, _CLOSE, _REKEY = range(1, 9)


class LinkState(Enum):
    """See the table at the top of the module."""

    AWAIT_HELLO = auto()
    AWAIT_PROOF = auto()
    OPEN = auto()
    CLOSED = auto()


class Link:
    """One end of one link. After an error it is CLOSED; send what data_to_send() still gives, then close the socket.

    nonce: 32 random bytes never used before. expected_node_id: an initiator refuses a peer of another name.
    """

    def __init__(
        self,
        role: Role,
        *,
        keyring: Keyring,
        node_id: str,
        boot_id: bytes,
        nonce: bytes,
        expected_node_id: str | None = None,
    ) -> None:
        self.role = role
        self.state = LinkState.AWAIT_HELLO
        self.frames_in = self.frames_out = self.bytes_in = self.bytes_out = 0
        # The keys that what is sent and what is received are sealed under; empty before the handshake.
        self.sealing_key_id = self.opening_key_id = b""
        self._keyring = keyring
        self._handshake = Handshake(role, keyring, node_id, boot_id, nonce, expected_node_id)
        self._session: Session | None = None
        self._rekeys_sent = self._rekeys_received = 0
        self._must_rekey = False
        self._buffer = bytearray()
        self._handshake_out = b""
        self._packer = msgpack.Packer()
        self._events: list[bytes] = []
        self._controls: list[bytes] = []
        self._pending_bytes = 0
        self._streams: set[int] = set()
        self._last_stream_id = 0
        self._last_ping_id = 0
        self._pong_due = 0
        if role is Role.INITIATOR:
            self._queue_handshake(self._handshake.hello())

    @property
    def is_open(self) -> bool:
        return self.state is LinkState.OPEN

    @property
    def is_closed(self) -> bool:
        return self.state is LinkState.CLOSED

    @property
    def pending_bytes(self) -> int:
        """Size of what waits for data_to_send(), before sealing."""
        return self._pending_bytes

    @property
    def has_data_to_send(self) -> bool:
        return bool(self._handshake_out or self._events or self._controls or self._pong_due or self._must_rekey)

    @property
    def can_carry_load(self) -> bool:
        """True when a frame is queued that a load report may ride on: EVENTS or PONG."""
        return bool(self._events or self._pong_due)

    @property
    def stream_count(self) -> int:
        """Streams open now, as this end sees it."""
        return len(self._streams)

    # What the shell queues. Each needs an OPEN link.

    def queue_open(self, request: bytes) -> int:
        """Ask the responder; returns the stream id. Raises NoCapacity at STREAMS_MAX streams, with nothing queued."""
        assert self.role is Role.INITIATOR
        if len(request) > REQUEST_BYTES_MAX:
            raise ValueError(f"a request of {len(request)} bytes exceeds {REQUEST_BYTES_MAX}")
        if len(self._streams) >= STREAMS_MAX:
            raise NoCapacity(f"{STREAMS_MAX} streams are open on one peer link, which is the limit", 1.0)
        self._last_stream_id += 1
        self._streams.add(self._last_stream_id)
        self._queue([_OPEN, self._last_stream_id, request])
        return self._last_stream_id

    def queue_event(self, stream_id: int, event: object) -> None:
        """Raises ValueError above EVENT_BYTES_MAX and what msgpack raises for an object it cannot encode; then none is
        queued."""
        packed: bytes = self._packer.pack((stream_id, event))
        if len(packed) > EVENT_BYTES_MAX:
            raise ValueError(f"an event of {len(packed)} bytes exceeds {EVENT_BYTES_MAX}")
        self._events.append(packed)
        self._pending_bytes += len(packed)

    def queue_end(self, stream_id: int, code: str | None, message: str = "", retry_after_s: float = 0.0) -> None:
        """The stream's last word, sent behind its events. Nothing if the stream is not open any more.

        code: at most CODE_CHARS_MAX characters, None for a complete stream."""
        if stream_id in self._streams:
            self._streams.discard(stream_id)
            text = message[:MESSAGE_CHARS_MAX].encode("utf-8", "replace").decode()
            self._queue([_END, stream_id, code, text, retry_after_s])

    def queue_cancel(self, stream_id: int) -> bool:
        """False, and nothing is sent, if the stream has ended or was cancelled already."""
        if stream_id not in self._streams:
            return False
        self._streams.discard(stream_id)
        self._queue([_CANCEL, stream_id])
        return True

    def queue_ping(self) -> int:
        """Returns the id. An answer carries this or a later one."""
        self._last_ping_id += 1
        self._queue([_PING, self._last_ping_id])
        return self._last_ping_id

    def queue_close(self) -> None:
        """Say goodbye, so that the peer does not take the end for a failure."""
        self._queue([_CLOSE])

    def queue_rekey(self) -> None:
        """Seal under the keyring's primary key from the next frame on. Nothing where that is so already, or the link is
        not OPEN."""
        self._must_rekey = self.is_open and self.sealing_key_id != self._keyring.primary_id

    def data_to_send(self, load: bytes = b"") -> bytes:
        """Everything queued, sealed, in order; empty when there is nothing. load: this node's report; it is lost unless
        can_carry_load."""
        if len(load) > LOAD_BYTES_MAX:
            raise ValueError(f"a load report of {len(load)} bytes exceeds {LOAD_BYTES_MAX}")
        frames = [self._handshake_out] if self._handshake_out else []
        self._handshake_out = b""
        if self._must_rekey:
            frames.append(self._rekey())
        bodies = list(self._event_bodies(load))
        if self._pong_due:
            bodies.append(self._packer.pack([_PONG, self._pong_due, *([load] if load else [])]))
            self._pong_due = 0
        bodies += self._controls
        self._controls = []
        self._pending_bytes = 0
        if bodies:
            assert self._session is not None
            frames += [self._session.sealer.seal(body) for body in bodies]
        self.frames_out += len(frames)
        data = b"".join(frames)
        self.bytes_out += len(data)
        return data

    def _rekey(self) -> bytes:
        """The last frame under the former key."""
        assert self._session is not None
        self._must_rekey = False
        self._rekeys_sent += 1
        key_id = self._keyring.primary_id
        frame = self._session.sealer.seal(self._packer.pack([_REKEY, key_id]))
        self._session = replace(self._session, sealer=self._handshake.rekeyed(key_id, self.role, self._rekeys_sent))
        self.sealing_key_id = key_id
        return frame

    def receive(self, data: bytes | bytearray) -> list[LinkEvent]:
        """What `data`, cut anywhere, completes. Bytes behind the end of a link are ignored.

        Raises MalformedFrame, SealRejected or HandshakeRefused; the link is CLOSED then.
        """
        if self.is_closed:
            return []
        self._buffer += data
        self.bytes_in += len(data)
        events: list[LinkEvent] = []
        start = 0
        try:
            while len(self._buffer) - start >= LENGTH_BYTES and not self.is_closed:
                header = bytes(self._buffer[start : start + LENGTH_BYTES])
                size = self._checked_size(header)
                body_start = start + LENGTH_BYTES
                if len(self._buffer) - body_start < size:
                    break
                body = bytes(self._buffer[body_start : body_start + size])
                start = body_start + size
                self.frames_in += 1
                self._receive_frame(header, body, events)
        except MeshError:
            self.state = LinkState.CLOSED
            raise
        finally:
            del self._buffer[:start]
            if self.is_closed:
                self._buffer.clear()
        return events

    def _checked_size(self, header: bytes) -> int:
        is_unknown = self.state is LinkState.AWAIT_HELLO and self.role is Role.INITIATOR
        if is_unknown and header.startswith(_HTTP_BEGINNINGS):
            raise MalformedFrame("what answers there is an HTTP server; a mesh address has another port")
        size = int.from_bytes(header, "big")
        size_min = 1 if self.state is LinkState.AWAIT_HELLO else TAG_BYTES
        size_max = FRAME_BYTES_MAX if self.is_open else HANDSHAKE_BYTES_MAX
        if not size_min <= size <= size_max:
            raise MalformedFrame(f"a frame of {size} bytes; {size_min} to {size_max} are allowed")
        return size

    def _receive_frame(self, header: bytes, body: bytes, events: list[LinkEvent]) -> None:
        if self._session is None:
            self._receive_hello(body, events)
            return
        fields = unpack(self._session.opener.open(header, body))
        if self.state is LinkState.AWAIT_PROOF:
            if self.opening_key_id not in self._keyring:  # removed since the hello
                raise SealRejected("unknown key")
            self._open(self._session, events)
        if not isinstance(fields, list) or not fields or type(fields[0]) is not int:
            raise MalformedFrame("a frame is no array that starts with its type")
        try:
            event = self._receive_fields(fields)
        except (TypeError, ValueError, IndexError) as exc:
            raise MalformedFrame(f"a frame of type {fields[0]} has wrong fields: {type(exc).__name__}") from exc
        if event is not None:
            events.append(event)

    def _receive_fields(self, fields: list[object]) -> LinkEvent | None:
        """The event of one frame, None where it is over or unknown. Raises TypeError, ValueError, IndexError."""
        kind = fields[0]
        if kind == _EVENTS and self.role is Role.INITIATOR:
            return EventsReceived(_event_pairs(fields[1]), _bytes(fields[2]) if len(fields) > 2 else b"")
        if kind == _END and self.role is Role.INITIATOR:
            return self._receive_end(fields)
        if kind == _OPEN and self.role is Role.RESPONDER:
            return self._receive_open(_int(fields[1]), _bytes(fields[2]))
        if kind == _CANCEL and self.role is Role.RESPONDER:
            stream_id = _int(fields[1])
            was_open = stream_id in self._streams
            self._streams.discard(stream_id)
            return StreamCancelled(stream_id) if was_open else None
        if kind == _PING:
            self._pong_due = max(self._pong_due, _int(fields[1]))
            return None
        if kind == _PONG:
            return PongReceived(_int(fields[1]), _bytes(fields[2]) if len(fields) > 2 else b"")
        if kind == _CLOSE:
            self.state = LinkState.CLOSED
            return LinkClosed()
        if kind == _REKEY:
            self._receive_rekey(_bytes(fields[1]))
            return None
        if kind in (_OPEN, _EVENTS, _END, _CANCEL):
            raise MalformedFrame(f"a frame of type {kind} does not come from the {self.role.other.name.lower()}")
        return None

    def _receive_open(self, stream_id: int, request: bytes) -> LinkEvent | None:
        if stream_id <= self._last_stream_id:
            raise MalformedFrame(f"stream id {stream_id} is not above the last one, {self._last_stream_id}")
        self._last_stream_id = stream_id
        is_full = len(self._streams) >= STREAMS_MAX
        self._streams.add(stream_id)
        if is_full:
            self.queue_end(stream_id, CODE_NO_CAPACITY, f"{STREAMS_MAX} streams are open on this link", 1.0)
            return None
        return StreamOpened(stream_id, request)

    def _receive_end(self, fields: list[object]) -> LinkEvent | None:
        stream_id, code, message, retry_after_s = _int(fields[1]), fields[2], fields[3], fields[4]
        if not (code is None or (isinstance(code, str) and len(code) <= CODE_CHARS_MAX)) or not isinstance(
            message, str
        ):
            raise TypeError
        if not isinstance(retry_after_s, (int, float)) or not math.isfinite(retry_after_s):
            raise TypeError
        if stream_id not in self._streams:
            return None
        self._streams.discard(stream_id)
        return StreamEnded(stream_id, code, message, float(retry_after_s))

    def _receive_rekey(self, key_id: bytes) -> None:
        assert self._session is not None
        self._rekeys_received += 1
        opener = self._handshake.rekeyed(key_id, self.role.other, self._rekeys_received)
        self._session = replace(self._session, opener=opener)
        self.opening_key_id = key_id
        # Answered under the peer's key so far, because it might have held no other; now it has shown one.
        if key_id == self._keyring.primary_id:
            self.queue_rekey()

    def _receive_hello(self, body: bytes, events: list[LinkEvent]) -> None:
        try:
            self._session, reply = self._handshake.receive(body)
        except HandshakeRefused as exc:
            if self.role is Role.RESPONDER:
                self._queue_handshake(encode_refusal(exc.reason))
            raise
        self.sealing_key_id = self.opening_key_id = self._session.key_id
        if self.role is Role.RESPONDER:
            self._queue_handshake(reply)
            self.state = LinkState.AWAIT_PROOF
            return
        self._open(self._session, events)
        self.queue_ping()

    def _open(self, session: Session, events: list[LinkEvent]) -> None:
        self.state = LinkState.OPEN
        events.append(Established(session.node_id, session.boot_id, session.version))

    def _queue_handshake(self, body: bytes) -> None:
        self._handshake_out += len(body).to_bytes(LENGTH_BYTES, "big") + body

    def _queue(self, fields: list[object]) -> None:
        packed: bytes = self._packer.pack(fields)
        self._controls.append(packed)
        self._pending_bytes += len(packed)

    def _event_bodies(self, load: bytes) -> Iterator[bytes]:
        """EVENTS frames of all events queued, each cut at EVENTS_BYTES_MAX; the first carries the load."""
        packer, events, self._events = self._packer, self._events, []
        start = 0
        while start < len(events):
            end, size = start + 1, len(events[start])
            while end < len(events) and size + len(events[end]) <= EVENTS_BYTES_MAX:
                size += len(events[end])
                end += 1
            has_load = bool(load) and start == 0
            yield b"".join(
                (
                    packer.pack_array_header(3 if has_load else 2),
                    packer.pack(_EVENTS),
                    packer.pack_array_header(end - start),
                    *events[start:end],
                    packer.pack(load) if has_load else b"",
                )
            )
            start = end


def _event_pairs(value: object) -> list[tuple[int, object]]:
    if not isinstance(value, list) or not all(isinstance(pair, list) for pair in value):
        raise TypeError  # a map or bytes of length two would pass for a pair as well
    if not all(type(stream_id) is int for stream_id, _ in value):
        raise TypeError
    return value


def _int(value: object) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError
    return value
