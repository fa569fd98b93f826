"""Several answers read together: fairly, without reading ahead, and ended with their reader."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing

from nodes.api.choices import Choices
from nodes.generation import GenerateEvent, GenerationFailed, Usage
from tests.unit.scripted_api import BODY, Api, ScriptedDispatch, ScriptedStream, Step


class CountedStream(ScriptedStream):
    """taken: events that were read."""

    taken = 0

    async def receive(self) -> GenerateEvent:
        event = await super().receive()
        self.taken += 1
        return event


def streams(*scripts: list[Step]) -> list[CountedStream]:
    return [CountedStream(script) for script in scripts]


def answer(count: int) -> list[Step]:
    return [*(GenerateEvent("x", (1,)) for _ in range(count - 1)), GenerateEvent("x", (1,), "stop", Usage(1, count))]


def choices_of(members: list[CountedStream]) -> Choices:
    return Choices(members)  # type: ignore[arg-type]


def ignore(tokens: int) -> None:
    pass


async def test_streams_that_always_have_more_take_turns() -> None:
    members = streams(answer(100), answer(100), answer(100))
    order = []
    async with choices_of(members) as choices:
        while not choices.has_ended:
            order.append((await choices.receive())[0])
    assert sorted(order) == sorted([0, 1, 2] * 100)
    for start in range(290):
        assert len({*order[start : start + 6]}) == 3, "no one gets ahead of the others"


async def test_nothing_is_read_that_nobody_takes() -> None:
    members = streams(answer(100), answer(100))
    async with choices_of(members) as choices:
        for _ in range(10):
            await choices.receive()
        await trio.testing.wait_all_tasks_blocked()
        assert sum(member.taken for member in members) <= 10 + 2


async def test_a_reader_that_leaves_ends_the_tasks_that_read() -> None:
    members = streams([*answer(5)[:-1], 1e6, *answer(1)], [1e6, *answer(1)])
    with trio.fail_after(5):
        async with choices_of(members) as choices:
            assert (await choices.receive())[0] == 0


async def test_what_was_read_while_waiting_for_the_first_is_not_lost(autojump_clock: trio.testing.MockClock) -> None:
    choices = choices_of(streams([5.0, *answer(3)], [0.5, *answer(1)], [0.5, *answer(2)]))
    await choices.wait_first(2.0)
    assert trio.current_time() == pytest.approx(0.5)
    told: list[int] = []
    answers = await choices.collect(told.append)
    assert sum(told) == 6
    assert [event.text for event in answers] == ["xxx", "x", "xx"]
    assert [event.usage for event in answers] == [Usage(1, 3), Usage(1, 1), Usage(1, 2)]


@pytest.mark.parametrize("n", [1, 2])
async def test_tokens_of_a_whole_answer_are_told_as_they_come(n: int, autojump_clock: trio.testing.MockClock) -> None:
    told: list[tuple[float, int]] = []
    started = trio.current_time()
    choices = choices_of(streams(*[[GenerateEvent("xy", (1, 2)), 5.0, *answer(1)]] * n))
    await choices.collect(lambda tokens: told.append((trio.current_time() - started, tokens)))
    assert told == [(pytest.approx(0.0), 2)] * n + [(pytest.approx(5.0), 1)] * n


async def test_no_first_event_ends_the_wait(autojump_clock: trio.testing.MockClock) -> None:
    for scripts in ([[5.0, *answer(1)]], [[5.0, *answer(1)], [6.0, *answer(1)]]):
        choices = choices_of(streams(*scripts))
        started = trio.current_time()
        await choices.wait_first(2.0)
        assert trio.current_time() - started == pytest.approx(2.0)
        assert [event.text for event in await choices.collect(ignore)] == ["x"] * len(scripts)


@pytest.mark.parametrize("others", [0, 1])
async def test_a_failure_is_raised_as_it_is(others: int) -> None:
    broken: list[Step] = [GenerationFailed("broke")]
    with pytest.raises(GenerationFailed):
        await choices_of(streams(broken, *[[60.0, *answer(1)]] * others)).wait_first(2.0)
    with pytest.raises(GenerationFailed):
        await choices_of(streams(broken, *[[60.0, *answer(1)]] * others)).collect(ignore)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_closes_every_stream(n: int) -> None:
    script: list[Step] = [GenerateEvent("x", (1,)), 1e6, *answer(1)]
    api = Api(ScriptedDispatch(*script))
    body = json.dumps(BODY | {"stream": True, "n": n}).encode()
    requests = [{"type": "http.request", "body": body, "more_body": False}]
    has_begun = trio.Event()

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await has_begun.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if b'"content":"x"' in message.get("body", b""):
            has_begun.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"test"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    with trio.fail_after(10):
        await api.app(scope, receive, send)  # type: ignore[arg-type]
    assert [stream.is_closed for stream in api.dispatch.streams] == [True] * n
    assert api.metrics.streams == [("demo", "cancelled")]
