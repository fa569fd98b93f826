"""deploy/compose as data: the services as they are once variables are filled in, and what the image gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "compose"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<text>[^}]*))?\}")


def compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """compose.yaml with its variables filled in. Raises KeyError with the message of one that has to be given."""

    def value(match: re.Match[str]) -> str:
        given = variables.get(match["name"], "")
        if not given and match["kind"] == "?":
            raise KeyError(match["text"])
        return given or match["text"] or ""

    filled: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(value, (FOLDER / "compose.yaml").read_text()))
    return filled


def node_services(filled: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: service for name, service in filled["services"].items() if service["image"] == "ai-cluster"}


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments) of each, lines joined."""
    text = re.sub(r"\\\n\s*", " ", (FOLDER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def image_environment() -> dict[str, str]:
    settings = " ".join(arguments for instruction, arguments in dockerfile() if instruction == "ENV")
    return dict(setting.split("=", 1) for setting in settings.split())


def image_command() -> list[str]:
    """What a container runs."""
    parts = dict(dockerfile())
    command: list[str] = json.loads(parts["ENTRYPOINT"]) + json.loads(parts["CMD"])
    return command


def health_command() -> list[str]:
    check = dict(dockerfile())["HEALTHCHECK"]
    command: list[str] = json.loads(check[check.index("CMD ") + 4 :])
    return command
