"""Which key the commands that ask a node send along."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from nodes import client
from nodes.access.api_key import PUBLIC_ID_CHARS, SECRET_CHARS, KeySettings, new_key
from nodes.cli import app

OWN = "sk-" + "a" * PUBLIC_ID_CHARS + "-" + "b" * SECRET_CHARS
FOREIGN = ["sk-" + "a" * 48, "sk-proj-" + "a" * 43, "sk-" + "a" * 12 + "-" + "a" * 44, OWN + "x", ""]


def test_the_form_of_a_key_is_the_one_that_keys_have() -> None:
    _, token = new_key(KeySettings("a"), 0.0)
    assert client.OWN_KEY.fullmatch(token)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The keys with which a node is asked."""
    keys: list[str | None] = []

    def get_json(node: object, path: str, api_key: str | None = None) -> dict[str, list[object]]:
        keys.append(api_key)
        return {"data": []}

    monkeypatch.setattr(client, "get_json", get_json)
    return keys


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, [], None),
        ({"OPENAI_API_KEY": OWN}, [], OWN),
        *(({"OPENAI_API_KEY": foreign}, [], None) for foreign in FOREIGN),
        ({"OPENAI_API_KEY": OWN, "AI_CLUSTER_API_KEY": "sk-other"}, [], "sk-other"),
        ({"OPENAI_API_KEY": OWN, "AI_CLUSTER_API_KEY": "sk-other"}, ["--api-key", "sk-given"], "sk-given"),
    ],
)
@pytest.mark.parametrize("command", [["models", "list"], ["chat", "hello"]])
def test_a_key_of_another_service_is_sent_to_no_node(
    sent: list[str | None], command: list[str], environment: dict[str, str], arguments: list[str], expected: str | None
) -> None:
    CliRunner().invoke(app, [*command, *arguments], env={"OPENAI_API_KEY": "", "AI_CLUSTER_API_KEY": "", **environment})
    assert sent == [expected]
