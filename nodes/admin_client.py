"""How the command line reaches /admin of a node: it finds the admin token, asks, and reads the lines of the answer."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nodes.client import TIMEOUT_S, open_answer, request_for
from nodes.config import ConfigInvalid, parse_address
from nodes.data_directory import ADMIN_TOKEN_FILE
from nodes.node_address import NodeAddress, NodeAnswered, NodeUnreachable

# Between two lines: longer than a member may take to leave.
LINE_TIMEOUT_S = 60.0
# Of `ai-cluster up`, each with a folder of its own below the data directory.
FOLDERS_MAX = 64
TOKEN_VARIABLE = "AI_CLUSTER_ADMIN_TOKEN"  # noqa: S105 (a variable's name)


def find_token(node: NodeAddress, data_dir: Path, environment: Mapping[str, str]) -> str:
    """The token of the node: of the environment, else of the folder in data_dir, or right below it, whose node
    has that HTTP port, else of data_dir. Raises ConfigInvalid."""
    if token := environment.get(TOKEN_VARIABLE):
        return token
    try:
        port = urlsplit(node.url).port
        below = sorted(path for path in data_dir.iterdir() if path.is_dir())[:FOLDERS_MAX] if data_dir.is_dir() else []
        fits = [folder for folder in (data_dir, *below) if port is not None and _http_port(folder) == port]
        return ((fits or [data_dir])[0] / ADMIN_TOKEN_FILE).read_text().strip()
    except (OSError, ValueError) as exc:  # a file that is no text is the latter
        raise ConfigInvalid(
            f"no admin token for {node} below {data_dir} ({exc}); give the data directory of that node with "
            f"--data-dir, as the user it runs as, or its token in {TOKEN_VARIABLE}"
        ) from exc


def token_for(node: NodeAddress, data_dir: Path, environment: Mapping[str, str]) -> str:
    """As find_token(), but where no node answers that is told first: the missing token follows from it.

    Raises NodeUnreachable, ConfigInvalid."""
    try:
        return find_token(node, data_dir, environment)
    except ConfigInvalid:
        try:
            open_answer(node, request_for(node, "/health/live", None), TIMEOUT_S).close()
        except NodeUnreachable:
            raise
        except NodeAnswered:
            pass  # somebody is there
        raise


def ask(node: NodeAddress, token: str, path: str, body: Mapping[str, object] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of the answer as they come, the summary last; a GET without a body.

    Raises NodeAnswered: refused, out of reach, or ended before its summary."""
    encoded = None if body is None else json.dumps(body).encode()
    with open_answer(node, request_for(node, path, token, encoded), LINE_TIMEOUT_S) as response:
        try:
            for text in response:
                line: dict[str, Any] = json.loads(text)
                yield line
                if "summary" in line:
                    return
        except (OSError, http.client.HTTPException) as exc:
            raise NodeAnswered(f"the connection to {node} broke: {exc}; the command can be repeated") from exc
        except (ValueError, TypeError) as exc:
            raise NodeAnswered(f"{node}{path} answered something that is no JSON; is it an AI Cluster node?") from exc
    raise NodeAnswered(f"{node} ended the answer before it was complete; the command can be repeated")


def _http_port(folder: Path) -> int | None:
    """Of the node that runs in the folder; None where none does."""
    try:
        return parse_address(json.loads((folder / "node.json").read_text())["http"]).port
    except (OSError, ValueError, KeyError, TypeError):
        return None
