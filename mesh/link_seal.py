"""The cryptography of a peer link: the proofs in its hellos, and the sealing of its frames.

Functions of keys and bytes alone. Every secret is derived from a key of the keyring, so only nodes that hold one speak.
"""

from __future__ import annotations

import hashlib
import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mesh.errors import SealRejected
from mesh.seal import Keyring

LENGTH_BYTES = 4  # every frame starts with the length of what follows, big-endian
TAG_BYTES = 16  # AES-GCM's authentication tag
PROOF_BYTES = 32  # HMAC-SHA256
_FRAME_NONCE_PREFIX = b"\x00" * 4  # with the 8-byte counter: the 12 bytes AES-GCM takes


def prove(keyring: Keyring, key_id: bytes, role: bytes, transcript: bytes) -> bytes:
    """The MAC that shows that whoever plays `role` holds the key, over every byte of the handshake so far."""
    key = keyring.derive(key_id, b"link handshake|" + role)
    return hmac.digest(key, transcript, "sha256")


def is_proven(keyring: Keyring, key_id: bytes, role: bytes, transcript: bytes, proof: bytes) -> bool:
    return hmac.compare_digest(prove(keyring, key_id, role, transcript), proof)


class FrameSealer:
    """Seals the frames of one direction of one link. The counter nonce makes order part of what is authenticated:
    a frame lost, repeated, moved or taken from another link does not open."""

    def __init__(self, keyring: Keyring, key_id: bytes, role: bytes, transcript: bytes, nonces: bytes) -> None:
        """role: who sends in this direction. transcript: both hellos whole. nonces: initiator's, then responder's."""
        purpose = b"link|" + role + b"|" + hashlib.sha256(transcript).digest()
        self._cipher = AESGCM(keyring.derive(key_id, purpose, salt=nonces))
        self._counter = 0

    def seal(self, body: bytes) -> bytes:
        """The frame as it goes on the wire: length, then ciphertext and tag. The length is authenticated too."""
        header = (len(body) + TAG_BYTES).to_bytes(LENGTH_BYTES, "big")
        return header + self._cipher.encrypt(self._next_nonce(), body, header)

    def open(self, header: bytes, sealed: bytes) -> bytes:
        """Raises SealRejected("tampered"); the link is of no more use then."""
        try:
            return self._cipher.decrypt(self._next_nonce(), sealed, header)
        except InvalidTag:
            raise SealRejected("tampered") from None

    def _next_nonce(self) -> bytes:
        nonce = _FRAME_NONCE_PREFIX + self._counter.to_bytes(8, "big")
        self._counter += 1
        return nonce
