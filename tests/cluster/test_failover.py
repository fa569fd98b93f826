"""Answers that outlive the nodes that generate them: killed, stopped, drained, one after the other."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.mesh import Mesh, NodeProcess, wait_for

JSON = {"content-type": "application/json"}
GREEDY = {"temperature": 0}
SEEDED = {"temperature": 1.0, "seed": 7}


def body(**fields: Any) -> str:
    question = [{"role": "user", "content": "What happens to my answer when its node dies?"}]
    shape = {"model": "demo", "messages": question, "stream": True, "ignore_eos": True, "max_tokens": 400}
    return json.dumps(shape | {"stream_options": {"include_usage": True}} | fields)


class Answer:
    """One stream, read in a thread of its own."""

    def __init__(self, node: NodeProcess, **fields: Any) -> None:
        self.text = ""
        self.usage: dict[str, Any] | None = None
        self.error: str | None = None
        self.is_done = False
        self._thread = threading.Thread(target=self._read, args=(node, body(**fields)), daemon=True)
        self._thread.start()

    def _read(self, node: NodeProcess, content: str) -> None:
        connection = http.client.HTTPConnection(node.http, timeout=60)
        try:
            connection.request("POST", "/v1/chat/completions", content, JSON)
            response = connection.getresponse()
            if response.status != 200:
                self.error = response.read().decode()
            for line in response:
                if line.startswith(b"data: [DONE]"):
                    self.is_done = True
                elif line.startswith(b"data: "):
                    self._take(json.loads(line[6:]))
        except OSError as exc:
            self.error = repr(exc)
        finally:
            connection.close()

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = chunk["error"]["message"]
        for choice in chunk.get("choices", ()):
            self.text += choice["delta"].get("content", "")
        self.usage = chunk.get("usage") or self.usage

    def wait(self) -> Answer:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the stream did not end"
        return self


def executor(mesh: Mesh, besides: tuple[NodeProcess, ...] = ()) -> NodeProcess:
    """The node that generates something now."""
    found: list[NodeProcess] = []

    def look() -> bool:
        found[:] = [n for n in mesh.nodes if n not in besides and n.metric("ai_cluster_engine_slots", state="active")]
        return bool(found)

    wait_for(look, "some node generates", 20)
    return found[0]


@pytest.fixture
def entry_and_mesh(mesh: Mesh) -> tuple[NodeProcess, Mesh]:
    entry = mesh.add("--no-model", name="entry")
    for _ in range(3):
        mesh.add()
    mesh.wait_until_agreed()
    return entry, mesh


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_answers_outlive_two_kills_and_a_stop_token_exactly(
    entry_and_mesh: tuple[NodeProcess, Mesh], sampling: dict[str, Any]
) -> None:
    entry, mesh = entry_and_mesh
    right = Answer(entry, **sampling).wait()
    assert right.is_done

    def hurt(harm: Callable[[NodeProcess], None], besides: tuple[NodeProcess, ...]) -> NodeProcess:
        victim = executor(mesh, (entry, *besides))
        harm(victim)
        return victim

    answers = [Answer(entry, **sampling) for _ in range(24)]
    first = hurt(NodeProcess.kill, ())
    second = hurt(lambda node: os.kill(node.pid, signal.SIGSTOP), (first,))
    try:
        for answer in answers:
            answer.wait()
    finally:
        os.kill(second.pid, signal.SIGCONT)
    assert {answer.error for answer in answers} == {None}
    assert {answer.text for answer in answers} == {right.text}
    assert {counts(answer) for answer in answers} == {counts(right)}
    assert entry.metric("ai_cluster_failovers_total") >= 1


def counts(answer: Answer) -> tuple[int, int]:
    assert answer.usage is not None
    return answer.usage["prompt_tokens"], answer.usage["completion_tokens"]


def test_an_answer_that_nobody_can_go_on_with_ends_with_an_error(mesh: Mesh) -> None:
    entry, only = mesh.add("--no-model", name="entry"), mesh.add()
    mesh.wait_until_agreed()
    answers = [Answer(entry) for _ in range(12)]
    executor(mesh, (entry,))
    wait_for(lambda: any(answer.text for answer in answers), "an answer has begun", 20)
    only.kill()
    begun = [answer.wait() for answer in answers]
    assert all(answer.error is not None or answer.is_done for answer in begun)
    assert any("no other node could go on with it" in (answer.error or "") for answer in begun)


def test_what_a_killed_entry_had_opened_elsewhere_is_cancelled(mesh: Mesh) -> None:
    entry, server = mesh.add("--no-model", name="entry"), mesh.add()
    mesh.wait_until_agreed()
    for _ in range(40):
        Answer(entry)
    executor(mesh, (entry,))
    entry.kill()
    started = time.monotonic()
    wait_for(
        lambda: (
            server.metric("ai_cluster_engine_slots", state="active") == 0
            and server.metric("ai_cluster_engine_queue_depth") == 0
        ),
        "its slots are free",
        5,
    )
    assert time.monotonic() - started < 5
