"""A network of memory streams for tests of what runs over TCP: it can hang, die and lose nothing else."""

from __future__ import annotations

import trio
import trio.testing

from mesh.view import Address

ACCEPT_BACKLOG = 256


class FakeStream(trio.abc.Stream):
    """One end of a connection, with the faults that a test can give it."""

    def __init__(
        self, inner: trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]
    ) -> None:
        self._inner = inner
        self._is_stuck = False
        self._is_deaf = False
        self._is_running = trio.Event()
        self._is_running.set()

    def stop(self) -> None:
        """As hang(), until go_on(): what was sent to this end waits."""
        self._is_running = trio.Event()

    def go_on(self) -> None:
        self._is_running.set()

    def hang(self) -> None:
        """The process at this end stops: nothing is sent or read any more, and the other end is not told."""
        self._is_deaf = True

    def die(self) -> None:
        """The process at this end is killed: the other end reads the end of the stream."""
        self._is_deaf = True
        self._inner.send_stream.close()

    def block(self) -> None:
        """The other end takes no more bytes: every write waits for ever."""
        self._is_stuck = True

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_stuck:
            await trio.sleep_forever()
        if self._is_deaf:
            await trio.lowlevel.checkpoint()
            return
        await self._is_running.wait()
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = await self._inner.receive_some(max_bytes)
        await self._is_running.wait()
        if self._is_deaf:
            await trio.sleep_forever()
        return bytes(data)

    async def aclose(self) -> None:
        await self._inner.aclose()


class FakeListener(trio.abc.Listener[FakeStream]):
    def __init__(self, accepted: trio.MemoryReceiveChannel[FakeStream]) -> None:
        self._accepted = accepted

    async def accept(self) -> FakeStream:
        return await self._accepted.receive()

    async def aclose(self) -> None:
        await self._accepted.aclose()


class FakeNetwork:
    """Connects addresses that listen. dials counts every attempt; ends holds both ends of every connection made."""

    def __init__(self) -> None:
        self.dials = 0
        self.ends: list[tuple[FakeStream, FakeStream]] = []
        self.black_holes: set[Address] = set()
        self._listeners: dict[Address, trio.MemorySendChannel[FakeStream]] = {}

    def listen(self, address: Address) -> FakeListener:
        sender, receiver = trio.open_memory_channel[FakeStream](ACCEPT_BACKLOG)
        self._listeners[address] = sender
        return FakeListener(receiver)

    def stop_listening(self, address: Address) -> None:
        del self._listeners[address]

    async def connect(self, address: Address) -> FakeStream:
        """Raises ConnectionRefusedError where nobody listens; never returns for a black hole."""
        self.dials += 1
        await trio.lowlevel.checkpoint()
        if address in self.black_holes:
            await trio.sleep_forever()
        if address not in self._listeners:
            raise ConnectionRefusedError(111, "Connection refused")
        near, far = (FakeStream(inner) for inner in trio.testing.memory_stream_pair())
        self.ends.append((near, far))
        self._listeners[address].send_nowait(far)
        return near
