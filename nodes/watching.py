"""`ai-cluster status` and `top`: the mesh once, or followed until Ctrl-C. On a pipe each is plain text."""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.live import Live

from nodes.client import TIMEOUT_S, get_json, make_console, open_answer, request_for
from nodes.node_address import NodeAddress, NodeAnswered, parse_url
from nodes.terminal_view import mesh_view, nodes_table

EVENTS_KEPT = 100
AGAIN_S = 1.0
EVENTS_PATH = "/cluster/events?status=1"

Json = dict[str, Any]
Message = tuple[str, Json]  # "status" or "cluster", and its object


def show_status(url: str, ca_file: Path | None, *, watch: bool, as_json: bool) -> int:
    """Print the member table; 0 when all members are healthy, 1 when some are not or the node is out of reach."""
    if watch:
        return follow_mesh(url, ca_file, as_json=as_json, once=False)
    try:
        status = get_json(parse_url(url, ca_file), "/cluster/status")
    except NodeAnswered as exc:
        print(f"ai-cluster: {exc}", file=sys.stderr)
        return exc.exit_code
    if as_json:
        print(json.dumps(status, indent=2))
    else:
        make_console().print(nodes_table(status))
    return _exit_code(status)


def follow_mesh(url: str, ca_file: Path | None, *, as_json: bool, once: bool) -> int:
    """Show nodes and events until Ctrl-C; once: what is known now. as_json: an object a line. On a pipe, where nothing
    can be drawn over, a table each second."""
    try:
        node = parse_url(url, ca_file)
        with closing(_messages(node)) as messages:
            status, events = _first(messages)
            if once:
                _print(status, events, as_json=as_json)
                return _exit_code(status)
            if as_json:
                _print_lines(node, messages, status, events)
            else:
                _draw(node, messages, status, events)
    except NodeAnswered as exc:
        print(f"ai-cluster: {exc}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        return 0
    return 0


def _exit_code(status: Json) -> int:
    return 0 if status["nodes"]["degraded"] == status["nodes"]["offline"] == 0 else 1


def _print(status: Json, events: dict[str, Json], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"status": status, "events": list(events.values())}, indent=2))
    else:
        make_console().print(mesh_view(status, list(events.values())))


def _print_lines(node: NodeAddress, messages: Iterator[Message], status: Json, events: dict[str, Json]) -> None:
    for event in events.values():
        print(json.dumps({"event": event}))
    print(json.dumps({"status": status}), flush=True)
    for name, message in messages:
        print(json.dumps({"status" if name == "status" else "event": message}), flush=True)
    raise NodeAnswered(f"{node} ended the stream of events; it was stopped, or its connection broke")


def _draw(node: NodeAddress, messages: Iterator[Message], status: Json, events: dict[str, Json]) -> None:
    """Until Ctrl-C. The node may come back: the last picture stays, with the reason below it."""
    console = make_console()
    if not console.is_terminal:
        console.print(mesh_view(status, list(events.values())))
        for name, message in messages:
            if name == "status":
                console.print(nodes_table(message))
                sys.stdout.flush()
        raise NodeAnswered(f"{node} ended the stream of events; it was stopped, or its connection broke")
    with Live(mesh_view(status, list(events.values())), console=console, auto_refresh=False) as live:
        while True:
            fault = f"{node} does not answer; it is tried again"
            try:
                for name, message in messages:
                    if name == "status":
                        status = message
                    else:
                        _keep(events, message)
                    live.update(mesh_view(status, list(events.values())), refresh=True)
            except NodeAnswered as exc:
                fault = str(exc)
            live.update(mesh_view(status, list(events.values()), fault), refresh=True)
            time.sleep(AGAIN_S)
            messages = _messages(node)


def _first(messages: Iterator[Message]) -> tuple[Json, dict[str, Json]]:
    """The status, and the events that had been before: they come between the first two statuses."""
    events: dict[str, Json] = {}
    status: Json | None = None
    for name, message in messages:
        if name != "status":
            _keep(events, message)
        elif status is not None:
            return message, events
        else:
            status = message
    if status is None:
        raise NodeAnswered("the node ended the stream of events before it said anything")
    return status, events


def _keep(events: dict[str, Json], event: Json) -> None:
    events.pop(event["id"], None)  # an event that grew comes again
    events[event["id"]] = event
    if len(events) > EVENTS_KEPT:
        del events[next(iter(events))]


def _messages(node: NodeAddress) -> Generator[Message, None, None]:
    """Until the stream ends or breaks. Raises NodeAnswered at its beginning."""
    with open_answer(node, request_for(node, EVENTS_PATH, None), TIMEOUT_S) as response:
        name = ""
        try:
            for line in response:
                if line.startswith(b"event: "):
                    name = line[7:].strip().decode()
                elif line.startswith(b"data: ") and name in ("status", "cluster"):
                    yield name, json.loads(line[6:])
        except (OSError, http.client.HTTPException, ValueError):
            return
