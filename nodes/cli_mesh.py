"""The commands that ask and change the mesh through one of its nodes: members, join, drain, leave, forget,
keyring."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import quote

import typer

from mesh.seal import new_key, parse_key
from nodes.cli_options import DEFAULT_DATA_DIR, DEFAULT_URL, AsJson, CaFile, DataDir, Url
from nodes.config import ConfigInvalid, parse_mesh_address

EXIT_FAILED = 1  # some node did not do it; the line names it and the fix
EXIT_USAGE = 2
EVERYONE = "*"

Line = dict[str, Any]
Force = Annotated[bool, typer.Option("--force", help="also where it cuts members off from each other")]
Here = Annotated[bool, typer.Option("--here", help="change the node at URL alone, not the mesh")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="8 hex digits, as keyring list shows them")]
_EPILOG = (
    "Needs the admin token of the node at URL, which is in its data directory (--data-dir) or AI_CLUSTER_ADMIN_TOKEN. "
    "Exit code 0: done; 1: some node did not do it, and its line says why; 2: nothing was asked."
)  # fmt: skip

keyring_app = typer.Typer(
    help="Cluster keys, which authenticate nodes to each other, and their rotation without a restart.",
    epilog="A rotation, from any node: ai-cluster keyring new > new.key; chmod 600 new.key; ai-cluster keyring install "
    "new.key; ai-cluster keyring use NEW-ID; ai-cluster keyring remove OLD-ID; then put new.key into the place of the "
    "old key file. Each step may be repeated, and keyring list shows how far the nodes are.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(members)
    app.command(epilog=_EPILOG)(join)
    app.command(epilog=f"For maintenance: ai-cluster drain node-2; ... ; ai-cluster drain --undo node-2. {_EPILOG}")(
        drain
    )
    app.command(epilog=_EPILOG)(leave)
    app.command(epilog=_EPILOG)(forget)


def members(
    of: Annotated[
        str | None, typer.Option("--of", metavar="NODE", help="as this node sees them (default: the one asked)")
    ] = None,
    everyone: Annotated[
        bool, typer.Option("--everyone", help="what each node believes of each; ! marks what they disagree on")
    ] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Show what a node believes of every member, and how old that is."""
    from nodes.client import make_console
    from nodes.operator_tables import disputed_members, matrix_table, members_table

    if of is not None and everyone:
        refuse("--of and --everyone contradict each other; give one of them")
    asked = EVERYONE if everyone else of
    path = "/admin/members" + ("" if asked is None else f"?of={quote(asked, safe='')}")

    def show(answers: list[Line]) -> None:
        if everyone:
            make_console().print(matrix_table(answers))
            if disputed := disputed_members(answers):
                print(f"the nodes disagree on {', '.join(disputed)}; after a change they agree within seconds")
        for answer in () if everyone else answers:
            make_console().print(members_table(answer))

    raise typer.Exit(_show(url, ca_file, data_dir, path, as_json, show))


def join(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="mesh HOST:PORT of a node of the other mesh")],
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Let the node at URL join the mesh at ADDRESS, as serve --join does at a start."""
    try:
        parse_mesh_address(address)
    except ValueError as exc:
        refuse(f"{exc}; give the mesh address of a node of the other mesh")
    raise typer.Exit(_change(url, ca_file, data_dir, "/admin/join", {"address": address}))


def drain(
    node: Annotated[str | None, typer.Argument(metavar="[NODE]", help="which node (default: the one at URL)")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="take requests again")] = False,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Let a node generate nothing new, and finish its streams or hand them over. It stays a member and goes on running,
    as an entry: who asks it is answered by other nodes. members shows it as draining. Waits until nothing runs there,
    at most 45 s; warns of a model that no other node serves."""
    raise typer.Exit(_change(url, ca_file, data_dir, "/admin/drain", {"node_id": node, "undo": undo}))


