"""How two ends of a new link come to know each other: a hello each, in clear text, proven by a MAC under a shared key.

The responder's proof covers the initiator's hello, so it cannot be replayed. The initiator's can, and leads nowhere:
the session keys depend on both nonces, so whoever repeats a hello cannot seal the frame that must follow it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgpack

from mesh.errors import HandshakeRefused, MalformedFrame, SealRejected
from mesh.link_seal import PROOF_BYTES, FrameSealer, is_proven, prove
from mesh.seal import KEY_ID_BYTES, Keyring

VERSION_MIN = 1
VERSION_MAX = 1
HANDSHAKE_BYTES_MAX = 1024  # a hello takes about 250; nobody unproven makes us hold more
NONCE_BYTES = 32  # so many random bits that two links never share a session key
CLUSTER_HASH_BYTES = 8
BOOT_ID_BYTES = 16
NODE_ID_BYTES_MAX = 64  # as in gossip; bounds what a stranger can make us log
REFUSALS = frozenset({"unknown key", "wrong key", "other cluster", "protocol version", "fenced"})
UNSPECIFIED = "unspecified"  # a refusal in words of a later version
OTHER_NODE = "other node"
FENCED = "fenced"  # the peer has the responder's own name

_HELLO, _REFUSED = 1, 2


class Role(Enum):
    """Who opened the connection. The value separates the two directions' proofs and keys."""

    INITIATOR = b"initiator"
    RESPONDER = b"responder"

    @property
    def other(self) -> Role:
        return Role.RESPONDER if self is Role.INITIATOR else Role.INITIATOR


@dataclass(frozen=True, slots=True)
class Hello:
    """What an end says of itself. nonce: random, fresh for every link."""

    version_min: int
    version_max: int
    cluster_hash: bytes
    key_id: bytes
    node_id: str
    boot_id: bytes
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Session:
    """What a finished handshake leaves: who the peer is, and the keys of both directions. key_id: the key they are
    derived from until one end rekeys."""

    node_id: str
    boot_id: bytes
    version: int
    key_id: bytes
    sealer: FrameSealer
    opener: FrameSealer


class Handshake:
    """One end's part. expected_node_id: an initiator refuses a peer of another name; None takes any."""

    def __init__(
        self, role: Role, keyring: Keyring, node_id: str, boot_id: bytes, nonce: bytes, expected_node_id: str | None
    ) -> None:
        self._role = role
        self._keyring = keyring
        name_hash = cluster_hash(keyring.cluster_name)
        self._own = Hello(VERSION_MIN, VERSION_MAX, name_hash, keyring.primary_id, node_id, boot_id, nonce)
        self._expected_node_id = expected_node_id
        self._transcript = b""

    def hello(self) -> bytes:
        """The initiator's opening frame."""
        return self._prove(self._own)

    def receive(self, body: bytes) -> tuple[Session, bytes]:
        """The session that the peer's frame leads to, and the frame to answer with (empty at the initiator).

        Raises MalformedFrame; HandshakeRefused when either end declines (a responder owes the peer encode_refusal());
        SealRejected when a responder does not prove that it holds the key.
        """
        kind, payload = body[0], body[1:]
        if kind == _REFUSED and self._role is Role.INITIATOR:
            reason = unpack(payload)
            raise HandshakeRefused(reason if isinstance(reason, str) and reason in REFUSALS else UNSPECIFIED)
        if kind != _HELLO:
            raise MalformedFrame(f"a handshake frame of kind {kind}")
        peer = decode_hello(payload[:-PROOF_BYTES])
        refusal = self._refusal(peer, body[:-PROOF_BYTES], body[-PROOF_BYTES:])
        self._transcript += body
        if self._role is Role.INITIATOR:
            if refusal is not None:
                raise SealRejected(refusal)
            if self._expected_node_id not in (None, peer.node_id):
                raise HandshakeRefused(OTHER_NODE)
            return self._session(peer, self._own.nonce + peer.nonce), b""
        if refusal is not None:
            raise HandshakeRefused(refusal)
        if peer.node_id == self._own.node_id:
            raise HandshakeRefused(FENCED)  # this very process does not dial itself
        # Answered under the key that the peer chose: while keys are rotated it may not be our first.
        own = self._own
        answer = Hello(VERSION_MIN, VERSION_MAX, own.cluster_hash, peer.key_id, own.node_id, own.boot_id, own.nonce)
        reply = self._prove(answer)
        return self._session(peer, peer.nonce + own.nonce), reply

    def rekeyed(self, key_id: bytes, sender: Role, count: int) -> FrameSealer:
        """What seals the sender's frames after its REKEY number `count`, the first being 1.

        Raises SealRejected for a key not held. The transcript holds both nonces, so no link shares a subkey."""
        if key_id not in self._keyring:
            raise SealRejected("unknown key")
        return FrameSealer(self._keyring, key_id, sender.value, self._transcript, b"rekey" + count.to_bytes(8, "big"))

    def _prove(self, hello: Hello) -> bytes:
        said = bytes([_HELLO]) + encode_hello(hello)
        body = said + prove(self._keyring, hello.key_id, self._role.value, self._transcript + said)
        self._transcript += body
        return body

    def _refusal(self, peer: Hello, said: bytes, proof: bytes) -> str | None:
        """Why the peer's hello is not accepted. The reason that a person can act on comes first."""
        if min(VERSION_MAX, peer.version_max) < max(VERSION_MIN, peer.version_min):
            return "protocol version"
        if peer.cluster_hash != self._own.cluster_hash:
            return "other cluster"
        if peer.key_id not in self._keyring:
            return "unknown key"
        if not is_proven(self._keyring, peer.key_id, self._role.other.value, self._transcript + said, proof):
            return "wrong key"
        return None

    def _session(self, peer: Hello, nonces: bytes) -> Session:
        """nonces: the initiator's, then the responder's. The transcript holds both hellos whole by now."""
        sealer, opener = (
            FrameSealer(self._keyring, peer.key_id, role.value, self._transcript, nonces)
            for role in (self._role, self._role.other)
        )
        return Session(peer.node_id, peer.boot_id, min(VERSION_MAX, peer.version_max), peer.key_id, sealer, opener)


