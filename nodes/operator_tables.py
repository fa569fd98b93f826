"""Tables of what nodes answer an operator: their members, what all believe of all, their keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

Answer = dict[str, Any]

# Observers beside each other; with more, a line that names those who disagree says more than a wide table.
MATRIX_OBSERVERS_MAX = 12
_COLOURS = {"alive": "green", "suspect": "yellow", "dead": "red", "left": "dim"}
UNKNOWN = "unknown"
GONE = ("dead", "left")


def members_table(answer: Answer) -> Table:
    """What one node believes. answer: its line of /admin/members."""
    table = _table(f"what {answer['node']} believes of each member (*: itself)")
    for heading in ("member", "membership", "readiness", "last sign of life", "address", "version", "generation"):
        table.add_column(heading, overflow="fold")
    table.add_column("models", overflow="fold")
    for member in answer["members"]:
        table.add_row(
            member["node_id"] + ("*" if member["is_self"] else ""),
            _membership(member["membership"]),
            "-" if member["membership"] in GONE else member["readiness"],  # the last word of a life that is over
            "now" if member["is_self"] else f"{member['age_s']:.1f} s ago",
            member["mesh"],
            member["version"] or "-",
            f"{member['generation']}.{member['state_version']}",
            ", ".join(member["models"]) or "-",
        )
    if answer.get("untold"):
        table.caption = f"and {answer['untold']} more, which are not shown"
    return table


def matrix_table(answers: Sequence[Answer]) -> Table:
    """What each node believes of each member and how old that is; members that they disagree on are marked with !."""
    beliefs = {answer["node"]: {m["node_id"]: m for m in answer["members"]} for answer in answers}
    observers = sorted(beliefs)
    is_wide = len(observers) <= MATRIX_OBSERVERS_MAX
    table = _table("what each node believes")
    table.add_column("member", overflow="fold")
    for heading in observers if is_wide else ("believed by",):
        table.add_column(heading, overflow="fold")
    for node_id in sorted({node_id for known in beliefs.values() for node_id in known}):
        seen = {observer: beliefs[observer].get(node_id) for observer in observers}
        words = {
            observer: UNKNOWN if member is None else str(member["membership"]) for observer, member in seen.items()
        }
        is_disputed = len(set(words.values())) > 1
        cells = [_cell(member) for member in seen.values()] if is_wide else [_summary(words)]
        table.add_row(f"[bold red]! {node_id}[/]" if is_disputed else node_id, *cells)
    return table


def disputed_members(answers: Sequence[Answer]) -> list[str]:
    """Members that the nodes believe different things of."""
    known: dict[str, list[str]] = {}
    for answer in answers:
        for member in answer["members"]:
            known.setdefault(member["node_id"], []).append(member["membership"])
    return sorted(i for i, words in known.items() if len(set(words)) > 1 or len(words) < len(answers))


def keys_table(answers: Sequence[Answer]) -> Table:
    """Which key is where. answers: the lines of /admin/keyring."""
    table = _table("the keys that the nodes hold")
    for heading in ("key", "installed on", "used by"):
        table.add_column(heading, overflow="fold")
    for key in sorted({key for answer in answers for key in answer["keys"]}):
        installed = [answer["node"] for answer in answers if key in answer["keys"]]
        used = [answer["node"] for answer in answers if answer["primary"] == key]
        table.add_row(key, _who(installed, answers), _who(used, answers))
    return table


def api_keys_table(answer: Answer) -> Table:
    """answer: that of /admin/keys."""
    table = _table(f"{len(answer['keys'])} API keys, and {answer['revoked']} that were revoked")
    for heading in ("id", "name", "state", "models"):
        table.add_column(heading, overflow="fold")
    for heading in ("requests/min", "tokens/min", "at once", "priority", "created", "expires"):
        table.add_column(heading, justify="right")
    for key in answer["keys"]:
        limits = (_limit(key, kind) for kind in ("requests", "tokens"))
        table.add_row(
            f"sk-{key['id']}",
            key["name"],
            _state(key),
            ", ".join(key["models"]) or "all",
            *limits,
            str(key["concurrency"] or "-"),
            str(key["priority"]),
            key["created_at"][:10],
            (key["expires_at"] or "never")[:16],
        )
    return table


def _state(key: Answer) -> str:
    if key["expires_at"] is not None and datetime.fromisoformat(key["expires_at"]) <= datetime.now(UTC):
        return "[red]expired[/]"
    return "enabled" if key["enabled"] else "[yellow]disabled[/]"


def _limit(key: Answer, kind: str) -> str:
    left = key["remaining"].get(kind)
    return "-" if left is None else f"{left['remaining']} of {left['limit']} left"


def usage_table(answer: Answer) -> Table:
    """answer: that of /admin/usage."""
    table = _table("usage over all nodes, days in UTC")
    for heading in ("day", "key", "name", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("requests", "prompt tokens", "completion tokens"):
        table.add_column(heading, justify="right")
    for row in answer["usage"]:
        name = row["name"] or "(revoked)"
        counts = (f"{row[count]:,}" for count in ("requests", "prompt_tokens", "completion_tokens"))
        table.add_row(row["day"], row["key"], name, row["model"], *counts)
    total = answer["total"]
    counts = (f"{total[count]:,}" for count in ("requests", "prompt_tokens", "completion_tokens"))
    table.add_row("total", "", "", "", *counts)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _membership(word: str) -> str:
    return f"[{_COLOURS.get(word, 'white')}]{word}[/]"


def _cell(member: Answer | None) -> str:
    if member is None:
        return f"[red]{UNKNOWN}[/]"
    age = "itself" if member["is_self"] else f"{member['age_s']:.1f} s"
    return f"{_membership(member['membership'])} {age}"


def _summary(words: dict[str, str]) -> str:
    """The most frequent belief as a count, each other one with who holds it."""
    by_word: dict[str, list[str]] = {}
    for observer, word in words.items():
        by_word.setdefault(word, []).append(observer)
    (most, holders), *others = sorted(by_word.items(), key=lambda item: -len(item[1]))
    return "; ".join([f"{most}: {len(holders)} nodes", *(f"{word}: {', '.join(who)}" for word, who in others)])


def _who(nodes: Sequence[str], answers: Sequence[Answer]) -> str:
    if len(nodes) == len(answers):
        return f"all {len(nodes)}"
    return ", ".join(sorted(nodes)) or "nobody"
