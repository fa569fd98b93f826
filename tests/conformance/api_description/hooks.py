"""Steers what schemathesis makes up, where chance would never come to the point or go too far: to a model that is
there, short answers, and no node told to leave. What breaks a field's own rule is left as it is.

AI_CLUSTER_WELL_FORMED: what only a node can judge (a grammar, a conversation's order, fields that exclude each other)
is taken out or put right, so that most requests are answered, and the answers looked at.
"""

from __future__ import annotations

import atexit
import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import schemathesis

MODEL = os.environ["AI_CLUSTER_MODEL"]
STATUS_FILE = Path(os.environ["AI_CLUSTER_STATUS_FILE"])
IS_WELL_FORMED = bool(os.environ.get("AI_CLUSTER_WELL_FORMED"))
MODEL_CHARS_MAX = 256
TOKENS_MAX = 8
N_MAX = 3
NOBODY = "no-such-node"
STOPPING = ("/admin/leave", "/admin/drain")
JUDGED_BY_THE_NODE = ("response_format", "structured_outputs", "logit_bias", "best_of", "suffix", "min_tokens", "echo")
JUDGED_PREFIX = "guided_"
MESSAGES = [{"role": "user", "content": "How do I add a node?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

statuses: defaultdict[str, Counter[str]] = defaultdict(Counter)


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if not isinstance(body, dict) or context.operation is None:
        return body
    path = context.operation.path
    if path.startswith("/v1/"):
        body = body | _bounded(body)
        return _well_formed(body) if IS_WELL_FORMED else body
    if path in STOPPING and body.get("node_id") is None:
        return body | {"node_id": NOBODY}
    return body


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    statuses[f"{case.operation.method.upper()} {case.operation.path}"][str(response.status_code)] += 1


@atexit.register
def write_statuses() -> None:
    STATUS_FILE.write_text(json.dumps(statuses))


def _bounded(body: dict[str, Any]) -> dict[str, Any]:
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


def _well_formed(body: dict[str, Any]) -> dict[str, Any]:
    body = {k: v for k, v in body.items() if k not in JUDGED_BY_THE_NODE and not k.startswith(JUDGED_PREFIX)}
    if body.get("max_completion_tokens") is not None:
        body.pop("max_tokens", None)
    if not body.get("stream"):
        body.pop("stream_options", None)
    if body.get("logprobs") is not True:
        body.pop("top_logprobs", None)
    if "messages" in body:
        body["messages"] = MESSAGES
    if "prompt" in body:
        body["prompt"] = ["A node", "The mesh"] if isinstance(body["prompt"], list) else "A node"
    if body.get("tools"):
        body["tools"] = [TOOL]
    else:
        body.pop("tools", None)
    if not isinstance(body.get("tool_choice"), str) or "tools" not in body:
        body.pop("tool_choice", None)
    if "tools" not in body:
        body.pop("parallel_tool_calls", None)
    return body
