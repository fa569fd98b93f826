"""Requests of clients and what the clients themselves count of them, to compare with what the nodes say."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.cluster.mesh import NodeProcess

PATH = "/v1/chat/completions"
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Call:
    node: NodeProcess
    token: str
    fields: dict[str, Any]
    headers: dict[str, str]

    @property
    def is_stream(self) -> bool:
        return bool(self.fields.get("stream"))


@dataclass(frozen=True, slots=True)
class Outcome:
    """outcome: success, error or rejected, as a client sees it."""

    call: Call
    status: int
    outcome: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nodes: str = ""


def call(node: NodeProcess, token: str = "", headers: dict[str, str] | None = None, **fields: Any) -> Call:
    return Call(node, token, fields, headers or {})


def make(request: Call) -> Outcome:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 8}
    body |= request.fields
    if request.is_stream:
        body["stream_options"] = {"include_usage": True}
    headers = {"content-type": "application/json"} | request.headers
    if request.token:
        headers["authorization"] = f"Bearer {request.token}"
    connection = http.client.HTTPConnection(request.node.http, timeout=TIMEOUT_S)
    try:
        connection.request("POST", PATH, json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    nodes = response.headers.get("x-ai-cluster-node", "")
    if response.status != 200:
        return Outcome(request, response.status, "rejected" if response.status < 500 else "error", nodes=nodes)
    usage, failed = _read(text) if request.is_stream else (json.loads(text)["usage"], False)
    if failed or usage is None:
        return Outcome(request, 200, "error", nodes=nodes)
    return Outcome(request, 200, "success", usage["prompt_tokens"], usage["completion_tokens"], nodes)


def _read(text: str) -> tuple[dict[str, int] | None, bool]:
    """(usage, whether it broke) of a stream."""
    usage = None
    for line in text.splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return None, True
            usage = chunk.get("usage") or usage
    return usage, "data: [DONE]" not in text


def make_all(calls: Iterable[Call], at_once: int = 4) -> list[Outcome]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(make, calls))


def by_status(outcomes: Iterable[Outcome]) -> Counter[int]:
    return Counter(outcome.status for outcome in outcomes)


def by_outcome(outcomes: Iterable[Outcome]) -> Counter[str]:
    return Counter(outcome.outcome for outcome in outcomes)
