"""The keyring: the cluster's shared keys and what is derived from them, and the sealing of datagrams under them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mesh.errors import KeyRefused, SealRejected

KEY_BYTES = 32
KEY_ID_BYTES = 4  # names a key in clear text, so that a receiver with several knows which to try
# A rotation needs two; more are leftovers of rotations that were given up.
KEYS_MAX = 8
# Guards nothing: it keeps datagrams whole on loopback, where a mesh without a key of its own may run.
DEVELOPMENT_KEY = hashlib.sha256(b"ai-cluster public development key").digest()

SEAL_VERSION = 1  # first byte of every datagram; changes only when this header does
BOOT_ID_BYTES = 16  # random per process, so that a counter that begins at 0 again never meets an old subkey
TAG_BYTES = 16  # AES-GCM
HEADER = struct.Struct(f">B{KEY_ID_BYTES}s{BOOT_ID_BYTES}sQ")  # seal version, key id, boot id, counter
OVERHEAD_BYTES = HEADER.size + TAG_BYTES  # 45: what sealing adds to a payload
# Datagrams of one boot may overtake each other by this many: at 40 a second to all peers, 25 s.
REPLAY_WINDOW = 1_024
# Admitted processes remembered, each about 1 KiB; as many as members. Beyond it the longest silent is a stranger again.
BOOTS_MAX = 16_384
BOOT_KEYS_MAX = 4  # of one process, whose ciphers are kept: two while keys are rotated


def new_key() -> str:
    """A fresh cluster key as people handle it: 44 characters of base64."""
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def parse_key(text: str) -> bytes:
    """The 32 bytes of a cluster key. Raises ValueError that says what is wrong, without showing the key."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise ValueError("a cluster key is 44 characters of base64, as `ai-cluster keyring new` prints it") from exc
    if len(key) != KEY_BYTES:
        raise ValueError(
            f"a cluster key holds {KEY_BYTES} bytes, this one {len(key)}; make one with `ai-cluster keyring new`"
        )
    return key


def key_id(key: bytes) -> bytes:
    """KEY_ID_BYTES that name a key and tell nothing of it. People see them as 8 hex digits."""
    return hashlib.sha256(b"ai-cluster key id" + key).digest()[:KEY_ID_BYTES]


class Keyring:
    """The keys a node accepts, and the one it seals with, the primary. Whoever reads it sees a change at once.

    cluster_name keeps meshes apart that share a key by accident. keys: the primary first.
    Raises ValueError for no key, one of another size, or more than KEYS_MAX."""

    def __init__(self, keys: Sequence[bytes], cluster_name: str = "ai-cluster") -> None:
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"a keyring needs at least one key of {KEY_BYTES} bytes")
        self.cluster_name = cluster_name
        self._keys = {key_id(key): key for key in keys}
        if len(self._keys) > KEYS_MAX:
            raise ValueError(f"a keyring of {len(self._keys)} keys exceeds {KEYS_MAX}")
        self.primary_id = key_id(keys[0])

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._keys

    @property
    def key_ids(self) -> tuple[bytes, ...]:
        """The primary first, then the others as they were installed."""
        return (self.primary_id, *(identity for identity in self._keys if identity != self.primary_id))

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The secrets themselves in the order of key_ids, for whoever keeps them on disk."""
        return tuple(self._keys[identity] for identity in self.key_ids)

    def install(self, key: bytes) -> bytes:
        """Accept what is sealed under `key` from now on; returns its id. Nothing changes where it is held already.

        Raises KeyRefused at KEYS_MAX, or for a key whose id is that of another one; ValueError for another size."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key holds {KEY_BYTES} bytes, this one {len(key)}")
        identity = key_id(key)
        if self._keys.get(identity, key) != key:
            raise KeyRefused(f"another key has the id {identity.hex()}; make a new one with `ai-cluster keyring new`")
        if identity not in self._keys and len(self._keys) >= KEYS_MAX:
            raise KeyRefused(f"the keyring holds {KEYS_MAX} keys, which is the limit; remove one that is not in use")
        self._keys[identity] = key
        return identity

    def use(self, identity: bytes) -> None:
        """Seal under this key from now on. Raises KeyRefused for a key not held."""
        if identity not in self._keys:
            raise KeyRefused(f"key {identity.hex()} is not installed here; install it first")
        self.primary_id = identity

    def remove(self, identity: bytes) -> None:
        """Accept nothing under this key any more. Nothing changes where it is not held.

        Raises KeyRefused for the primary, which the last key always is."""
        if identity == self.primary_id:
            raise KeyRefused(f"key {identity.hex()} is the primary here, which this node seals with; use another first")
        self._keys.pop(identity, None)

    def derive(self, identity: bytes, purpose: bytes, salt: bytes = b"") -> bytes:
        """A 32-byte subkey of the key named `identity` for one purpose (RFC 5869 HKDF-SHA256).

        Raises KeyError for a key not held."""
        info = b"ai-cluster 1|" + self.cluster_name.encode() + b"|" + purpose
        return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(self._keys[identity])


