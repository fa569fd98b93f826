"""A client of chat completions for tests that watch streams closely: when each frame came, and how the stream ended.

HTTP/1.1 over sockets of its own, one request a connection, so that it reads only when it wants to: it may stop reading,
leave, or send a byte at a time. Frames are kept as they came and parsed afterwards, so that watching costs little.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import trio

HEAD_BYTES_MAX = 65_536
READ_BYTES = 65_536
# A frame of the built-in model has some hundred bytes; what grows beyond this is no answer of a node.
FRAME_BYTES_MAX = 1_048_576
SILENCE_S = 60.0
SEGMENT_BYTES = 536

# done: [DONE] came. error: an error frame. refused: another status than 200. cut: the connection ended before its time.
# left: this client went, as it was told. silent: nothing came for too long. unreachable: nobody took the connection.
Ending = Literal["done", "error", "refused", "cut", "left", "silent", "unreachable"]


@dataclass(frozen=True, slots=True)
class Manners:
    """How a client behaves; by default politely.

    leave_after: characters of text after which it closes the connection; frames are no measure, since one may hold many
    tokens. stop_after: frames after which it reads nothing for stop_s, all buffers on its way as small as a client can
    make them. byte_interval_s: between two bytes of the request.
    """

    leave_after: int | None = None
    stop_after: int | None = None
    stop_s: float = 0.0
    byte_interval_s: float = 0.0


POLITE = Manners()


@dataclass(slots=True)
class Frame:
    """One `data:` line of the stream. at: time.monotonic() of its arrival."""

    at: float
    data: bytes


@dataclass
class Answer:
    """What one request got. Times are of time.monotonic(); head_at is 0 where no status line came."""

    started_at: float
    head_at: float = 0.0
    ended_at: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""  # of an answer that is no stream
    frames: list[Frame] = field(default_factory=list)
    keep_alives: int = 0
    ending: Ending = "cut"
    fault: str = ""  # what the connection said where it ended before its time

    @cached_property
    def chunks(self) -> list[tuple[float, dict[str, Any]]]:
        """(arrival, object) of every frame but [DONE]. To be asked for once the answer is over."""
        return [(frame.at, json.loads(frame.data)) for frame in self.frames if frame.data != b"[DONE]"]

    @cached_property
    def choices(self) -> dict[int, Choice]:
        found: dict[int, Choice] = {}
        for at, chunk in self.chunks:
            for part in chunk.get("choices", ()):
                found.setdefault(part["index"], Choice()).take(at, part)
        return found

    @property
    def usage(self) -> dict[str, Any] | None:
        return next((chunk["usage"] for _, chunk in reversed(self.chunks) if chunk.get("usage")), None)

    @property
    def error(self) -> str | None:
        """The message of the error frame, or of the refusal, or what the connection said."""
        for _, chunk in self.chunks:
            if "error" in chunk:
                return str(chunk["error"]["message"])
        if self.ending == "refused":
            return f"{self.status}: {self.body.decode(errors='replace')}"
        return None if self.ending == "done" else f"{self.ending} {self.fault}".strip()

    @property
    def text_times(self) -> list[float]:
        """When text came, whichever choice's."""
        return sorted(at for choice in self.choices.values() for at in choice.times)

    @property
    def first_text_s(self) -> float | None:
        """Seconds from the start to the first text; None where none came."""
        times = self.text_times
        return times[0] - self.started_at if times else None

    @property
    def retry_after_s(self) -> float | None:
        value = self.headers.get("retry-after")
        return None if value is None else float(value)


@dataclass(slots=True)
class Choice:
    """One of the n answers. times: of the frames with text. logprobs: (token, logprob)."""

    text: str = ""
    finish_reason: str | None = None
    times: list[float] = field(default_factory=list)
    logprobs: list[tuple[str, float]] = field(default_factory=list)

    def take(self, at: float, part: dict[str, Any]) -> None:
        text = part["delta"].get("content")
        if text:
            self.text += text
            self.times.append(at)
        self.finish_reason = part.get("finish_reason") or self.finish_reason
        for row in (part.get("logprobs") or {}).get("content") or ():
            self.logprobs.append((row["token"], row["logprob"]))


async def ask(
    address: str,
    body: Mapping[str, Any],
    *,
    headers: Mapping[str, str] | None = None,
    manners: Manners = POLITE,
    silence_s: float = SILENCE_S,
    answer: Answer | None = None,
) -> Answer:
    """POST body to /v1/chat/completions at HOST:PORT and read the answer to its end. Raises nothing of the network.

    answer: filled while it comes, for those who look before the end; by default a new one.
    """
    answer = Answer(time.monotonic()) if answer is None else answer
    try:
        connection = await _connect(address, manners)
        async with connection:
            await _send(connection, _request(address, body, headers or {}), manners)
            await _Reader(connection, answer, manners, silence_s).read()
    except _Over as over:
        answer.ending, answer.fault = over.ending, over.fault
    except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
        answer.ending = "cut" if answer.head_at or not isinstance(exc, ConnectionError) else "unreachable"
        answer.fault = repr(exc.__cause__ or exc)
    answer.ended_at = time.monotonic()
    return answer


