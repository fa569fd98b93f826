"""`python -m tests.cluster.endurance`: a day's requests in minutes. One JSON line of figures.

Two real nodes with a tiny model; clients on connections that stay open ask both for answers of one token: whole,
streamed, for a model that is not there, with a body that is wrong, with an unknown key, and with a key beyond its
limit. What a day would show is compared between a fifth of the requests and their end. Exit status 1 where one of these
does not hold:

  faults       every answer has a status that its request asks for, and no connection breaks
  rotated      the log was rotated at least once (asked of 200,000 requests and more)
  log_files    no log takes more files and bytes than it may
  log_errors   no line of the level error, and none lost
  series       on /metrics: none more, and none less, than after a fifth
  memory       resident memory of each node at the end, of that after a fifth: at most 5 % more
  descriptors  open files and sockets of each node: at most 5 more
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import trio

from nodes.model_tools.random_llama import write_random_llama
from observability.log_files import COMBINED, ERROR, ROTATE_BYTES, ROTATED_FILES
from tests.cluster.figures import finish, law, progress, rss_mib
from tests.cluster.limits import ask as admin
from tests.cluster.mesh import Mesh, NodeProcess

MODEL = "tiny"
NODES = 2
# Of the requests, what the first node is asked: its log is the one that rotates.
FIRST_SHARE = 0.75
WARM_SHARE = 0.2
ROTATES_FROM_REQUESTS = 200_000
ANSWER_TIMEOUT_S = 30.0
ANSWER_BYTES_MAX = 1_048_576
READ_BYTES = 65_536
FAULTS_KEPT = 10
PROGRESS_REQUESTS = 10_000
# Of a key that most requests with it exceed.
REQUESTS_PER_MINUTE = 60
UNKNOWN_KEY = "sk-0000000000000000-00000000000000000000000000000000"

# name, how often, the statuses that are right, what differs from an ordinary body, and which key it shows.
KINDS: tuple[tuple[str, int, frozenset[int], dict[str, Any], str], ...] = (
    ("whole", 60, frozenset({200}), {}, "open"),
    ("stream", 25, frozenset({200}), {"stream": True}, "open"),
    ("no such model", 3, frozenset({404}), {"model": "another"}, "open"),
    ("wrong", 4, frozenset({400}), {"temperature": "hot"}, "open"),
    # Who guesses keys for long is told to wait.
    ("unknown key", 3, frozenset({401, 429}), {}, "unknown"),
    ("limited", 5, frozenset({200, 429}), {}, "limited"),
)


@dataclass(frozen=True, slots=True)
class Options:
    requests: int = 200_000
    clients: int = 8
    seed: int = 7


@dataclass(slots=True)
class _State:
    """Of one node, at one time."""

    rss_mib: float
    series: int
    descriptors: int


@dataclass
class _Run:
    nodes: list[NodeProcess]
    keys: dict[str, str]
    options: Options
    sent: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    warm: list[_State] = field(default_factory=list)

    async def run(self) -> dict[str, Any]:
        for node in self.nodes:
            await self._state(node)  # from the first scrape on there are series of scrapes, too
        started = time.monotonic()
        async with trio.open_nursery() as nursery:
            for number in range(self.options.clients):
                nursery.start_soon(self._client, random.Random(f"{self.options.seed}|{number}"))
        seconds = time.monotonic() - started
        return self._figures(seconds, [await self._state(node) for node in self.nodes])

    async def _client(self, rng: random.Random) -> None:
        """One connection to each node, opened anew where one broke."""
        connections: dict[str, trio.SocketStream] = {}
        try:
            while self.sent < self.options.requests:
                self.sent += 1
                if self.sent == int(self.options.requests * WARM_SHARE):
                    self.warm = [await self._state(node) for node in self.nodes]
                if self.sent % PROGRESS_REQUESTS == 0:
                    progress(f"{self.sent} requests, {self.fault_count} faults")
                node = self.nodes[rng.random() >= FIRST_SHARE]
                name, _, right, changes, key = rng.choices(KINDS, [kind[1] for kind in KINDS])[0]
                try:
                    if node.name not in connections:
                        host, port = node.http.rsplit(":", 1)
                        connections[node.name] = await trio.open_tcp_stream(host, int(port))
                    with trio.fail_after(ANSWER_TIMEOUT_S):
                        status = await _ask(connections[node.name], _request(changes, self.keys[key]))
                    self.counts[f"{name} {status}"] += 1
                    if status not in right:
                        self._fault(f"{name}: status {status}")
                except (OSError, trio.BrokenResourceError, trio.TooSlowError, ValueError) as exc:
                    self._fault(f"{name}: {exc!r}")
                    if (broken := connections.pop(node.name, None)) is not None:
                        await broken.aclose()
        finally:
            for connection in connections.values():
                await trio.aclose_forcefully(connection)

    def _fault(self, what: str) -> None:
        self.fault_count += 1
        if len(self.faults) < FAULTS_KEPT:
            self.faults.append(what)

    async def _state(self, node: NodeProcess) -> _State:
        _, page = await trio.to_thread.run_sync(node.request, "/metrics")
        series = sum(bool(line) and not line.startswith(b"#") for line in page.splitlines())
        return _State(rss_mib([node])[node.name], series, psutil.Process(node.pid).num_fds())

    def _figures(self, seconds: float, end: list[_State]) -> dict[str, Any]:
        logs = [node.folder / "logs" for node in self.nodes]
        files = {str(path.relative_to(path.parents[2])): path.stat().st_size for log in logs for path in log.iterdir()}
        most = max(len(list(log.glob(f"{name}*"))) for log in logs for name in (COMBINED, ERROR))
        errors = sum((log / ERROR).stat().st_size for log in logs)
        lost = sum(node.metric("ai_cluster_log_lines_dropped_total") for node in self.nodes)
        pairs = list(zip(self.warm, end, strict=True))
        may_ask_for_rotation = self.options.requests >= ROTATES_FROM_REQUESTS
        return {
            "seed": self.options.seed,
            "requests": self.sent,
            "requests_per_s": round(self.sent / seconds, 1),
            "answers": dict(sorted(self.counts.items())),
            "faults": self.faults,
            "log_bytes": files,
            "rss_mib": [[warm.rss_mib, after.rss_mib] for warm, after in pairs],
            "series": [[warm.series, after.series] for warm, after in pairs],
            "descriptors": [[warm.descriptors, after.descriptors] for warm, after in pairs],
            "laws": {
                "faults": law(self.fault_count, at_most=0),
                "rotated": law(most - 1 if may_ask_for_rotation else None, at_least=1),
                "log_files": law(most, at_most=1 + ROTATED_FILES),
                "log_bytes": law(max(files.values()), at_most=ROTATE_BYTES),
                "log_errors": law(errors + lost, at_most=0),
                "series": law(max(abs(after.series - warm.series) for warm, after in pairs), at_most=0),
                "memory": law(max(after.rss_mib / warm.rss_mib - 1 for warm, after in pairs), at_most=0.05),
                "descriptors": law(max(after.descriptors - warm.descriptors for warm, after in pairs), at_most=5),
            },
        }


def _request(changes: dict[str, Any], key: str) -> bytes:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, "temperature": 0}
    content = json.dumps(body | changes).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: node\r\ncontent-type: application/json\r\n"
        b"authorization: Bearer %s\r\ncontent-length: %d\r\n\r\n%s" % (key.encode(), len(content), content)
    )


async def _ask(connection: trio.SocketStream, request: bytes) -> int:
    """The status of the answer, which is read to its end. Raises ValueError for one without an end."""
    await connection.send_all(request)
    answer = bytearray()
    while not _is_whole(answer):
        part = await connection.receive_some(READ_BYTES)
        answer += part
        if not part or len(answer) > ANSWER_BYTES_MAX:
            raise ValueError(f"an answer without an end: {bytes(answer[-200:])!r}")
    return int(answer.split(b" ", 2)[1])


def _is_whole(answer: bytearray) -> bool:
    head, separator, body = answer.partition(b"\r\n\r\n")
    if not separator:
        return False
    lines = head.lower().split(b"\r\n")
    length = next((int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:")), None)
    if length is None:  # chunked, a stream that ends with the chunk of nothing
        return body.endswith(b"0\r\n\r\n")
    return len(body) >= length


async def run(folder: Path, options: Options) -> dict[str, Any]:
    model = write_random_llama(folder / "model")
    mesh = Mesh(folder)
    try:
        token = "t" * 32
        for _ in range(NODES):
            mesh.add("--model", f"{model}={MODEL}", environment={"AI_CLUSTER_ADMIN_TOKEN": token})
        mesh.wait_until_agreed()
        keys = {"unknown": UNKNOWN_KEY}
        for name, limits in {"open": {}, "limited": {"requests_per_minute": REQUESTS_PER_MINUTE}}.items():
            status, made = admin(mesh.nodes[0], "/admin/keys", {"name": name, **limits}, token)
            assert status == 200, made
            keys[name] = made["token"]
        await trio.sleep(1.0)  # a key is known everywhere within that
        return await _Run(mesh.nodes, keys, options).run()
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
