"""Log messages that programs wait for, and which therefore do not change."""

from __future__ import annotations

NODE_READY = "node ready"
