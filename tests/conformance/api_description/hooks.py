"""Steers what schemathesis makes up, where chance would never come to the point or go too far: to a model that is there,
short answers, and no node told to leave. What breaks a field's own rule is left as it is."""

from __future__ import annotations

import os
from typing import Any

import schemathesis

MODEL = os.environ["AI_CLUSTER_MODEL"]
MODEL_CHARS_MAX = 256
TOKENS_MAX = 8
PROMPTS_MAX = 4
N_MAX = 3
NOBODY = "no-such-node"
STOPPING = ("/admin/leave", "/admin/drain")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if not isinstance(body, dict) or context.operation is None:
        return body
    path = context.operation.path
    if path.startswith("/v1/"):
        return body | _generating(body)
    if path in STOPPING and body.get("node_id") is None:
        return body | {"node_id": NOBODY}
    return body


def _generating(body: dict[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    model = body.get("model")
    if isinstance(model, str) and 1 <= len(model) <= MODEL_CHARS_MAX:
        changes["model"] = MODEL
    if body.get("max_completion_tokens") is None and body.get("max_tokens") is None:
        changes["max_tokens"] = TOKENS_MAX
    for name, most in (("max_tokens", TOKENS_MAX), ("max_completion_tokens", TOKENS_MAX), ("n", N_MAX)):
        value = body.get(name)
        if type(value) is int and most < value < 2**31:
            changes[name] = most
    return changes
