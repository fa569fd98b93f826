"""Every node of a mesh restarted, one after the other, under load: python -m tests.cluster.rolling [--nodes 4] ...

Clients have the list of all addresses, as a DNS name with several would give them. Where a connection is refused they
try the next one; anything else that goes wrong with a request, a reset or an end before its answer included, is a
failure, and so is an answer whose text differs from that of the calm mesh. Prints one line of JSON; exit code 1 when a
request failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import trio

from nodes import garbage
from tests.cluster.mesh import Mesh, NodeProcess

REQUEST_TIMEOUT_S = 60.0
FAILURES_SHOWN = 10
# Between two requests of a client: none for the first half of them, up to this for the others, so that connections are
# idle when their node begins to drain.
THINK_S_MAX = 2.5
# Answers by their length in tokens; the first is asked for whole, the others streamed.
LENGTHS = (8, 40, 160)


@dataclass(slots=True)
class Result:
    requests: int = 0
    failed: int = 0
    restarts: int = 0
    retried_connections: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)  # the first of them

    def fail(self, what: str) -> None:
        self.failed += 1
        if len(self.failures) < FAILURES_SHOWN:
            self.failures.append(what)


class Client:
    """Sends requests one after the other over connections kept alive. Even ones stay with an address while it takes
    connections; odd ones go to the next with each request."""

    def __init__(self, index: int, urls: Sequence[str], right: dict[int, str], result: Result) -> None:
        self._rng = random.Random(index)
        self._urls = urls
        self._at = index % len(urls)
        self._stays = index % 2 == 0
        self._think_s = 0.0 if index % 4 < 2 else THINK_S_MAX
        self._right = right
        self._result = result

    async def run(self, stop: trio.Event) -> None:
        async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as http:
            while not stop.is_set():
                length = self._rng.choice(LENGTHS)
                self._result.requests += 1
                try:
                    text = await self._ask_any(http, length)
                    if text != self._right[length]:
                        self._result.fail(f"an answer of {length} tokens is {text[-60:]!r} at its end")
                except (httpx.HTTPError, ValueError) as exc:
                    self._result.fail(f"{self._urls[self._at]}: {exc!r}")
                if not self._stays:
                    self._at = (self._at + 1) % len(self._urls)
                await trio.sleep(self._rng.uniform(0, self._think_s))

    async def _ask_any(self, http: httpx.AsyncClient, length: int) -> str:
        """Raises httpx.ConnectError when no address takes a connection."""
        for _ in self._urls[1:]:
            try:
                return await ask(http, self._urls[self._at], length)
            except httpx.ConnectError:
                self._result.retried_connections += 1
                self._at = (self._at + 1) % len(self._urls)
        return await ask(http, self._urls[self._at], length)


async def ask(http: httpx.AsyncClient, url: str, length: int) -> str:
    """The text. Raises httpx.HTTPError, or ValueError for an answer that is no whole answer."""
    question = [{"role": "user", "content": "How do I restart the nodes?"}]
    shape = {"model": "demo", "messages": question, "temperature": 0, "ignore_eos": True, "max_tokens": length}
    is_stream = length != LENGTHS[0]
    text, is_done = [], not is_stream
    body = shape | {"stream": is_stream}
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {(await response.aread()).decode()[:300]}")
        if not is_stream:
            return str(json.loads(await response.aread())["choices"][0]["message"]["content"])
        async with aclosing(response.aiter_lines()) as lines:
            async for line in lines:
                if line == "data: [DONE]":
                    is_done = True
                elif line.startswith("data: "):
                    text.append(_text(json.loads(line[6:])))
    if not is_done:
        raise ValueError("the stream ended without [DONE]")
    return "".join(text)


def _text(chunk: dict[str, Any]) -> str:
    if "error" in chunk:
        raise ValueError(f"an error frame: {chunk['error']['message']}")
    return "".join(choice["delta"].get("content", "") for choice in chunk["choices"])


async def restart_all(mesh: Mesh, clients: int, seconds: float) -> Result:
    """Restart every node once, and go on until `seconds` are over. The mesh is ready and agreed."""
    result = Result()
    urls = [node.url for node in mesh.nodes]
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as http:
        right = {length: await ask(http, urls[0], length) for length in LENGTHS}
    stop = trio.Event()
    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        for index in range(clients):
            nursery.start_soon(Client(index, urls, right, result).run, stop)
        pause_s = max(1.0, seconds / (2 * len(mesh.nodes)))
        is_first_round = True
        while is_first_round or trio.current_time() - started < seconds:
            for node in mesh.nodes:
                await trio.sleep(pause_s)
                if not is_first_round and trio.current_time() - started >= seconds:
                    break
                await trio.to_thread.run_sync(_restart, mesh, node)
                result.restarts += 1
            is_first_round = False
        await trio.sleep(pause_s)
        stop.set()
    result.seconds = round(trio.current_time() - started, 1)
    return result


def _restart(mesh: Mesh, node: NodeProcess) -> None:
    code = node.stop()
    if code != 0:
        raise AssertionError(f"{node.name} ended with {code}: {node.stderr()[-1000:]}")
    node.start(*(other.mesh for other in mesh.nodes if other is not node))
    mesh.wait_until_agreed()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0, help="at least; every node is restarted once")
    parser.add_argument("--keep", type=Path, help="keep the nodes' logs here")
    given = parser.parse_args()
    garbage.settle()  # this client's own pauses would look like the mesh's
    with tempfile.TemporaryDirectory() as folder:
        mesh = Mesh(given.keep or Path(folder))
        try:
            for _ in range(given.nodes):
                mesh.add()
            mesh.wait_until_agreed()
            result = trio.run(restart_all, mesh, given.clients, given.seconds)
        finally:
            mesh.close()
    print(json.dumps(asdict(result)))
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