class _Over(Exception):
    def __init__(self, ending: Ending, fault: str = "") -> None:
        super().__init__(ending)
        self.ending: Ending = ending
        self.fault = fault


async def _connect(address: str, manners: Manners) -> trio.SocketStream:
    """Raises OSError."""
    host, port = address.rsplit(":", 1)
    connection = trio.socket.socket()
    try:
        if manners.stop_after is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the system makes it its smallest
            # The other end's send buffer begins as some segments, which are of 64 KiB on loopback.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
        await connection.connect((host, int(port)))
    except BaseException:
        connection.close()
        raise
    return trio.SocketStream(connection)


def _request(address: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(content)}\r\nconnection: close\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return head.encode() + b"\r\n" + content


async def _send(connection: trio.SocketStream, data: bytes, manners: Manners) -> None:
    if not manners.byte_interval_s:
        await connection.send_all(data)
        return
    for index in range(len(data)):
        await connection.send_all(data[index : index + 1])
        await trio.sleep(manners.byte_interval_s)


class _Reader:
    """Reads one response. Ends by _Over."""

    def __init__(self, connection: trio.SocketStream, answer: Answer, manners: Manners, silence_s: float) -> None:
        self._connection = connection
        self._answer = answer
        self._manners = manners
        self._silence_s = silence_s
        self._raw = bytearray()  # as it came
        self._lines = bytearray()  # of the event stream
        self._characters = 0

    async def read(self) -> None:
        answer = self._answer
        await self._read_head()
        is_chunked = answer.headers.get("transfer-encoding") == "chunked"
        if answer.status != 200 or not answer.headers.get("content-type", "").startswith("text/event-stream"):
            await self._read_body(is_chunked)
            raise _Over("done" if answer.status == 200 else "refused")
        while True:
            data = await self._next_chunk() if is_chunked else await self._more()
            if not data:
                raise _Over("cut", "the response ended without [DONE]")
            self._take(data)
            if self._manners.stop_after is not None and len(answer.frames) >= self._manners.stop_after:
                await trio.sleep(self._manners.stop_s)
                raise _Over("left")

    async def _read_head(self) -> None:
        while (end := self._raw.find(b"\r\n\r\n")) < 0:
            if len(self._raw) > HEAD_BYTES_MAX:
                raise _Over("cut", "the head of the response has no end")
            self._raw += await self._receive("before the head of the response")
        self._answer.head_at = time.monotonic()
        lines = self._raw[:end].decode("latin-1").split("\r\n")
        del self._raw[: end + 4]
        self._answer.status = int(lines[0].split(" ", 2)[1])
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self._answer.headers[name.strip().lower()] = value.strip()

    async def _read_body(self, is_chunked: bool) -> None:
        body = bytearray()
        length = int(self._answer.headers.get("content-length", FRAME_BYTES_MAX))
        while len(body) < length:
            data = await self._next_chunk() if is_chunked else await self._more()
            if not data:
                break
            body += data
        self._answer.body = bytes(body)

    async def _more(self) -> bytes:
        """What is at hand, else what comes next; nothing at the end of the connection."""
        if not self._raw:
            return await self._receive_or_end()
        data = bytes(self._raw)
        self._raw.clear()
        return data

    async def _next_chunk(self) -> bytes:
        """Of chunked transfer; nothing after the last."""
        while (end := self._raw.find(b"\r\n")) < 0:
            self._raw += await self._receive("between two chunks")
        size = int(self._raw[:end], 16)
        if size > FRAME_BYTES_MAX:
            raise _Over("cut", f"a chunk of {size} bytes")
        while len(self._raw) < end + 2 + size + 2:
            self._raw += await self._receive("within a chunk")
        data = bytes(self._raw[end + 2 : end + 2 + size])
        del self._raw[: end + 2 + size + 2]
        return data

    async def _receive(self, where: str) -> bytes:
        data = await self._receive_or_end()
        if not data:
            raise _Over("cut", f"the connection ended {where}")
        return data

    async def _receive_or_end(self) -> bytes:
        with trio.move_on_after(self._silence_s):
            return bytes(await self._connection.receive_some(READ_BYTES))
        raise _Over("silent", f"nothing came for {self._silence_s:g} s")

    def _take(self, data: bytes) -> None:
        """Keep the whole frames in it. Raises _Over at the last."""
        answer, now = self._answer, time.monotonic()
        self._lines += data
        while (end := self._lines.find(b"\n\n")) >= 0:
            line = bytes(self._lines[:end])
            del self._lines[: end + 2]
            if line.startswith(b":"):
                answer.keep_alives += 1
                continue
            frame = Frame(now, line.removeprefix(b"data: "))
            answer.frames.append(frame)
            if frame.data == b"[DONE]":
                raise _Over("done")
            if frame.data.startswith(b'{"error"'):
                raise _Over("error")
            if self._manners.leave_after is not None:
                self._characters += _characters(frame.data)
                if self._characters >= self._manners.leave_after:
                    raise _Over("left")
        if len(self._lines) > FRAME_BYTES_MAX:
            raise _Over("cut", "a frame without an end")


def _characters(data: bytes) -> int:
    return sum(len(part["delta"].get("content") or "") for part in json.loads(data).get("choices", ()))
