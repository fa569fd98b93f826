"""`python -m tests.cluster.hammer`: requests at a given rate to several nodes, whatever becomes of them.

A process of its own, so that who measures is not late, over connections that it keeps. On stdin, the JSON of Order,
since it holds a key; on stdout, one JSON array [[answered at, node, status, tokens, seconds], …] in the order of the
answers, by time.monotonic(), which all processes of a machine share. status 0: the connection failed; -1: it was too
late.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import trio

READ_BYTES = 65_536
ANSWER_TIMEOUT_S = 20.0
# Requests that wait for an answer, of all nodes; beyond it the load is no longer what was ordered.
RUNNING_MAX = 2_000
OVERTIME_S = 60.0


@dataclass(frozen=True, slots=True)
class Order:
    """rate: requests a second, of all nodes together, at random times (Poisson). begins_at: time.monotonic()."""

    addresses: Sequence[str]
    token: str
    body: dict[str, Any]
    rate: float
    seconds: float
    begins_at: float
    seed: int = 7
    path: str = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one request. node: index of its address; tokens: that it used; seconds: until its answer."""

    at: float
    node: int
    status: int
    tokens: int
    seconds: float


@dataclass
class Hammering:
    """A running load. outcomes() waits for its end."""

    _process: subprocess.Popen[str]
    _timeout_s: float

    def outcomes(self) -> list[Outcome]:
        """Raises AssertionError where the load could not be kept up, subprocess.TimeoutExpired."""
        try:
            out, errors = self._process.communicate(timeout=self._timeout_s)
        finally:
            self.close()
        assert self._process.returncode == 0, errors[-2000:]
        return [Outcome(*row) for row in json.loads(out)]

    def close(self) -> None:
        """End it whatever it does. Any number of times."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def hammer(order: Order) -> Hammering:
    command = [sys.executable, "-m", "tests.cluster.hammer"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(order)) + "\n")
    process.stdin.flush()
    return Hammering(process, max(0.0, order.begins_at - time.monotonic()) + order.seconds + OVERTIME_S)


@dataclass
class _Hammer:
    order: Order
    outcomes: list[Outcome] = field(default_factory=list)
    idle: dict[int, list[trio.SocketStream]] = field(default_factory=dict)
    running: int = 0

    async def run(self) -> None:
        order, rng = self.order, random.Random(self.order.seed)
        offset = trio.current_time() - time.monotonic()
        due = order.begins_at
        async with trio.open_nursery() as nursery:
            while (due := due + rng.expovariate(order.rate)) < order.begins_at + order.seconds:
                await trio.sleep_until(due + offset)
                if self.running == RUNNING_MAX:
                    raise RuntimeError(f"{RUNNING_MAX} requests wait for an answer: the nodes cannot keep up")
                self.running += 1
                nursery.start_soon(self._ask, rng.randrange(len(order.addresses)))

    async def _ask(self, node: int) -> None:
        started = time.monotonic()
        status = tokens = 0
        stream: trio.SocketStream | None = None
        try:
            with trio.move_on_after(ANSWER_TIMEOUT_S) as patience:
                free = self.idle.setdefault(node, [])
                stream = free.pop() if free else await self._connect(node)
                status, body, is_kept = await self._exchange(stream, node)
                if status == 200:
                    tokens = json.loads(body)["usage"]["total_tokens"]
                if is_kept:
                    free.append(stream)
                    stream = None
            if patience.cancelled_caught:
                status = -1
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            status = 0
        finally:
            self.running -= 1
            if stream is not None:
                stream.socket.close()
        ended = time.monotonic()
        self.outcomes.append(Outcome(ended, node, status, tokens, ended - started))

    async def _connect(self, node: int) -> trio.SocketStream:
        host, port = self.order.addresses[node].rsplit(":", 1)
        return await trio.open_tcp_stream(host, int(port))

    async def _exchange(self, stream: trio.SocketStream, node: int) -> tuple[int, bytes, bool]:
        order = self.order
        content = json.dumps(order.body).encode()
        head = f"POST {order.path} HTTP/1.1\r\nhost: {order.addresses[node]}\r\nauthorization: Bearer {order.token}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        await stream.send_all(head.encode() + content)
        received = bytearray()
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += await _more(stream)
        lines = received[:end].decode("latin-1").lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        length = end + 4 + int(headers["content-length"])
        while len(received) < length:
            received += await _more(stream)
        return int(lines[0].split(" ")[1]), bytes(received[end + 4 :]), headers.get("connection") != "close"


async def _more(stream: trio.SocketStream) -> bytes | bytearray:
    data = await stream.receive_some(READ_BYTES)
    if not data:
        raise EOFError("the node closed the connection")
    return data


def main() -> None:
    hammering = _Hammer(Order(**json.loads(sys.stdin.readline())))
    trio.run(hammering.run)
    print(
        json.dumps(
            [[o.at, o.node, o.status, o.tokens, o.seconds] for o in sorted(hammering.outcomes, key=lambda o: o.at)]
        )
    )


if __name__ == "__main__":
    main()
