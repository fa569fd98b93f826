"""Options that several commands of `ai-cluster` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_DATA_DIR = Path("data")

Url = Annotated[
    str, typer.Option("--url", envvar="AI_CLUSTER_URL", help="HTTP address of any node of the mesh", metavar="URL")
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        envvar="AI_CLUSTER_CA_FILE",
        help="PEM certificates to trust for https, such as a node's own [the system's]",
        metavar="FILE",
    ),
]
DataDir = Annotated[
    Path,
    typer.Option(
        "--data-dir", envvar="AI_CLUSTER_DATA_DIR", help="where the node at URL keeps its admin token", metavar="DIR"
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="AI_CLUSTER_API_KEY",
        help="sent as bearer [OPENAI_API_KEY, where it is a key of a mesh]",
        metavar="KEY",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="the node's answer as it is, one JSON object a line")]
