"""The sections of a node's state under fuzzing: what decodes is in range, so every reader may trust it."""

from __future__ import annotations

from collections import Counter

from mesh.errors import MalformedDatagram
from mesh.state import NAME_BYTES_MAX, RATE_MAX, decode_load, decode_profile
from mesh.wire import COUNT_MAX
from tests.fuzz.messages import sections

HOT, WARM = range(2)


class SectionSubject:
    """The first byte of an input chooses the section."""

    name = "section"

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    def seeds(self) -> list[bytes]:
        return [bytes([kind]) + section for kind in (HOT, WARM) for section in sections()]

    def feed(self, data: bytes) -> None:
        section = data[1:]
        try:
            if data[:1] and data[0] % 2 == WARM:
                self._check_profile(section)
                self.outcomes["accepted profile"] += 1
            else:
                self._check_load(section)
                self.outcomes["accepted load"] += 1
        except MalformedDatagram:
            self.outcomes["malformed"] += 1

    def _check_load(self, section: bytes) -> None:
        load = decode_load(section)
        rates = [load.tokens_per_s, load.loop_lag_s]
        counts = [load.active_requests]
        for name, model in load.models.items():
            assert 0 < len(name.encode()) <= NAME_BYTES_MAX
            rates += [model.prefill_rate, model.decode_rate]
            counts += [model.active, model.queued, model.free_slots, model.step_count, model.queued_tokens]
        assert all(type(rate) is float and 0.0 <= rate <= RATE_MAX for rate in rates), f"a rate out of range: {rates}"
        assert all(type(count) is int and 0 <= count <= COUNT_MAX for count in counts), f"a count of {counts}"

    def _check_profile(self, section: bytes) -> None:
        profile = decode_profile(section)
        texts = [profile.http_address, profile.version]
        for model in profile.models:
            assert 0 < len(model.name.encode()) <= NAME_BYTES_MAX
            texts.append(model.fingerprint)
            assert all(0 <= c <= COUNT_MAX for c in (model.context_length, model.slots, model.queue_limit))
        assert all(isinstance(text, str) and len(text.encode()) <= NAME_BYTES_MAX for text in texts), f"texts {texts}"
