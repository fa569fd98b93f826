"""Engines that run models.

ONNX Runtime for Linux sends events to its maker unless it is told not to before it is first imported, and keeps an
identifier in the home folder for that. Nodes send nothing home, so it is told here, which runs before any module that
imports it. What the environment says already holds.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
