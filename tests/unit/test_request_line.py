"""The one log line that a request leaves: who asked, what served it, what it cost, and how it ended."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio

from nodes.api.outcome import PATH_NODES_MAX
from nodes.generation import GenerateEvent, GenerationFailed, Usage
from tests.unit.scripted_api import ANSWER, Api, ScriptedDispatch, ScriptedStream


class MovedDispatch(ScriptedDispatch):
    """Its streams tell of a way over these nodes."""

    def __init__(self, *script: Any, path: list[str], failovers: int, **fields: Any) -> None:
        super().__init__(*script, **fields)
        self._path, self._failovers = path, failovers

    async def open(self, request: Any) -> ScriptedStream:
        stream = await super().open(request)
        stream.path, stream.failovers = list(self._path), self._failovers
        return stream


@pytest.fixture
def access_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "nodes.api.access")
    return caplog


def line(log: pytest.LogCaptureFixture) -> dict[str, Any]:
    (record,) = [record for record in log.records if record.name == "nodes.api.access"]
    assert record.message == "request"
    return record.__dict__


async def test_a_request_says_which_way_it_went_and_when_its_first_token_came(
    access_log: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    await Api(MovedDispatch(0.25, *ANSWER, path=["a", "c", "b"], failovers=1)).chat(stream=True)
    told = line(access_log)
    assert told["model"] == "demo"
    assert told["path"] == "a,c,b"
    assert told["hops"] == 2  # the test's entry node is a
    assert told["failovers"] == 1
    assert told["time_to_first_token_ms"] == 250.0
    assert (told["prompt_tokens"], told["completion_tokens"]) == (5, 3)
    assert told["outcome"] == "success"


async def test_a_request_whose_answer_breaks_says_so_though_its_status_is_200(
    access_log: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    broken = MovedDispatch(GenerateEvent("a", (1,)), GenerationFailed("b failed"), path=["b", "c"], failovers=1)
    response = await Api(broken).chat(stream=True)
    told = line(access_log)
    assert response.status_code == told["http.response.status_code"] == 200
    assert told["outcome"] == "error"
    assert told["path"] == "b,c"
    assert told["error.message"] == "b failed"
    assert told["levelname"] == "ERROR"


async def test_a_request_that_never_had_a_token_tells_no_time_to_it(access_log: pytest.LogCaptureFixture) -> None:
    await Api(MovedDispatch(GenerationFailed("b failed"), path=["b"], failovers=0)).chat()
    told = line(access_log)
    assert "time_to_first_token_ms" not in told
    assert told["outcome"] == "error"


async def test_a_request_that_is_refused_has_an_outcome_and_no_way(access_log: pytest.LogCaptureFixture) -> None:
    await Api(ScriptedDispatch(*ANSWER)).chat(messages="no list")
    told = line(access_log)
    assert told["outcome"] == "rejected"
    assert told["levelname"] == "INFO"
    assert "path" not in told


async def test_several_answers_name_each_node_once_and_add_up_their_moves(access_log: pytest.LogCaptureFixture) -> None:
    await Api(MovedDispatch(*ANSWER, path=["b", "c"], failovers=1)).chat(n=3)
    told = line(access_log)
    assert (told["path"], told["hops"], told["failovers"]) == ("b,c", 6, 3)


async def test_a_way_over_very_many_nodes_is_cut(access_log: pytest.LogCaptureFixture) -> None:
    path = [f"node-{index}" for index in range(PATH_NODES_MAX + 3)]
    await Api(MovedDispatch(*ANSWER, path=path, failovers=len(path) - 1)).chat()
    told = line(access_log)
    assert told["path"] == ",".join(path[:PATH_NODES_MAX]) + ",+3"
    assert told["failovers"] == PATH_NODES_MAX + 2


async def test_the_longest_wait_for_a_slot_is_told(access_log: pytest.LogCaptureFixture) -> None:
    ends = [[GenerateEvent("a", (1,), "stop", Usage(5, 1, 0, queued_s))] for queued_s in (0.25, 1.5, None)]
    await Api(ScriptedDispatch(scripts=ends)).chat(n=3)
    assert line(access_log)["queue_ms"] == 1500.0


async def test_a_wait_that_no_node_tells_is_not_told(access_log: pytest.LogCaptureFixture) -> None:
    await Api(ScriptedDispatch(*ANSWER)).chat()
    assert "queue_ms" not in line(access_log)
