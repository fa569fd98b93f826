"""The commands that ask a running node: chat, models; over HTTP with the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from rich.console import Console

from nodes.node_address import (
    NodeAddress,
    NodeAnswered,
    NodeNotAsked,
    NodeUnreachable,
    describe_fault,
    parse_url,
)

TIMEOUT_S = 10.0
# A stream is silent for as long as its request waits in a queue; keep-alives come each 5 s.
STREAM_TIMEOUT_S = 60.0
PIPE_COLUMNS = 240
# As nodes.access.api_key makes them; repeated here, since a client imports neither trio nor the rest of a node.
OWN_KEY = re.compile(r"sk-[A-Za-z0-9]{12}-[A-Za-z0-9]{43}")


def make_console() -> Console:
    """For tables. A pipe has no width; there nothing may be cut off."""
    return Console() if sys.stdout.isatty() else Console(width=PIPE_COLUMNS)


def list_models(url: str, ca_file: Path | None, api_key: str | None) -> int:
    try:
        for model in get_json(parse_url(url, ca_file), "/v1/models", api_key or _key_of_environment())["data"]:
            print(model["id"])
    except NodeAnswered as exc:
        print(f"ai-cluster: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


def stream_chat(
    url: str,
    ca_file: Path | None,
    question: str,
    *,
    model: str | None,
    temperature: float,
    max_tokens: int | None,
    api_key: str | None,
) -> int:
    """Print the answer token by token. 1 when it could not be had whole."""
    newline = ""  # once part of an answer is on the line
    api_key = api_key or _key_of_environment()
    try:
        node = parse_url(url, ca_file)
        if model is None:
            served = get_json(node, "/v1/models", api_key)["data"]
            names = [entry["id"] for entry in served if entry.get("kind", "generation") == "generation"]
            if not names:
                whose = "that this API key may use" if api_key else "yet"
                raise NodeAnswered(f"no node of this mesh serves a language model {whose}; see: ai-cluster status")
            model = names[0]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "stream": True,
            "temperature": temperature,
        }
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        for text in _stream(node, body, api_key):
            print(text, end="", flush=True)
            newline = "\n"
        print()
    except NodeAnswered as exc:
        print(f"{newline}ai-cluster: {exc}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _key_of_environment() -> str | None:
    """Where clients of this API look for their key. One of another service is not sent to a node."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return key if OWN_KEY.fullmatch(key) else None


def _stream(node: NodeAddress, body: dict[str, Any], api_key: str | None) -> Iterator[str]:
    request = request_for(node, "/v1/chat/completions", api_key, json.dumps(body).encode())
    with open_answer(node, request, STREAM_TIMEOUT_S) as response:
        try:
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    return
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise NodeAnswered(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
        except (OSError, http.client.HTTPException) as exc:
            raise NodeAnswered(f"the connection to {node} broke: {exc}") from exc
    raise NodeAnswered(f"{node} ended the answer before it was complete")


def get_json(node: NodeAddress, path: str, api_key: str | None = None) -> dict[str, Any]:
    """The one object of the answer. Raises NodeAnswered."""
    with open_answer(node, request_for(node, path, api_key), TIMEOUT_S) as response:
        try:
            answer: dict[str, Any] = json.load(response)
        except (OSError, ValueError) as exc:
            raise NodeAnswered(f"{node}{path} answered something that is no JSON; is it an AI Cluster node?") from exc
    return answer


def ask_json(node: NodeAddress, method: str, path: str, bearer: str, body: bytes | None) -> dict[str, Any]:
    """The one object of the answer. Raises NodeAnswered."""
    request = request_for(node, path, bearer, body)
    request.method = method
    try:
        with open_answer(node, request, TIMEOUT_S) as response:
            answer = json.load(response)
    except (OSError, http.client.HTTPException) as exc:
        raise NodeAnswered(f"the connection to {node} broke: {exc}; see what was done before you repeat it") from exc
    except ValueError as exc:
        raise NodeAnswered(f"{node}{path} answered something that is no JSON; is it an AI Cluster node?") from exc
    return dict(answer)


def request_for(node: NodeAddress, path: str, bearer: str | None, body: bytes | None = None) -> urllib.request.Request:
    """A POST where there is a body, else a GET. Raises NodeAnswered for a key that no header can carry."""
    headers = {"content-type": "application/json"} if body is not None else {}
    if bearer:
        if not (bearer.isascii() and bearer.isprintable()):
            raise NodeAnswered("the key has a character that no key has, such as a line's end; read it anew")
        headers["authorization"] = f"Bearer {bearer}"
    return urllib.request.Request(node.url + path, data=body, headers=headers)  # noqa: S310 (http or https: NodeAddress)


def open_answer(node: NodeAddress, request: urllib.request.Request, timeout_s: float) -> http.client.HTTPResponse:
    """Raises NodeUnreachable when nobody answers, NodeAnswered with what the node gives as its reason to refuse, which
    is NodeNotAsked where that is the admin token."""
    handlers: list[urllib.request.BaseHandler] = []
    if node.tls is not None:
        handlers.append(urllib.request.HTTPSHandler(context=node.tls))
    if node.is_loopback:
        handlers.append(urllib.request.ProxyHandler({}))  # no proxy reaches this machine's own loopback
    try:
        response: http.client.HTTPResponse = urllib.request.build_opener(*handlers).open(request, timeout=timeout_s)
    except urllib.error.HTTPError as exc:
        is_token_wrong = exc.code == HTTPStatus.UNAUTHORIZED and "/admin/" in request.full_url
        raise (NodeNotAsked if is_token_wrong else NodeAnswered)(_refusal(exc)) from exc
    except (OSError, http.client.HTTPException) as exc:  # a URLError is an OSError
        fault = exc.reason if isinstance(exc, urllib.error.URLError) else exc
        if not isinstance(fault, Exception):
            fault = exc
        raise NodeUnreachable(describe_fault(node, request.full_url, fault)) from exc
    return response


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        message = str(json.load(error)["error"]["message"])
        is_key_wanted = error.code == HTTPStatus.UNAUTHORIZED and "/v1/" in error.url
        return f"{message}; give a key with --api-key or AI_CLUSTER_API_KEY" if is_key_wanted else message
    except (ValueError, KeyError, TypeError):
        return f"{error.url} answered {error.code} {error.reason}"
