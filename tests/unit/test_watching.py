"""`ai-cluster status` and `top` against a scripted node."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from nodes import cli
from nodes.event_feed import EventFeed
from nodes.events import Happening
from nodes.terminal_view import describe, mesh_view
from tests.unit.scripted_api import view

MODEL = {"name": "demo", "slots": 8, "active": 2, "queued": 1, "free_slots": 6, "first_token_s": 0.025}


def member(node_id: str, status: str = "healthy", **fields: Any) -> dict[str, Any]:
    shape = {
        "node_id": node_id,
        "status": status,
        "reason": "",
        "is_self": node_id == "a",
        "http": "127.0.0.1:8080",
        "age_s": 0.5,
        "active_requests": 2,
        "tokens_per_s": 120.0,
        "models": [MODEL],
    }
    return shape | fields


def status_of(*members: dict[str, Any]) -> dict[str, Any]:
    counts = {name: sum(m["status"] == name for m in members) for name in ("healthy", "degraded", "offline")}
    return {"cluster_name": "test", "node_id": "a", "nodes": counts, "warnings": [], "members": list(members)}


HEALTHY = status_of(member("a"), member("b"))
HURT = status_of(member("a"), member("b", "offline", reason="dead", age_s=12.0))
MOVED = {"id": "x-1", "at": 1e9, "kind": "failover", "node_id": "a", "origin": "b", "reason": "link", "count": 3}
DIED = {"id": "x-2", "at": 1e9, "kind": "dead", "node_id": "b", "reason": "", "count": 1}


class Node:
    """Answers /cluster/status and one stream of /cluster/events, which then ends."""

    def __init__(self, *messages: tuple[str, dict[str, Any]]) -> None:
        stream = b"retry: 2000\n\n: keep-alive\n\n" + b"".join(
            f"event: {name}\nid: 1\ndata: {json.dumps(data)}\n\n".encode() for name, data in messages
        )

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(stream if "events" in self.path else json.dumps(messages[0][1]).encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def hurt() -> Iterator[Node]:
    node = Node(("status", HEALTHY), ("cluster", DIED), ("cluster", MOVED), ("status", HURT))
    yield node
    node.close()


def run(node: Node, *command: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, [*command, "--url", node.url])
    return result.exit_code, result.stdout, result.stderr


def test_top_once_prints_figures_nodes_and_what_happened(hurt: Node) -> None:
    code, out, _ = run(hurt, "top", "--once")
    assert code == 1  # a node is offline
    assert "1 healthy, 1 offline | 120.0 tok/s | first token in about 25 ms | 2/8 slots | 1 queued" in out
    assert "offline (dead)" in out
    assert "##......" in out
    assert out.index("b is dead") < out.index("answers went on from b to a: its connection broke (3 times)")
    assert "\x1b" not in out


def test_top_once_as_json_is_one_object(hurt: Node) -> None:
    code, out, _ = run(hurt, "top", "--once", "--json")
    assert (code, json.loads(out)) == (1, {"status": HURT, "events": [DIED, MOVED]})


def test_top_on_a_pipe_goes_on_line_by_line_until_its_node_ends(hurt: Node) -> None:
    code, out, err = run(hurt, "top", "--json")
    assert code == 1
    assert [next(iter(json.loads(line))) for line in out.splitlines()] == ["event", "event", "status"]
    assert "ended the stream" in err
    code, out, err = run(hurt, "status", "--watch")
    assert (code, out.count("sees it")) == (1, 1)
    assert "ended the stream" in err


def test_status_is_a_table_or_the_nodes_own_answer(hurt: Node) -> None:
    code, out, _ = run(hurt, "status")
    assert code == 0
    assert "test as a (*) sees it" in out
    assert json.loads(run(hurt, "status", "--json")[1]) == HEALTHY


def test_a_node_that_is_not_there_is_one_line_with_the_fix() -> None:
    result = CliRunner().invoke(cli.app, ["top", "--url", "http://127.0.0.1:1"])
    assert result.exit_code == 1
    assert "no node answers at http://127.0.0.1:1" in result.stderr


def test_names_are_text_and_never_markup() -> None:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(mesh_view(status_of(member("[red]a", http="[bold]")), [MOVED | {"node_id": "[/red]"}]))
    assert "[red]a" in captured.get()
    assert "[/red]" in captured.get()


def test_every_kind_of_event_has_words_here_and_on_the_page() -> None:
    from typing import get_args

    from nodes.api.web import FOLDER
    from nodes.events import Kind

    page = (FOLDER / "format.js").read_text()
    feed = EventFeed(view, wall_clock=lambda: 0.0)
    for kind in get_args(Kind):
        feed.add(Happening(kind, "b", "why", "a"))
        text = describe({"kind": kind, "node_id": "b", "reason": "why", "origin": "a"})
        assert not text.startswith(f"{kind}:")
        assert f'case "{kind}"' in page
