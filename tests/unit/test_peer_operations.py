"""Operations over real links in memory, and beside generations: told apart, answered, refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgpack
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from mesh.forwarder import Forwarder, IncomingStream, StreamRefused
from mesh.seal import DEVELOPMENT_KEY, Keyring
from mesh.view import Address, MemberStatus, MemberView, NodeLoad, NodeProfile
from nodes.generation import GenerateEvent, GenerateRequest, RequestInvalid
from nodes.generation_codec import decode_request, encode_request
from nodes.peer_operations import (
    MARK,
    Answer,
    Arguments,
    Handler,
    OperationFailed,
    ask_peer,
    decode_operation,
    encode_operation,
    is_operation,
)
from nodes.remote import PeerServer, RemoteGenerator
from tests.unit.fake_network import FakeNetwork

ADDRESS = Address("10.0.0.2", 7946)
PEER = MemberView("b", ADDRESS, MemberStatus.ALIVE, 1, 1, NodeLoad(), NodeProfile(), 0.0)
REQUEST = GenerateRequest("id", "demo", ({"role": "user", "content": "hi"},))


class NoGenerations:
    async def open(self, request: GenerateRequest) -> trio.abc.ReceiveChannel[GenerateEvent]:
        raise RequestInvalid(f"no generations of {request.model} here")


async def echo(arguments: Arguments) -> Answer:
    return {"heard": arguments["text"]}


async def refuse(arguments: Arguments) -> Answer:
    raise OperationFailed("not today; try tomorrow")


async def hang(arguments: Arguments) -> Answer:
    await trio.sleep_forever()
    raise AssertionError


HANDLERS: Mapping[str, Handler] = {"echo": echo, "refuse": refuse, "hang": hang}


@asynccontextmanager
async def peers(serve: object = None) -> AsyncIterator[Forwarder]:
    """The forwarder of `a`, linked to `b`, which serves."""
    network, ring = FakeNetwork(), Keyring([DEVELOPMENT_KEY])
    serve = serve or PeerServer(NoGenerations(), HANDLERS).serve
    a, b = (
        Forwarder(node_id=name, boot_id=name.encode() * 16, keyring=ring, serve=serve, connect=network.connect)  # type: ignore[arg-type]
        for name in ("a", "b")
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(a.run, [])
        await nursery.start(b.run, [network.listen(ADDRESS)])
        yield a
        nursery.cancel_scope.cancel()


async def test_an_operation_is_answered_beside_generations(autojump_clock: trio.testing.MockClock) -> None:
    async with peers() as forwarder:
        assert await ask_peer(forwarder, PEER, "echo", {"text": "hello", "of a later version": [1]}) == {
            "heard": "hello"
        }
        stream = await RemoteGenerator(forwarder, PEER).open(REQUEST)
        with pytest.raises(RequestInvalid, match="no generations of demo"):
            await stream.receive()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refuse", "not today; try tomorrow"),
        ("of a later version", "does not know the operation 'of a later version'"),
        ("x" * 65, "an operation has a name"),
    ],
    ids=["refused", "unknown", "nameless"],
)
async def test_why_an_operation_was_not_done_is_what_the_asker_reads(
    name: str, message: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with peers() as forwarder:
        with pytest.raises(OperationFailed, match=message):
            await ask_peer(forwarder, PEER, name, {})


async def test_an_asker_that_gives_up_ends_the_operation_at_the_peer(autojump_clock: trio.testing.MockClock) -> None:
    async with peers() as forwarder:
        with trio.move_on_after(1.0) as scope:
            await ask_peer(forwarder, PEER, "hang", {})
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert forwarder.statistics().streams == 0


@pytest.mark.parametrize("answer", ["text", {b"key": 2}, None])
async def test_an_answer_of_another_form_is_a_failure(answer: object, autojump_clock: trio.testing.MockClock) -> None:
    async def serve(stream: IncomingStream) -> None:
        await stream.send(answer)

    async with peers(serve) as forwarder:
        with pytest.raises(OperationFailed, match="in a form that this version cannot read"):
            await ask_peer(forwarder, PEER, "echo", {})


async def test_a_peer_that_is_gone_or_says_nothing_is_a_failure(autojump_clock: trio.testing.MockClock) -> None:
    async def silent(stream: IncomingStream) -> None:
        return

    async with peers(silent) as forwarder:
        with pytest.raises(OperationFailed, match="ended without an answer"):
            await ask_peer(forwarder, PEER, "echo", {})
        nobody = MemberView("c", Address("10.0.0.3", 1), MemberStatus.ALIVE, 1, 1, NodeLoad(), NodeProfile(), 0.0)
        with pytest.raises(OperationFailed, match="cannot be reached"):
            await ask_peer(forwarder, nobody, "echo", {})


async def test_a_version_without_operations_is_told_apart_from_a_refusal(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def serve(stream: IncomingStream) -> None:
        raise StreamRefused("invalid", "undecodable generation request from a peer")

    async with peers(serve) as forwarder:
        with pytest.raises(OperationFailed, match=r"did not understand 'echo' \(invalid\); is it of an older version"):
            await ask_peer(forwarder, PEER, "echo", {})


def test_no_generation_looks_like_an_operation_and_no_operation_like_a_generation() -> None:
    assert not is_operation(encode_request(REQUEST))
    with pytest.raises(RequestInvalid):
        decode_request(encode_operation("echo", {}))


@given(
    st.dictionaries(st.text(max_size=8), st.binary(max_size=40) | st.integers(0, 9) | st.text(max_size=9), max_size=4)
)
def test_what_is_encoded_is_decoded(arguments: dict[str, object]) -> None:
    assert decode_operation(encode_operation("name", arguments)) == ("name", arguments)


@given(st.binary(max_size=60) | st.recursive(st.none() | st.text(), st.lists, max_leaves=4).map(msgpack.packb))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(OperationFailed):
        decode_operation(MARK + data)
