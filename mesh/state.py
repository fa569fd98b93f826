"""The sections of a node's state as bytes: hot (its load, each second) and warm (its profile, when it changes).

Encoded once by their owner and forwarded as they are. Fields a newer owner appends are ignored.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import msgpack

from mesh.errors import MalformedDatagram
from mesh.view import EMBEDDING, GENERATION, UNKNOWN_KIND, ModelInfo, ModelLoad, NodeLoad, NodeProfile, Readiness
from mesh.wire import COUNT_MAX, HASH_MAX, SECTION_BYTES_MAX, VERSION_MAX, count, text

NAME_BYTES_MAX = 256  # of a model, a fingerprint, a version, an HTTP address
RATE_MAX = 1e12  # tokens per second or seconds; beyond it a number is a mistake, and infinity and NaN are as well
# Numbers on the wire. A readiness this node does not know reads as LOADING: alive, not to be used.
READINESS_CODES = {Readiness.LOADING: 0, Readiness.READY: 1, Readiness.DRAINING: 2, Readiness.FAILED: 3}
_READINESS_OF_CODE = {code: readiness for readiness, code in READINESS_CODES.items()}
# A kind of model this node does not know is one that it asks nothing of.
KIND_CODES = {GENERATION: 0, EMBEDDING: 1}
_KIND_OF_CODE = {code: kind for kind, code in KIND_CODES.items()}
# A queue that grew or shrank by this many since the last publication is news for every router: about one full batch.
QUEUE_JUMP = 8
# Fields of a model's row behind those that every version has, in their order; a shorter row leaves them 0.0.
_APPENDED_RATES = ("step_s", "wait_s", "prompt_token_s", "answer_tokens")


def encode_load(load: NodeLoad) -> bytes:
    """The hot section; rates as 32-bit floats.

    Raises ValueError for more models than fit a datagram, or a number out of range."""
    models = [
        [
            _name(name),
            _whole(m.active),
            _whole(m.queued),
            _whole(m.free_slots),
            _rate(m.prefill_rate),
            _rate(m.decode_rate),
            _whole(m.step_count),
            _whole(m.queued_tokens),
            _rate(m.step_s),
            _rate(m.wait_s),
            _rate(m.prompt_token_s),
            _rate(m.answer_tokens),
        ]
        for name, m in load.models.items()
    ]
    fields: list[object] = [
        READINESS_CODES[load.readiness],
        _whole(load.active_requests),
        _rate(load.tokens_per_s),
        _rate(load.loop_lag_s),
        models,
    ]
    appended: list[object] = [load.usage, load.after_version, load.view_hash]
    while appended and not appended[-1]:
        del appended[-1]
    fields += appended
    return _within_limit(msgpack.packb(fields, use_single_float=True), "load", len(models))


def decode_load(section: bytes) -> NodeLoad:
    """Raises MalformedDatagram."""
    fields = _unpack(section, 5)
    models: dict[str, ModelLoad] = {}
    for row in _rows(fields[4], 8):
        models[text(row[0], NAME_BYTES_MAX)] = ModelLoad(
            active=count(row[1]),
            queued=count(row[2]),
            free_slots=count(row[3]),
            prefill_rate=_read_rate(row[4]),
            decode_rate=_read_rate(row[5]),
            step_count=count(row[6]),
            queued_tokens=count(row[7]),
            **{name: _read_rate(value) for name, value in zip(_APPENDED_RATES, row[8:], strict=False)},
        )
    return NodeLoad(
        readiness=_READINESS_OF_CODE.get(count(fields[0]), Readiness.LOADING),
        active_requests=count(fields[1]),
        tokens_per_s=_read_rate(fields[2]),
        loop_lag_s=_read_rate(fields[3]),
        models=MappingProxyType(models),
        usage=fields[5] if len(fields) > 5 and isinstance(fields[5], bytes) else b"",
        after_version=count(fields[6], VERSION_MAX) if len(fields) > 6 else 0,
        view_hash=count(fields[7], HASH_MAX) if len(fields) > 7 else 0,
    )


def encode_profile(profile: NodeProfile) -> bytes:
    """The warm section. Raises ValueError for more models than fit a datagram, or a number out of range."""
    models = [
        [
            _name(m.name),
            _pack_hex(_short(m.fingerprint)),
            _whole(m.context_length),
            _whole(m.slots),
            _whole(m.queue_limit),
            *([] if m.kind == GENERATION else [KIND_CODES[m.kind]]),  # no byte more for what every version knows
        ]
        for m in profile.models
    ]
    fields: list[object] = [_short(profile.http_address), _short(profile.version), models]
    if profile.records_digest:
        fields.append(_pack_hex(_short(profile.records_digest)))
    return _within_limit(msgpack.packb(fields), "profile", len(models))


def decode_profile(section: bytes) -> NodeProfile:
    """Raises MalformedDatagram."""
    fields = _unpack(section, 3)
    return NodeProfile(
        http_address=_text_or_empty(fields[0]),
        version=_text_or_empty(fields[1]),
        models=tuple(
            ModelInfo(
                name=text(row[0], NAME_BYTES_MAX),
                fingerprint=_hex_or_text(row[1]),
                context_length=count(row[2]),
                slots=count(row[3]),
                queue_limit=count(row[4]),
                kind=_KIND_OF_CODE.get(count(row[5]), UNKNOWN_KIND) if len(row) > 5 else GENERATION,
            )
            for row in _rows(fields[2], 5)
        ),
        records_digest=_hex_or_text(fields[3]) if len(fields) > 3 else "",
    )


def is_urgent(before: NodeLoad, after: NodeLoad) -> bool:
    """True where peers should hear of the change at once: readiness, the models served, a queue that jumped."""
    if before.readiness is not after.readiness or before.models.keys() != after.models.keys():
        return True
    return any(abs(m.queued - before.models[name].queued) >= QUEUE_JUMP for name, m in after.models.items())


def _unpack(section: bytes, length_min: int) -> list[Any]:
    try:
        fields = msgpack.unpackb(section)
    except ValueError as exc:  # msgpack's errors for one complete buffer, bad UTF-8 included
        raise MalformedDatagram(f"a section of {len(section)} bytes is no msgpack: {exc!r}") from exc
    if not isinstance(fields, list) or len(fields) < length_min:
        raise MalformedDatagram(f"a section is an array of at least {length_min}, got a {type(fields).__name__}")
    return fields


def _rows(value: Any, length_min: int) -> list[list[Any]]:
    if not isinstance(value, list) or any(not isinstance(row, list) or len(row) < length_min for row in value):
        raise MalformedDatagram(f"models are arrays of at least {length_min} fields")
    return value


def _within_limit(section: bytes, what: str, model_count: int) -> bytes:
    if len(section) > SECTION_BYTES_MAX:
        raise ValueError(
            f"the {what} of {model_count} models takes {len(section)} bytes of {SECTION_BYTES_MAX}: "
            f"serve fewer models on one node, or give them shorter names"
        )
    return section


def _name(value: str) -> str:
    if not value:
        raise ValueError("a model without a name")
    return _short(value)


def _short(value: str) -> str:
    if len(value.encode()) > NAME_BYTES_MAX:
        raise ValueError(f"{value[:40]!r}… takes {len(value.encode())} bytes of {NAME_BYTES_MAX}")
    return value


def _whole(value: int) -> int:
    if not 0 <= value <= COUNT_MAX:
        raise ValueError(f"a count of {value} is not between 0 and {COUNT_MAX}")
    return value


def _rate(value: float) -> float:
    if not 0.0 <= value <= RATE_MAX:
        raise ValueError(f"a rate or delay of {value} is not between 0 and {RATE_MAX:g}")
    return float(value)


def _read_rate(value: Any) -> float:
    if type(value) not in (float, int) or not 0 <= value <= RATE_MAX:  # NaN is not between any two numbers
        raise MalformedDatagram(f"expected a rate up to {RATE_MAX:g}, got a {type(value).__name__}")
    return float(value)


def _text_or_empty(value: Any) -> str:
    return "" if value == "" else text(value, NAME_BYTES_MAX)


def _hex_or_text(value: Any) -> str:
    return _text_or_empty(value.hex() if isinstance(value, bytes) else value)


def _pack_hex(fingerprint: str) -> bytes | str:
    """Half the size for what bytes.hex() wrote; anything else as it is."""
    try:
        packed = bytes.fromhex(fingerprint)
    except ValueError:
        return fingerprint
    return packed if packed and packed.hex() == fingerprint else fingerprint
