"""A small part of `python -m tests.cluster.key_kills`, and that it finds what it looks for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import key_kills
from tests.cluster.key_kills import Edit, Editor, Known


async def test_no_acknowledged_edit_is_lost_and_none_is_half_applied(tmp_path: Path) -> None:
    figures = await key_kills.run(tmp_path, key_kills.Options(edits=60, seed=11))
    assert figures["faults"] == []
    assert figures["kills"] >= 1
    assert sum(figures["unanswered"].values()) >= 1


def key(name: str, number: int, family: str = "f", concurrency: int | None = None) -> dict[str, Any]:
    limits = {"requests_per_minute": number, "tokens_per_minute": number, "concurrency": concurrency or number}
    return {"name": name, "family": family, **limits}


@pytest.mark.parametrize(
    ("doubtful", "listed", "laws"),
    [
        (None, {"a": key("c-1", 5)}, []),
        (None, {}, ["lost"]),
        (None, {"a": key("c-1", 4)}, ["lost"]),
        (None, {"a": key("c-1", 5), "r": key("c-0", 1)}, ["lost", "lost"]),
        (None, {"a": key("c-1", 5, concurrency=6)}, ["half_applied"]),
        (Edit("change", "a", 6), {"a": key("c-1", 6)}, []),
        (Edit("change", "a", 6), {"a": key("c-1", 7)}, ["lost"]),
        (Edit("create", number=6, name="c-2"), {"a": key("c-1", 5), "b": key("c-2", 6)}, []),
        (Edit("create", number=6, name="c-2"), {"a": key("c-1", 5), "b": key("c-2", 7)}, ["half_applied"]),
        (Edit("rotate", "a"), {"a": key("c-1", 5)}, []),
        (Edit("rotate", "a"), {"b": key("c-1", 5)}, []),
        (Edit("rotate", "a"), {"a": key("c-1", 5), "b": key("c-1", 5)}, ["half_applied"]),
        (Edit("rotate", "a"), {}, ["half_applied"]),
        (Edit("revoke", "a"), {}, []),
        (Edit("revoke", "a"), {"a": key("c-1", 5)}, []),
    ],
)
def test_what_is_lost_or_half_applied_is_found(
    doubtful: Edit | None, listed: dict[str, dict[str, Any]], laws: list[str]
) -> None:
    editor = Editor("c", random.Random(1), {"a": Known(5, "f")}, {"r": ""}, doubtful)
    assert sorted(law for law, _ in editor.compare(listed)) == sorted(laws)
