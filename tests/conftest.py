"""For every test: hypothesis judges what it finds, never how long a busy machine took."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
