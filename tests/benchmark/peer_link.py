"""What a token costs on a peer link: CPU time of both ends together, over loopback, in one process.

    python -m tests.benchmark.peer_link

prints one JSON line. A step is one engine step: an event for every stream, then a wait until all have been read.
`batched`: one task sends for all streams and one reads for all, as an engine and a fan-out would. `tasks`: a task per
stream at either end, as requests run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from mesh.forwarder import Forwarder, IncomingStream
from mesh.seal import DEVELOPMENT_KEY, Keyring
from mesh.view import Address

STREAM_COUNTS = (1, 16, 64)
TOKENS = 32_000  # per measurement, a second or so
TOKENS_WARM_UP = 2_000
ROUND_TRIPS = 2_000
EVENT = [" token", [12345]]


class Bench:
    """Two forwarders on one loop, joined by loopback sockets."""

    def __init__(self) -> None:
        self.incoming: list[IncomingStream] = []
        self.finish = trio.Event()
        self.steps: list[trio.MemoryReceiveChannel[None]] = []
        keyring = Keyring([DEVELOPMENT_KEY])
        self.entry = Forwarder(node_id="entry", boot_id=b"e" * 16, keyring=keyring, serve=self.serve)
        self.executor = Forwarder(node_id="executor", boot_id=b"x" * 16, keyring=keyring, serve=self.serve)
        self.address = Address("127.0.0.1", 0)

    async def serve(self, stream: IncomingStream) -> None:
        if stream.request == b"reply":
            await stream.send(EVENT)
            return
        self.incoming.append(stream)
        if stream.request == b"task":
            sender, receiver = trio.open_memory_channel[None](1)
            self.steps.append(receiver)
            stream.step = sender  # type: ignore[attr-defined]
            async for _ in receiver:
                await stream.send(EVENT)
        else:
            await self.finish.wait()

    async def open(self, count: int, request: bytes) -> list[trio.abc.ReceiveChannel[object]]:
        self.incoming = []
        streams = [await self.entry.open("executor", self.address, request) for _ in range(count)]
        while len(self.incoming) < count:
            await trio.sleep(0.001)
        return list(streams)

    async def batched(self, count: int, tokens: int) -> None:
        streams = await self.open(count, b"batch")
        for _ in range(tokens // count):
            for incoming in self.incoming:
                incoming.send_nowait(EVENT)
            await streams[0].receive()
            for stream in streams[1:]:
                stream.receive_nowait()  # type: ignore[attr-defined]
        for stream in streams:
            await stream.aclose()

    async def tasks(self, count: int, tokens: int) -> None:
        streams = await self.open(count, b"task")
        read, all_read = 0, trio.Event()

        async def reader(stream: trio.abc.ReceiveChannel[object]) -> None:
            nonlocal read
            async for _ in stream:
                read += 1
                if read == count:
                    all_read.set()

        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(reader, stream)
            for _ in range(tokens // count):
                read, all_read = 0, trio.Event()
                for incoming in self.incoming:
                    incoming.step.send_nowait(None)  # type: ignore[attr-defined]
                await all_read.wait()
            nursery.cancel_scope.cancel()
        for stream in streams:
            await stream.aclose()

    async def round_trip(self) -> None:
        stream = await self.entry.open("executor", self.address, b"reply")
        async for _ in stream:
            pass
        await stream.aclose()


async def cpu_us(work: Callable[[], Awaitable[None]], count: int) -> float:
    """Process CPU microseconds per item of `count`."""
    started = time.process_time()
    await work()
    return round((time.process_time() - started) / count * 1e6, 2)


async def main() -> None:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        bench.address = Address("127.0.0.1", listeners[0].socket.getsockname()[1])
        await nursery.start(bench.executor.run, listeners)
        await nursery.start(bench.entry.run, [])
        result: dict[str, float] = {}
        for name, run in (("batched", bench.batched), ("tasks", bench.tasks)):
            for count in STREAM_COUNTS:
                await run(count, TOKENS_WARM_UP)
                result[f"{name}_{count}_streams_us_per_token"] = await cpu_us(partial(run, count, TOKENS), TOKENS)

        async def round_trips() -> None:
            for _ in range(ROUND_TRIPS):
                await bench.round_trip()

        await round_trips()
        started = time.perf_counter()
        result["round_trip_cpu_us"] = await cpu_us(round_trips, ROUND_TRIPS)
        result["round_trip_us"] = round((time.perf_counter() - started) / ROUND_TRIPS * 1e6, 2)
        print(json.dumps(result))
        bench.finish.set()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
