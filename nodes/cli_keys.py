"""The commands for API keys and for what they used: keys create, list, show, change, rotate, revoke; usage."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer

from nodes.access.api_key import PRIORITY_MAX, KeyMalformed, KeySettings
from nodes.cli_mesh import EXIT_USAGE, refuse
from nodes.cli_options import DEFAULT_DATA_DIR, DEFAULT_URL, AsJson, CaFile, DataDir, Url
from nodes.config import ConfigInvalid
from nodes.generation import PRIORITY_DEFAULT
from nodes.iso_time import parse_day, parse_time

_EPILOG = (
    "Needs the admin token of the node at URL, which is in its data directory (--data-dir) or AI_CLUSTER_ADMIN_TOKEN. "
    "Any node will do: a change holds at every node within two seconds, and at one that was away when it is back. "
    "Exit code 0: done; 1: refused, and the line says why; 2: nothing was asked."
)

_LIMITS_EPILOG = (
    "Limits per minute hold in any 60 seconds over all nodes together, however requests are spread: a node admits only "
    "its share of what is left until the others have heard. The most that 60 seconds can hold beyond a limit is one "
    "request for each node but one, and what nodes take of the same rest in the instant before they hear of each other "
    "(measured at ten times the limit over four nodes: below 1 %). In a network that is cut each side keeps its nodes' "
    f"share. docs/limits.md has the bound. {_EPILOG}"
)

GRACE_HOURS_MAX = 90 * 24  # nodes.api.keys.GRACE_S_MAX
# By the fields of KeySettings.
_OPTIONS = {
    "name": "--name",
    "requests_per_minute": "--requests-per-minute",
    "tokens_per_minute": "--tokens-per-minute",
    "concurrency": "--concurrency",
    "expires_at": "--expires",
    "models": "--models",
    "priority": "--priority",
}

keys_app = typer.Typer(
    help="API keys, which clients show as Authorization: Bearer sk-…, and their limits over all nodes together.",
    epilog="From the first key on, every node of the mesh demands one that works, also on loopback.",
    no_args_is_help=True,
)

Key = Annotated[str, typer.Argument(metavar="KEY", help="id (with or without sk-), or name")]
Name = Annotated[str, typer.Option("--name", help="what people call it")]
NewName = Annotated[str | None, typer.Option("--name", help="what people call it")]
Requests = Annotated[
    int | None,
    typer.Option("--requests-per-minute", metavar="N", help="in any 60 seconds, over all nodes (0: no limit)", min=0),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens-per-minute", metavar="N", help="of prompts and answers, over all nodes (0: no limit)", min=0
    ),
]
Concurrency = Annotated[
    int | None, typer.Option("--concurrency", metavar="N", help="requests at once, over all nodes (0: no limit)", min=0)
]
Expires = Annotated[
    str | None, typer.Option("--expires", metavar="DATE", help="2027-01-31 or 2027-01-31T12:00+01:00; never: no end")
]
Models = Annotated[str | None, typer.Option("--models", metavar="A,B", help="the models it may use (all: any)")]
Priority = Annotated[
    int | None,
    typer.Option(
        "--priority",
        metavar="N",
        min=1,
        max=PRIORITY_MAX,
        help=f"its share of a busy engine in proportion to others' [{PRIORITY_DEFAULT}]",
    ),
]
Enabled = Annotated[bool | None, typer.Option("--enable/--disable", help="whether it works at present")]


def register(app: typer.Typer) -> None:
    app.add_typer(keys_app, name="keys")
    app.command(epilog=_EPILOG)(usage)


@keys_app.command("create", epilog=_LIMITS_EPILOG)
def keys_create(
    name: Name,
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    concurrency: Concurrency = None,
    expires: Expires = None,
    models: Models = None,
    priority: Priority = None,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Make a key. It is printed once, alone on the last line of the output, and nobody can show it again."""
    body = {"name": name, **_settings(requests_per_minute, tokens_per_minute, concurrency, expires, models, priority)}
    settings = _checked(body)
    if settings.expires_at is not None and settings.expires_at <= time.time():
        refuse(f"--expires {expires}: this time has passed")
    raise typer.Exit(
        _edit(url, ca_file, data_dir, "POST", "/admin/keys", {k: v for k, v in body.items() if v is not None})
    )


