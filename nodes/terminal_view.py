"""The mesh in a terminal, as the status page shows it: figures, nodes, recent events. Prints nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

Json = Mapping[str, Any]

EVENTS_SHOWN = 8
_COLOURS = {"healthy": "green", "degraded": "yellow", "offline": "red"}
_BAR_CELLS = 8

_MOVE_REASONS = {
    "link": "its connection broke",
    "fault": "its engine failed",
    "hang": "it made no progress",
    "drain": "it is drained",
    "refused": "it had no room",
    "late": "its first token was late",
}


def mesh_view(status: Json, events: Sequence[Json], fault: str = "") -> RenderableType:
    """events: as /cluster/events has them, oldest first. fault: why the status is an old one."""
    parts: list[RenderableType] = [_figures(status), nodes_table(status)]
    if events:
        parts.append(events_table(events[-EVENTS_SHOWN:]))
    if fault:
        parts.append(Text(fault, style="red"))
    return Group(*parts)


def _figures(status: Json) -> Text:
    live = [member for member in status["members"] if member["status"] != "offline"]
    tokens = sum(member["tokens_per_s"] for member in live)
    waits = [wait for member in live if member["status"] == "healthy" for wait in _waits(member)]
    first = f"first token in about {seconds(min(waits))}" if waits else "no node is ready"
    active, slots, queued = (sum(_sum(m, field) for m in live) for field in ("active", "slots", "queued"))
    counts = ", ".join(f"{count} {name}" for name, count in status["nodes"].items() if count)
    return Text(f"{counts} | {tokens:.1f} tok/s | {first} | {active}/{slots} slots | {queued} queued")


def nodes_table(status: Json) -> Table:
    title = f"{escape(status['cluster_name'])} as {escape(status['node_id'])} (*) sees it"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("node", "status", "seen", "http", "models"):
        table.add_column(heading, overflow="fold")
    for heading in ("active", "queued", "free", "tok/s", "first token"):
        table.add_column(heading, justify="right")
    table.add_column("load", no_wrap=True)
    for member in status["members"]:
        table.add_row(*_row(member))
    if status["warnings"]:
        table.caption = "\n".join(f"warning: {escape(warning)}" for warning in status["warnings"])
    return table


def _row(member: Json) -> list[str]:
    is_offline = member["status"] == "offline"
    colour = _COLOURS.get(member["status"], "white")
    why = f" ({escape(member['reason'])})" if member.get("reason") else ""
    return [
        escape(member["node_id"]) + ("*" if member["is_self"] else ""),
        f"[{colour}]{member['status']}[/{colour}]{why}",
        "now" if member["is_self"] else f"{member['age_s']:.1f} s",
        escape(member["http"]),
        escape(", ".join(model["name"] for model in member["models"]) or "-"),
        *(["-"] * 6 if is_offline else _load(member)),  # its last load says nothing of now
    ]


def _load(member: Json) -> list[str]:
    waits = _waits(member)
    slots = _sum(member, "slots")
    active = _sum(member, "active")
    filled = round(_BAR_CELLS * active / slots) if slots else 0
    return [
        str(member["active_requests"]),
        str(_sum(member, "queued")),
        str(_sum(member, "free_slots")),
        f"{member['tokens_per_s']:.1f}",
        seconds(min(waits)) if waits else "-",
        "[cyan]" + "#" * filled + "[/cyan]" + "." * (_BAR_CELLS - filled) if slots else "-",
    ]


def events_table(events: Sequence[Json]) -> Table:
    """The newest at the bottom."""
    table = Table(title="recent events", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("time", no_wrap=True)
    table.add_column("event", overflow="fold")
    for event in events:
        times = f" ({event['count']} times)" if event["count"] > 1 else ""
        when = datetime.fromtimestamp(event["at"]).strftime("%H:%M:%S")
        table.add_row(when, escape(describe(event) + times))
    table.show_header = False
    return table


def describe(event: Json) -> str:
    """One event in words; the page has the same in nodes/web/format.js."""
    node, reason = event["node_id"], event["reason"]
    move = f"{event.get('origin', '')} to {node}: {_MOVE_REASONS.get(reason, reason)}"
    texts = {
        "joined": f"{node} joined",
        "left": f"{node} left",
        "suspect": f"{node} is suspected to be dead",
        "dead": f"{node} is dead",
        "back": f"{node} is back (was {reason})",
        "forgotten": f"{node} was forgotten",
        "readiness": f"{node} is {reason}",
        "degraded": f"{node} is degraded: {reason}",
        "healthy": f"{node} is healthy again (was: {reason})",
        "model": f"{node} serves the model {reason}",
        "failover": f"answers went on from {move}",
        "retry": f"requests went from {move}",
        "hedge": f"requests were asked a second time, from {move}",
    }
    return texts.get(event["kind"], f"{event['kind']}: {node} {reason}")  # of a later version's node


def seconds(value: float) -> str:
    return f"{max(1, round(value * 1000))} ms" if value < 1 else f"{value:.1f} s"


def _waits(member: Json) -> list[float]:
    return [model["first_token_s"] for model in member["models"] if model.get("first_token_s", 0) > 0]


def _sum(member: Json, field: str) -> int:
    return sum(model.get(field, 0) for model in member["models"])
