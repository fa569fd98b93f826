"""For every test: hypothesis judges what it finds, never how long a busy machine took, and nothing is sent home."""

from __future__ import annotations

from hypothesis import settings

import nodes.engine  # noqa: F401 (tells ONNX Runtime, which some tests import themselves)

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
