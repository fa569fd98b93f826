"""`python -m tests.cluster.malformed`: malformed HTTP requests to one real node. One JSON line of figures.

Raw bytes, damaged heads, headers that contradict each other, JSON damaged as text and as a tree, HTTP/2 frames out of
order: drawn from one seed, sent over raw sockets by several clients at once, each of which ends its side and reads what
comes. Meanwhile a polite client asks. Exit status 1 where one of these does not hold:

  server_errors  no answer with a status of 500 or above; but 501 to a request that names a transfer coding, which is
                 what HTTP asks for where a server does not know it (RFC 9112, 6.1), and is answered below the API
  log_errors     no line of the level error, and no traceback, in the node's log
  polite         each request of the polite client is answered 200
  unanswered     a client that was neither answered nor closed within the time a node gives slow ones: none
  memory         resident memory at the end, of that after a fifth of the requests: at most 5 % more

A request that is valid all the same is answered as it should be, which breaks nothing. Samples of what broke a law are
in the figures, in base64.
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import random
import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import trio

from nodes.model_tools.random_llama import write_random_llama
from tests.cluster.figures import finish, law, progress, quantiles, rss_mib
from tests.cluster.limits import ask as admin
from tests.cluster.mesh import Mesh, NodeProcess
from tests.cluster.stream_client import ask

MODEL = "tiny"
# Longer than a node gives a head (10 s); a body's bound is not met, since clients end their side.
ANSWER_TIMEOUT_S = 20.0
SAMPLES_MAX = 20
SAMPLE_BYTES_MAX = 2_000
POLITE_INTERVAL_S = 0.1
WARM_SHARE = 0.2
READ_BYTES = 65_536
ANSWER_BYTES_MAX = 1_048_576
TOKENS_MAX = 4

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
    "max_tokens": TOKENS_MAX,
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 1,
    "stop": ["x"],
    "seed": 3,
    "logit_bias": {"5": 1},
    "logprobs": True,
    "top_logprobs": 2,
    "stream": False,
    "stream_options": None,
    "response_format": {"type": "text"},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "none",
    "metadata": {"a": "b"},
}
SEEDS: tuple[tuple[str, str, dict[str, Any] | None], ...] = (
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/completions", {"model": MODEL, "prompt": "once", "max_tokens": TOKENS_MAX, "echo": True, "n": 1}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny", None),
    ("GET", "/cluster/status", None),
    ("GET", "/metrics", None),
    ("GET", "/health", None),
    ("GET", "/openapi.json", None),
    ("POST", "/admin/keys", {"name": "a", "models": ["b"], "priority": 1, "expires_at": "2027-01-01"}),
    ("PATCH", "/admin/keys/a", {"name": "b"}),
    ("GET", "/admin/usage?from=2026-01-01&to=2026-02-01", None),
    ("POST", "/admin/join", {"seed": "127.0.0.1:1"}),
    ("POST", "/admin/keyring/install", {"key": "A"}),
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**6, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.5, 1e308, "", "a", " ",
    "\x00", "\ud800", "é" * 300, "x" * 5_000, "1", "null", "tiny", [], [[]], [None] * 50, ["a"] * 2_000, {}, {"a": {}},
    {"": ""}, {"type": "json_schema"}, {"type": "json_object"}, {"$ref": "#"}, [0, 1, 2], {"role": "user"},
)  # fmt: skip
TEXTS = (
    b"NaN", b"Infinity", b"-", b"1e999", b'"\\u', b'"\\ud800"', b"\xff", b"\xed\xa0\x80", b"[" * 3_000,
    b'{"a":' * 3_000, b"\x00", b"//", b"'", b",", b":", b"}", b"]", b"9" * 6_000, b"\xef\xbb\xbf",
)  # fmt: skip
HEADERS = (
    b"content-length: -1", b"content-length: 99999999999999999999", b"content-length: 5, 6", b"content-length: 0x10",
    b"content-length: ", b"content-length: 3\r\ncontent-length: 4", b"transfer-encoding: chunked",
    b"transfer-encoding: gzip", b"transfer-encoding: chunked, chunked", b"transfer-encoding: identity",
    b"content-encoding: gzip", b"expect: 100-continue", b"expect: nonsense",
    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: a",
    b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__", b"host: a\r\nhost: b",
    b"host: \x00", b"authorization: Bearer", b"authorization: Bearer \xff\xfe", b"authorization: Bearer sk-a-b",
    b"authorization: Basic ====", b"x: " + b"y" * 20_000, b"\r\n".join(b"x-%d: y" % i for i in range(150)),
    b"no colon", b": empty", b" folded", b"x\x00y: z", b"accept: " + b"a," * 900,
    b"accept: application/openmetrics-text; version=9999; q=a", b"content-type: text/plain",
    b"content-type: application/json; charset=utf-99", b"content-type: multipart/form-data",
    b"content-type: multipart/form-data; boundary=a", b"content-type: application/x-www-form-urlencoded",
    b"content-type: \xff", b"x-request-id: \x7f", b"range: bytes=0-0,5-1", b"if-none-match: \"",
    b"cookie: a=b; =; \xff", b"origin: null", b"forwarded: for=\"", b"x-forwarded-for: 1, 2",
    b"accept-encoding: gzip;q=nan", b"date: never", b"te: trailers",
)  # fmt: skip
PATHS = (
    b"/", b"//", b"/%", b"/%00", b"/%ff", b"/..%2f..%2fetc/passwd", b"/v1/models/" + b"a" * 3_000,
    b"/v1/models/%e0%80", b"*", b"", b"http://a/v1/models", b"/v1/chat/completions/", b"/v1/../admin/keys",
    b"/admin/keys/%2e%2e", b"/admin/usage?from=0001-01-01", b"/admin/usage?from=%00", b"/admin/usage?to=9999-12-31",
    b"/v1/models?" + b"a=b&" * 500, b"/\xff", b"/v1/models#x", b"/metrics?name[]=%ff",
)  # fmt: skip
SEPARATORS = (b"\r\n", b"\n", b"\x00", b" ", b"\xff", b"\t", b":")
METHODS = (
    b"GET", b"POST", b"PUT", b"DELETE", b"PATCH", b"HEAD", b"OPTIONS", b"TRACE", b"CONNECT", b"get", b"", b"A" * 100,
    b"\xff", b"PRI",
)  # fmt: skip

# What broke a law in an earlier run, sent before anything is drawn: an upgrade to HTTP/2 that is refused at once and
# whose client ends its side, and hosts that can be none.
KNOWN = (
    b"GET /health HTTP/1.1\r\nhost: a\r\n%s\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
    b"http2-settings: AAMAAABkAAQAAP__\r\n\r\n" % b"\r\n".join(b"x-%d: y" % i for i in range(150)),
    b"GET /health HTTP/1.1\r\nhost: %s\r\n\r\n" % (b"a" * 70),
    b"GET /v1/models HTTP/1.1\r\nhost: a..b\r\n\r\n",
)


@dataclass(frozen=True, slots=True)
class Options:
    requests: int = 100_000
    clients: int = 8
    seed: int = 7


class Draw:
    """Requests from one seed. admin_token, api_key: open /admin and /v1, so that what is behind them is met too."""

    def __init__(self, rng: random.Random, admin_token: str, api_key: str) -> None:
        self._rng = rng
        self._known = list(KNOWN)
        self._admin_token, self._api_key = admin_token.encode(), api_key.encode()
        self._kinds = (
            self._raw,
            self._head,
            self._headers,
            self._path,
            self._text,
            self._tree,
            self._tree,
            self._frames,
        )

    def next(self) -> tuple[str, bytes]:
        """(kind, what to send)."""
        if self._known:
            return "known", self._known.pop()
        kind = self._rng.choice(self._kinds)
        return kind.__name__.strip("_"), kind()

    def _raw(self) -> bytes:
        data = self._rng.randbytes(self._rng.randrange(400))
        return data if self._rng.random() < 0.5 else data + b"\r\n\r\n"

    def _head(self) -> bytes:
        return self._damaged(self._request(*self._rng.choice(SEEDS)))

    def _headers(self) -> bytes:
        method, path, body = self._rng.choice(SEEDS)
        return self._request(method, path, body, self._rng.sample(HEADERS, self._rng.randrange(1, 4)))

    def _path(self) -> bytes:
        body = b"{}" if self._rng.random() < 0.5 else b""
        version = self._rng.choice((b"1.1", b"1.1", b"1.1", b"1.0", b"0.9", b"2.0", b"9.9", b""))
        head = self._rng.choice(METHODS) + b" " + self._rng.choice(PATHS) + b" HTTP/" + version
        head += b"\r\nauthorization: Bearer " + self._rng.choice((self._admin_token, self._api_key))
        return head + b"\r\nhost: a\r\ncontent-type: application/json\r\n" + self._length(body) + b"\r\n\r\n" + body

    def _text(self) -> bytes:
        method, path, body = self._rng.choice([seed for seed in SEEDS if seed[2] is not None])
        return self._request(method, path, self._damaged(json.dumps(body).encode(), TEXTS))

    def _tree(self) -> bytes:
        method, path, body = self._rng.choice([seed for seed in SEEDS if seed[2] is not None])
        changed = json.loads(json.dumps(body))
        for _ in range(self._rng.randrange(1, 4)):
            self._change(changed)
        if path.startswith("/v1") and isinstance(changed.get("max_tokens"), int | type(None)):
            changed["max_tokens"] = TOKENS_MAX  # what turns out valid must not fill the engine
        changed.pop("max_completion_tokens", None)
        return self._request(method, path, changed)

    def _frames(self) -> bytes:
        """HTTP/2 by prior knowledge, then damage."""
        peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        peer.initiate_connection()
        method, path, body = self._rng.choice(SEEDS)
        content = b"" if body is None else json.dumps(body).encode()
        headers = [(":method", method), (":scheme", "http"), (":authority", "a"), (":path", path)]
        headers += [("content-type", "application/json"), ("authorization", f"Bearer {self._token(path).decode()}")]
        peer.send_headers(1, headers, end_stream=not content)
        if content:
            peer.send_data(1, content, end_stream=True)
        data = bytes(peer.data_to_send())
        preface = 24 if self._rng.random() < 0.8 else 0  # mostly whole: without it, it is HTTP/1.1
        return data[:preface] + self._damaged(data[preface:])

    def _change(self, tree: Any) -> None:
        """One value of it, somewhere."""
        rng = self._rng
        while isinstance(tree, dict | list) and tree:
            keys = list(tree) if isinstance(tree, dict) else range(len(tree))
            key = rng.choice(keys)
            if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.6:
                tree = tree[key]
                continue
            choice = rng.random()
            if choice < 0.1:
                del tree[key]
            elif choice < 0.2 and isinstance(tree, dict):
                tree[rng.choice(("", "a", "functions", "audio", "model", "messages", "stream", "\ud800"))] = tree[key]
            else:
                tree[key] = copy.deepcopy(rng.choice(VALUES))
            return

    def _request(self, method: str, path: str, body: Any, headers: list[bytes] | None = None) -> bytes:
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1".encode(), b"host: a", b"content-type: application/json"]
        if self._rng.random() < 0.9:
            lines.append(b"authorization: Bearer " + self._token(path))
        lines += headers or []
        if headers is None or self._rng.random() < 0.7:
            lines.append(self._length(content))
        return b"\r\n".join(lines) + b"\r\n\r\n" + content

    def _token(self, path: str) -> bytes:
        return self._admin_token if path.startswith("/admin") else self._api_key

    @staticmethod
    def _length(content: bytes) -> bytes:
        return b"content-length: %d" % len(content)

    def _damaged(
        self, data: bytes, pieces: tuple[bytes, ...] = (b"\r\n", b"\n", b"\x00", b" ", b"\xff", b"\t", b":")
    ) -> bytes:
        rng, changed = self._rng, bytearray(data)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(changed) + 1)
            choice = rng.randrange(5)
            if choice == 0:
                changed[at:at] = rng.choice(pieces)
            elif choice == 1:
                del changed[at : at + rng.randrange(1, 20)]
            elif choice == 2 and at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            elif choice == 3:
                changed[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(1, 8))
            else:
                end = rng.randrange(at, len(changed) + 1)
                changed[at:at] = changed[at : min(end, at + 300)]
        return bytes(changed)


@dataclass
class _Run:
    node: NodeProcess
    options: Options
    draw: Draw
    api_key: str
    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)
    polite_s: list[float] = field(default_factory=list)
    polite_faults: Counter[str] = field(default_factory=Counter)
    rss: list[float] = field(default_factory=list)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._polite)
            async with trio.open_nursery() as rude:
                for _ in range(self.options.clients):
                    rude.start_soon(self._rude)
            nursery.cancel_scope.cancel()
        self.rss.append(rss_mib([self.node])[self.node.name])

    async def _rude(self) -> None:
        while self.sent < self.options.requests:
            self.sent += 1
            if self.sent == int(self.options.requests * WARM_SHARE):
                self.rss.append(rss_mib([self.node])[self.node.name])
            if self.sent % 5_000 == 0:
                progress(f"{self.sent} requests, {rss_mib([self.node])[self.node.name]} MiB, {dict(self.broken)}")
            kind, data = self.draw.next()
            self.kinds[kind] += 1
            fault, statuses = await self._send(data)
            for status in statuses:
                self.statuses[f"{status // 100}xx"] += 1
                if status == 501 and b"transfer-encoding" in data.lower():
                    self.statuses["501"] += 1
                elif status >= 500:
                    fault = f"status {status}"
            if fault:
                self.broken[fault] += 1
                if len(self.samples) < SAMPLES_MAX:
                    sample = base64.b64encode(data[:SAMPLE_BYTES_MAX]).decode()
                    self.samples.append({"fault": fault, "kind": kind, "bytes": len(data), "sent": sample})

    async def _send(self, data: bytes) -> tuple[str, list[int]]:
        """(what went wrong, the statuses that came)."""
        host, port = self.node.http.rsplit(":", 1)
        answer = bytearray()
        with trio.move_on_after(ANSWER_TIMEOUT_S) as patience:
            try:
                async with await trio.open_tcp_stream(host, int(port)) as stream:
                    await stream.send_all(data)
                    await stream.send_eof()
                    while len(answer) < ANSWER_BYTES_MAX and (part := await stream.receive_some(READ_BYTES)):
                        answer += part
            except trio.BrokenResourceError:
                pass  # it has closed on bytes that it does not take, perhaps before all were sent
            except OSError as exc:
                return f"no connection: {exc.strerror}", []
        fault = "unanswered" if patience.cancelled_caught else ""
        return fault, [int(status) for status in _STATUS.findall(bytes(answer))] or _http2_statuses(bytes(answer))

    async def _polite(self) -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
        while True:
            started = time.monotonic()
            answer = await ask(self.node.http, body, headers={"authorization": f"Bearer {self.api_key}"})
            self.polite_s.append(time.monotonic() - started)
            if answer.status != 200:
                self.polite_faults[f"{answer.status} {answer.error}"[:200]] += 1
            await trio.sleep(POLITE_INTERVAL_S)

    def figures(self, seconds: float) -> dict[str, Any]:
        log = "".join(path.read_text() for path in (self.node.folder / "logs").glob("combined.log*"))
        errors = [line for line in log.splitlines() if '"level": "error"' in line or '"level":"error"' in line]
        errors += [line for line in log.splitlines() if "Traceback" in line]
        errors += [line for line in self.node.stderr().splitlines() if "Traceback" in line]
        unanswered = self.broken.pop("unanswered", 0)
        return {
            "seed": self.options.seed,
            "requests": self.sent,
            "requests_per_s": round(self.sent / seconds, 1),
            "kinds": dict(self.kinds),
            "statuses": dict(self.statuses),
            "polite_ms": quantiles(self.polite_s, 1e3),
            "polite_faults": dict(self.polite_faults),
            "rss_mib": self.rss,
            "broken": dict(self.broken),
            "samples": self.samples,
            "log_errors": errors[:5],
            "laws": {
                "server_errors": law(sum(self.broken.values()), at_most=0),
                "unanswered": law(unanswered, at_most=0),
                "log_errors": law(len(errors), at_most=0),
                "polite": law(sum(self.polite_faults.values()), at_most=0),
                "polite_asked": law(len(self.polite_s), at_least=1),
                "memory": law(self.rss[-1] / self.rss[0] - 1, at_most=0.05),
            },
        }


def _http2_statuses(answer: bytes) -> list[int]:
    """Of the header frames, as far as they can be read."""
    peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    peer.initiate_connection()
    found: list[int] = []
    try:
        peer.send_headers(1, [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")])
        for event in peer.receive_data(answer):
            headers = getattr(event, "headers", None)
            found += [int(value) for name, value in headers or () if bytes(name) == b":status"]
    except Exception:  # of another stream, or cut: what is no whole answer says nothing
        return found
    return found


async def run(folder: Path, options: Options) -> dict[str, Any]:
    model = write_random_llama(folder / "model")
    mesh = Mesh(folder)
    try:
        token = "t" * 32
        node = mesh.add("--model", f"{model}={MODEL}", environment={"AI_CLUSTER_ADMIN_TOKEN": token})
        status, made = admin(node, "/admin/keys", {"name": "polite"}, token)
        assert status == 200, made
        draw = Draw(random.Random(options.seed), token, made["token"])
        running = _Run(node, options, draw, made["token"])
        started = time.monotonic()
        await running.run()
        return running.figures(time.monotonic() - started)
    finally:
        mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Options()
    parser.add_argument("--requests", type=int, default=defaults.requests)
    parser.add_argument("--clients", type=int, default=defaults.clients, help="at once")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = Options(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory() as folder:
        finish(trio.run(run, Path(folder), options))


if __name__ == "__main__":
    main()
