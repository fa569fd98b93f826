"""The keyring: the cluster's shared keys and what is derived from them, and the sealing of datagrams under them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
KEY_ID_BYTES = 4  # names a key in clear text, so that a receiver with several knows which to try
# Guards nothing: it keeps datagrams whole on loopback, where a mesh without a key of its own may run.
DEVELOPMENT_KEY = hashlib.sha256(b"ai-cluster public development key").digest()


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
    return hashlib.sha256(b"ai-cluster key id" + key).digest()[:KEY_ID_BYTES]


class Keyring:
    """The keys a node accepts, the first of which it seals with.

    cluster_name keeps meshes apart that share a key by accident."""

    def __init__(self, keys: list[bytes], cluster_name: str = "ai-cluster") -> None:
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"a keyring needs at least one key of {KEY_BYTES} bytes")
        self.cluster_name = cluster_name
        self._keys = {key_id(key): key for key in keys}
        self.primary_id = key_id(keys[0])

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._keys

    def derive(self, identity: bytes, purpose: bytes, salt: bytes = b"") -> bytes:
        """A 32-byte subkey of the key named `identity` for one purpose (RFC 5869 HKDF-SHA256).

        Raises KeyError for a key not held."""
        info = b"ai-cluster 1|" + self.cluster_name.encode() + b"|" + purpose
        return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(self._keys[identity])
