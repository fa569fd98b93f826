"""An API key: the token that a client shows, and the record that every node keeps of it.

A token is `sk-<public id>-<secret>`, both of letters and digits. The public id names the key in lists, logs and
metrics; of the whole token only a SHA-256 is kept, which is enough for a secret of 256 random bits.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
from dataclasses import dataclass
from typing import Any

import msgpack

from nodes.generation import PRIORITY_DEFAULT

PUBLIC_ID_CHARS = 12  # 71 bits: no two keys of a mesh ever share one
SECRET_CHARS = 43  # 256 bits
HASH_BYTES = 32
NAME_CHARS_MAX = 100
MODELS_MAX = 16
MODEL_CHARS_MAX = 256
LIMIT_MAX = 2**53
PRIORITY_MAX = 100
TIME_MAX = 253_402_300_799  # the last second of the year 9999
RECORD_PREFIX = "key/"

_ALPHABET = string.ascii_letters + string.digits
_TOKEN = re.compile(r"sk-([A-Za-z0-9]{1,32})-([A-Za-z0-9]{1,128})")
_PUBLIC_ID = re.compile(r"[A-Za-z0-9]{1,32}")
_FORMAT = 1


class KeyMalformed(ValueError):
    """Bytes that are no record of a key, or settings that no key may have. The message names the field."""


@dataclass(frozen=True, slots=True)
class KeySettings:
    """What an operator sets. None: no limit. models: those it may use; none of them: all. priority: its share of a busy
    engine, in proportion to others'. expires_at: seconds since 1970, on each node's own clock."""

    name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    models: tuple[str, ...] = ()
    priority: int = PRIORITY_DEFAULT
    expires_at: int | None = None
    is_enabled: bool = True

    def check(self) -> None:
        """Raises KeyMalformed."""
        if not 0 < len(self.name) <= NAME_CHARS_MAX or not self.name.isprintable():
            raise KeyMalformed(f"name: 1 to {NAME_CHARS_MAX} printable characters")
        for field in ("requests_per_minute", "tokens_per_minute", "concurrency"):
            value = getattr(self, field)
            if value is not None and not 1 <= value <= LIMIT_MAX:
                raise KeyMalformed(f"{field}: a whole number from 1 on; leave it out for no limit")
        if not 1 <= self.priority <= PRIORITY_MAX:
            raise KeyMalformed(f"priority: 1 to {PRIORITY_MAX}; {PRIORITY_DEFAULT} is usual")
        if self.expires_at is not None and not 0 < self.expires_at <= TIME_MAX:
            raise KeyMalformed("expires_at: a time after 1970")
        if len(self.models) > MODELS_MAX or not all(0 < len(model) <= MODEL_CHARS_MAX for model in self.models):
            raise KeyMalformed(f"models: at most {MODELS_MAX} names of 1 to {MODEL_CHARS_MAX} characters")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """family: the public id of the first of a row of rotated keys; limits and usage count for the family."""

    public_id: str
    token_hash: bytes
    family: str
    created_at: int
    settings: KeySettings

    @property
    def record_id(self) -> str:
        return RECORD_PREFIX + self.public_id

    @property
    def label(self) -> str:
        """What metrics and logs call it."""
        return f"sk-{self.family}"

    def accepts(self, token: str) -> bool:
        """In a time that does not depend on where the token is wrong."""
        return hmac.compare_digest(hash_token(token), self.token_hash)

    def has_expired(self, wall_time: float) -> bool:
        return self.settings.expires_at is not None and wall_time >= self.settings.expires_at


def new_key(settings: KeySettings, wall_time: float, family: str = "") -> tuple[ApiKey, str]:
    """(the key, its token, which nobody can learn again). Raises KeyMalformed."""
    settings.check()
    public_id = _random(PUBLIC_ID_CHARS)
    token = f"sk-{public_id}-{_random(SECRET_CHARS)}"
    return ApiKey(public_id, hash_token(token), family or public_id, int(wall_time), settings), token


def public_id_of(token: str) -> str | None:
    """None for what is no token."""
    match = _TOKEN.fullmatch(token)
    return match[1] if match else None


def hash_token(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def encode_key(key: ApiKey) -> bytes:
    settings = key.settings
    encoded: bytes = msgpack.packb(
        [
            _FORMAT,
            key.token_hash,
            key.family,
            key.created_at,
            settings.name,
            settings.requests_per_minute,
            settings.tokens_per_minute,
            settings.concurrency,
            list(settings.models),
            settings.priority,
            settings.expires_at,
            settings.is_enabled,
        ]
    )
    return encoded


def decode_key(record_id: str, value: bytes) -> ApiKey:
    """From a record's id and value. Raises KeyMalformed; fields that a later version appends are ignored."""
    public_id = record_id.removeprefix(RECORD_PREFIX)
    try:
        fields: Any = msgpack.unpackb(value)
    except ValueError as exc:
        raise KeyMalformed(f"{record_id!r}: no msgpack") from exc
    if not isinstance(fields, list) or len(fields) < 12 or fields[0] != _FORMAT:
        raise KeyMalformed(f"{record_id!r}: no key of this version")
    _, token_hash, family, created_at, name, requests, tokens, concurrency, models, priority, expires_at, enabled = (
        fields[:12]
    )
    if (
        not _PUBLIC_ID.fullmatch(public_id)
        or not (isinstance(token_hash, bytes) and len(token_hash) == HASH_BYTES)
        or not (isinstance(family, str) and _PUBLIC_ID.fullmatch(family))
        or not (isinstance(name, str) and isinstance(models, list) and type(enabled) is bool)
        or not all(isinstance(model, str) for model in models)
        or not all(type(number) is int for number in (created_at, priority))
        or not all(number is None or type(number) is int for number in (requests, tokens, concurrency, expires_at))
    ):
        raise KeyMalformed(f"{record_id!r}: fields of another type")
    settings = KeySettings(name, requests, tokens, concurrency, tuple(models), priority, expires_at, enabled)
    settings.check()
    return ApiKey(public_id, token_hash, family, created_at, settings)


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