@keys_app.command("list", epilog=_EPILOG)
def keys_list(
    as_json: AsJson = False, url: Url = DEFAULT_URL, ca_file: CaFile = None, data_dir: DataDir = DEFAULT_DATA_DIR
) -> None:
    """Show every key that is not revoked."""
    from nodes.client import make_console
    from nodes.operator_tables import api_keys_table

    def show(answer: dict[str, Any]) -> None:
        make_console().print(api_keys_table(answer))

    raise typer.Exit(_ask(url, ca_file, data_dir, "GET", "/admin/keys", None, _json if as_json else show))


@keys_app.command("show", epilog=_EPILOG)
def keys_show(key: Key, url: Url = DEFAULT_URL, ca_file: CaFile = None, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show one key as JSON, and what is left of its limits over all nodes."""
    raise typer.Exit(_ask(url, ca_file, data_dir, "GET", _path(key), None, _json))


@keys_app.command("change", epilog=_LIMITS_EPILOG)
def keys_change(
    key: Key,
    name: NewName = None,
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    concurrency: Concurrency = None,
    expires: Expires = None,
    models: Models = None,
    priority: Priority = None,
    enabled: Enabled = None,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Change what is given; the rest stays. The key itself stays the same."""
    body = _settings(requests_per_minute, tokens_per_minute, concurrency, expires, models, priority)
    if name is not None:
        body["name"] = name
    if enabled is not None:
        body["enabled"] = enabled
    if not body:
        refuse("nothing to change; ai-cluster keys change --help lists what can be")
    _checked(body)
    raise typer.Exit(_edit(url, ca_file, data_dir, "PATCH", _path(key), body))


@keys_app.command("rotate", epilog=_EPILOG)
def keys_rotate(
    key: Key,
    grace_hours: Annotated[
        float, typer.Option("--grace-hours", min=0, help="how long the old key goes on working beside the new one")
    ] = 0.0,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Make a new key for an old one: same name, limits and usage. It is printed as by create."""
    if grace_hours > GRACE_HOURS_MAX:
        refuse(f"--grace-hours {grace_hours:g}: at most {GRACE_HOURS_MAX} hours")
    body = {"grace_s": round(grace_hours * 3600)}
    raise typer.Exit(_edit(url, ca_file, data_dir, "POST", f"{_path(key)}/rotate", body))


@keys_app.command("revoke", epilog=_EPILOG)
def keys_revoke(
    key: Key,
    everyone: Annotated[
        bool, typer.Option("--all", help="every key of that name, or of that id's family: after a rotation, two")
    ] = False,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Make a key useless for ever, whichever node comes back with whatever data."""
    raise typer.Exit(_edit(url, ca_file, data_dir, "DELETE", _path(key) + ("?all=true" if everyone else ""), None))


def usage(
    key: Annotated[str | None, typer.Option("--key", metavar="KEY", help="id or name (default: all)")] = None,
    first: Annotated[str | None, typer.Option("--from", metavar="DAY", help="such as 2026-11-01 [30 days ago]")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="DAY", help="such as 2026-11-30 [today]")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Show what keys used, by day (UTC) and model, over all nodes."""
    from nodes.client import make_console
    from nodes.operator_tables import usage_table

    days = [_day(option, day) for option, day in (("--from", first), ("--to", last)) if day]
    if days != sorted(days):
        refuse(f"--from {first} is after --to {last}")
    query = urlencode({name: value for name, value in (("key", key), ("from", first), ("to", last)) if value})

    def show(answer: dict[str, Any]) -> None:
        make_console().print(usage_table(answer))

    path = f"/admin/usage?{query}" if query else "/admin/usage"
    raise typer.Exit(_ask(url, ca_file, data_dir, "GET", path, None, _json if as_json else show))


def _settings(
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    concurrency: int | None,
    expires: str | None,
    models: str | None,
    priority: int | None,
) -> dict[str, object]:
    """Those given. 0, `never` and `all` take a restriction away."""
    body: dict[str, object] = {}
    for field, limit in (
        ("requests_per_minute", requests_per_minute),
        ("tokens_per_minute", tokens_per_minute),
        ("concurrency", concurrency),
    ):
        if limit is not None:
            body[field] = limit or None
    if expires is not None:
        body["expires_at"] = None if expires == "never" else expires
    if models is not None:
        body["models"] = [] if models == "all" else [model.strip() for model in models.split(",") if model.strip()]
    if priority is not None:
        body["priority"] = priority
    return body


def _checked(body: Mapping[str, Any]) -> KeySettings:
    """What a node would make of it. Ends the command with the option's name where no key can have that."""
    fields = {"name": "-"} | dict(body)
    fields["models"] = tuple(body.get("models", ()))
    fields["is_enabled"] = fields.pop("enabled", True)
    try:
        if fields.get("expires_at") is not None:
            fields["expires_at"] = parse_time(body["expires_at"])
    except ValueError as exc:
        refuse(f"--expires {body['expires_at']}: {exc}, or never")
    settings = KeySettings(**fields)
    try:
        settings.check()
    except KeyMalformed as exc:
        field, _, reason = str(exc).partition(": ")
        refuse(f"{_OPTIONS[field]}: {reason}")
    return settings


def _day(option: str, text: str) -> int:
    """Days since 1970. Ends the command where it is none."""
    try:
        return parse_day(text)
    except ValueError as exc:
        refuse(f"{option} {text}: {exc}")


def _path(key: str) -> str:
    return f"/admin/keys/{quote(key, safe='')}"


def _json(answer: dict[str, Any]) -> None:
    print(json.dumps(answer, indent=2, ensure_ascii=False))


def _edit(
    url: str, ca_file: Path | None, data_dir: Path, method: str, path: str, body: Mapping[str, object] | None
) -> int:
    """What was done, who could not be told yet on stderr, and a new key alone on the last line."""

    def show(answer: dict[str, Any]) -> None:
        key = answer["key"]
        verb = {"DELETE": "revoked", "PATCH": "changed"}.get(method, "created")
        print(f"{verb} the key sk-{key['id']} ({key['name']})")
        # A node of an older version tells none of these three.
        for other in answer.get("also_revoked", ()):
            print(f"revoked the key sk-{other}")
        for other in answer.get("others", ()):
            until = f" until {other['expires_at']}" if other["expires_at"] else ""
            what = {"PATCH": "was not changed, and works", "DELETE": "still works"}.get(method, "works too")
            fix = f"; to end it: ai-cluster keys revoke sk-{other['id']}" if method != "PATCH" else ""
            print(f"sk-{other['id']} ({other['name']}) {what}{until}{fix}", file=sys.stderr)
        for model in answer.get("unserved_models", ()) if method != "DELETE" else ():
            print(f"no node serves {model!r} now, which this key may use; see: ai-cluster models list", file=sys.stderr)
        for node, reason in answer["untold"].items():
            print(f"{node}  was not told yet ({reason}); it learns it when it answers again", file=sys.stderr)
        if token := answer.get("token"):
            print("keep it now, it is not shown again:")
            print(token)

    return _ask(url, ca_file, data_dir, method, path, body, show)


def _ask(
    url: str,
    ca_file: Path | None,
    data_dir: Path,
    method: str,
    path: str,
    body: Mapping[str, object] | None,
    show: Callable[[dict[str, Any]], None],
) -> int:
    from nodes.admin_client import token_for
    from nodes.client import ask_json
    from nodes.node_address import NodeAnswered, parse_url

    try:
        encoded = None if body is None else json.dumps(body).encode()
        node = parse_url(url, ca_file)
        show(ask_json(node, method, path, token_for(node, data_dir, os.environ), encoded))
    except ConfigInvalid as exc:
        print(f"ai-cluster: {exc}", file=sys.stderr)
        return EXIT_USAGE
    except NodeAnswered as exc:
        print(f"ai-cluster: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0