def cluster_hash(cluster_name: str) -> bytes:
    """Tells meshes apart that share a key; the name itself is not shown."""
    return hashlib.sha256(b"ai-cluster name|" + cluster_name.encode()).digest()[:CLUSTER_HASH_BYTES]


def encode_refusal(reason: str) -> bytes:
    encoded: bytes = msgpack.packb(reason)
    return bytes([_REFUSED]) + encoded


def encode_hello(hello: Hello) -> bytes:
    body = {
        "v": [hello.version_min, hello.version_max],
        "c": hello.cluster_hash,
        "k": hello.key_id,
        "n": hello.node_id,
        "b": hello.boot_id,
        "r": hello.nonce,
    }
    encoded: bytes = msgpack.packb(body)
    return encoded


def decode_hello(data: bytes) -> Hello:
    """Raises MalformedFrame. Fields of later versions are ignored."""
    body = unpack(data)
    try:
        version_min, version_max = body["v"]
        hello = Hello(version_min, version_max, body["c"], body["k"], body["n"], body["b"], body["r"])
    except (TypeError, KeyError, ValueError) as exc:
        raise MalformedFrame(f"a hello lacks a field: {type(exc).__name__}") from exc
    if type(hello.version_min) is not int or type(hello.version_max) is not int:
        raise MalformedFrame("a hello's versions are no integers")
    if not isinstance(hello.node_id, str) or not 0 < len(hello.node_id.encode()) <= NODE_ID_BYTES_MAX:
        raise MalformedFrame(f"a hello's node id is no text of 1 to {NODE_ID_BYTES_MAX} bytes")
    for value, size in (
        (hello.cluster_hash, CLUSTER_HASH_BYTES),
        (hello.key_id, KEY_ID_BYTES),
        (hello.boot_id, BOOT_ID_BYTES),
        (hello.nonce, NONCE_BYTES),
    ):
        if not isinstance(value, bytes) or len(value) != size:
            raise MalformedFrame(f"a field of a hello is not {size} bytes long")
    return hello


def unpack(data: bytes) -> Any:
    """The object that `data` encodes. Raises MalformedFrame for anything but exactly one object."""
    try:
        return msgpack.unpackb(data)
    except (msgpack.UnpackException, ValueError, TypeError) as exc:
        raise MalformedFrame(f"{len(data)} bytes are no msgpack object: {type(exc).__name__}") from exc