def leave(
    node: Annotated[str | None, typer.Argument(metavar="[NODE]", help="which node (default: the one at URL)")] = None,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Let a node finish its streams, say farewell and end. A supervisor may start it again."""
    raise typer.Exit(_change(url, ca_file, data_dir, "/admin/leave", {"node_id": node}))


def forget(
    node: Annotated[str, typer.Argument(metavar="NODE", help="a member that is dead and will not come back")],
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Take a dead member off every node's list: it no longer counts as offline and is not called any more."""
    raise typer.Exit(_change(url, ca_file, data_dir, "/admin/forget", {"node_id": node}))


@keyring_app.command("new")
def keyring_new() -> None:
    """Print a new cluster key. Put it into a file of mode 0600 and give that to every node."""
    print(new_key())


@keyring_app.command("list", epilog=_EPILOG)
def keyring_list(
    as_json: AsJson = False, url: Url = DEFAULT_URL, ca_file: CaFile = None, data_dir: DataDir = DEFAULT_DATA_DIR
) -> None:
    """Show which keys each node holds and which one it seals with; ids, never the keys."""
    from nodes.client import make_console
    from nodes.operator_tables import keys_table

    raise typer.Exit(
        _show(
            url, ca_file, data_dir, "/admin/keyring", as_json, lambda answers: make_console().print(keys_table(answers))
        )
    )


@keyring_app.command("install", epilog=_EPILOG)
def keyring_install(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="a key of keyring new; -: from standard input")],
    here: Here = False,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Step 1 of a rotation: every node accepts the key. It travels under the present one."""
    try:
        key = sys.stdin.read() if file == "-" else Path(file).read_text()
        parse_key(key)
    except FileNotFoundError as exc:
        refuse(f"{file}: {exc.strerror}; make a key with: ai-cluster keyring new > {file}")
    except OSError as exc:
        refuse(f"{file}: {exc.strerror}; give a file of keyring new that you may read")
    except ValueError as exc:  # no text is one too
        refuse(f"{'standard input' if file == '-' else file}: {exc}")
    raise typer.Exit(_change(url, ca_file, data_dir, "/admin/keyring/install", {"key": key, "here": here}))


@keyring_app.command("use", epilog=_EPILOG)
def keyring_use(
    key_id: KeyId,
    force: Force = False,
    here: Here = False,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Step 2 of a rotation: every node seals with the key. Refused while a live member lacks it."""
    body = {"key_id": _key_id(key_id), "force": force, "here": here}
    raise typer.Exit(_change(url, ca_file, data_dir, "/admin/keyring/use", body))


@keyring_app.command("remove", epilog=_EPILOG)
def keyring_remove(
    key_id: KeyId,
    force: Force = False,
    here: Here = False,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Step 3 of a rotation: no node accepts the key any more. Refused while a live member seals with it."""
    body = {"key_id": _key_id(key_id), "force": force, "here": here}
    raise typer.Exit(_change(url, ca_file, data_dir, "/admin/keyring/remove", body))


def _key_id(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{8}", text):
        refuse(f"{text!r} is no key id; ai-cluster keyring list shows them, 8 hex digits each")
    return text.lower()


def refuse(message: str) -> NoReturn:
    """End the command before anything was asked."""
    print(f"ai-cluster: {message}", file=sys.stderr)
    raise typer.Exit(EXIT_USAGE)


def _show(
    url: str, ca_file: Path | None, data_dir: Path, path: str, as_json: bool, show: Callable[[list[Line]], None]
) -> int:
    """Ask, then show the answers of the nodes that gave one; the others are named on stderr."""
    answers: list[Line] = []

    def handle(line: Line) -> None:
        if as_json:
            print(json.dumps(line, ensure_ascii=False), flush=True)
        elif line.get("ok"):
            answers.append(line)
        else:
            _tell_fault(line)

    def end() -> None:
        if answers:
            show(answers)

    return _run(url, ca_file, data_dir, path, None, handle, end)


def _change(url: str, ca_file: Path | None, data_dir: Path, path: str, body: Mapping[str, object]) -> int:
    """Ask, and print a line for each node as it answers."""

    def handle(line: Line) -> None:
        if line.get("ok"):
            print(f"{line['node']}  ok{_details(line)}", flush=True)
        elif line.get("done"):
            if line["message"]:
                print(line["message"])
        else:
            _tell_fault(line)

    return _run(url, ca_file, data_dir, path, body, handle, lambda: None)


def _run(
    url: str,
    ca_file: Path | None,
    data_dir: Path,
    path: str,
    body: Mapping[str, object] | None,
    handle: Callable[[Line], None],
    end: Callable[[], None],
) -> int:
    from nodes.admin_client import ask, token_for
    from nodes.node_address import NodeAnswered, parse_url

    is_done = False
    try:
        node = parse_url(url, ca_file)
        for line in ask(node, token_for(node, data_dir, os.environ), path, body):
            is_done = bool(line.get("done"))
            handle(line)
        end()
    except ConfigInvalid as exc:
        print(f"ai-cluster: {exc}", file=sys.stderr)
        return EXIT_USAGE
    except NodeAnswered as exc:
        print(f"ai-cluster: {exc}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        return 130
    return 0 if is_done else EXIT_FAILED


def _tell_fault(line: Line) -> None:
    """A node that failed or was not asked, a warning, or the summary of a command that was not done."""
    if "warning" in line:
        print(f"{line['node']}  {line['warning']}", file=sys.stderr, flush=True)
    elif "skipped" in line:
        print(f"{line['node']}  {line['skipped']}", file=sys.stderr)
    elif "node" in line:
        print(f"{line['node']}  failed: {line['error']}", file=sys.stderr)
    elif not line["done"]:
        print(f"ai-cluster: {line['message']}", file=sys.stderr)


def _details(line: Line) -> str:
    return "".join(f"  {text}" for text in _detail_texts(line))


def _detail_texts(line: Line) -> Iterator[str]:
    if "primary" in line:
        others = [key for key in line["keys"] if key != line["primary"]]
        yield f"seals with {line['primary']}" + (f", accepts {', '.join(others)} too" if others else "")
    if "state" in line:
        yield line["state"]
    if "found" in line:
        yield f"joined {line['found']}; {line['members']} live members now"