@dataclass(frozen=True, slots=True)
class Opened:
    """An authentic datagram. is_admitted: its sender's process was admitted; if not, it may be a recording."""

    boot_id: bytes
    counter: int
    payload: bytes
    is_admitted: bool


class DatagramSealer:
    """Seals this process's datagrams and opens those of others: AES-256-GCM (NIST SP 800-38D), header in clear.

    Each boot id has a subkey of its own, so a 64-bit counter is a nonce that never repeats under one key. Of a process
    that was admitted each datagram opens once, whichever keys of the ring it uses."""

    def __init__(self, keyring: Keyring, boot_id: bytes) -> None:
        if len(boot_id) != BOOT_ID_BYTES:
            raise ValueError(f"a boot id holds {BOOT_ID_BYTES} bytes, this one {len(boot_id)}")
        self._keyring = keyring
        self._boot_id = boot_id
        self._cluster = keyring.cluster_name.encode()
        self._counter = 0
        self._own_ciphers: dict[bytes, AESGCM] = {}  # by key id: one entry a key of the ring
        self._boots: OrderedDict[bytes, _Boot] = OrderedDict()  # admitted ones by boot id, longest silent first

    def seal(self, payload: bytes) -> bytes:
        """The payload as a datagram, OVERHEAD_BYTES longer, under the keyring's primary key."""
        identity = self._keyring.primary_id
        cipher = self._own_ciphers.get(identity)
        if cipher is None:
            cipher = self._own_ciphers[identity] = self._cipher(identity, self._boot_id)
        self._counter += 1
        header = HEADER.pack(SEAL_VERSION, identity, self._boot_id, self._counter)
        return header + cipher.encrypt(_nonce(self._counter), payload, header + self._cluster)

    def open(self, datagram: bytes) -> Opened:
        """A datagram that a holder of a key of this ring sealed, and that is new if its sender was admitted.

        Raises SealRejected: "truncated", "seal version", "unknown key", "reflected" (sealed by this very process),
        "replayed" or "tampered" (altered, or of a mesh by another name). Nothing was changed then."""
        if len(datagram) < OVERHEAD_BYTES:
            raise SealRejected("truncated")
        seal_version, identity, boot_id, counter = HEADER.unpack_from(datagram)
        if seal_version != SEAL_VERSION:
            raise SealRejected("seal version")
        if identity not in self._keyring:
            raise SealRejected("unknown key")
        if boot_id == self._boot_id:
            raise SealRejected("reflected")
        boot = self._boots.get(boot_id)
        if boot is not None and boot.has_seen(counter):
            raise SealRejected("replayed")
        cipher = boot.ciphers.get(identity) if boot is not None else None
        if cipher is None:
            cipher = self._cipher(identity, boot_id)
        try:
            associated = datagram[: HEADER.size] + self._cluster
            payload = cipher.decrypt(_nonce(counter), datagram[HEADER.size :], associated)
        except InvalidTag as exc:
            raise SealRejected("tampered") from exc
        if boot is not None:
            # Only what authenticated may take room or move a window: forged headers cost a derivation, no memory.
            boot.mark_seen(counter)
            boot.ciphers[identity] = cipher
            if len(boot.ciphers) > BOOT_KEYS_MAX:
                del boot.ciphers[next(iter(boot.ciphers))]
            self._boots.move_to_end(boot_id)
        return Opened(boot_id, counter, payload, boot is not None)

    def admit(self, opened: Opened) -> None:
        """The process that sealed this datagram is alive: take what it sends, each datagram once, this one included."""
        self.admit_process(opened.boot_id)
        self._boots[opened.boot_id].mark_seen(opened.counter)

    def admit_process(self, boot_id: bytes) -> None:
        """As admit(), on the word of another that was admitted."""
        if boot_id not in self._boots:
            self._boots[boot_id] = _Boot()
            if len(self._boots) > BOOTS_MAX:
                self._boots.popitem(last=False)

    def _cipher(self, identity: bytes, boot_id: bytes) -> AESGCM:
        return AESGCM(self._keyring.derive(identity, b"datagram|" + boot_id))


class _Boot:
    """What is known of one admitted process: its ciphers by key id, and which counters it has used."""

    __slots__ = ("_highest", "_seen", "ciphers")

    def __init__(self) -> None:
        self.ciphers: dict[bytes, AESGCM] = {}
        self._highest = -1
        self._seen = 0  # bit i: counter `highest - i` was opened

    def has_seen(self, counter: int) -> bool:
        behind = self._highest - counter
        return behind >= REPLAY_WINDOW or (behind >= 0 and bool(self._seen >> behind & 1))

    def mark_seen(self, counter: int) -> None:
        ahead = counter - self._highest
        if ahead > 0:
            self._seen = (self._seen << ahead | 1) & _WINDOW_MASK if ahead < REPLAY_WINDOW else 1
            self._highest = counter
        else:
            self._seen |= 1 << -ahead


_WINDOW_MASK = (1 << REPLAY_WINDOW) - 1


def _nonce(counter: int) -> bytes:
    return counter.to_bytes(12, "big")
