"""A small part of `python -m tests.cluster.malformed`; what memory does shows in a long run alone."""

from __future__ import annotations

from pathlib import Path

from tests.cluster import malformed


async def test_malformed_requests_are_refused_and_others_are_served(tmp_path: Path) -> None:
    figures = await malformed.run(tmp_path, malformed.Options(requests=1_500, seed=11))
    broken = {name: law for name, law in figures["laws"].items() if not law["holds"] and name != "memory"}
    assert broken == {}, figures
    assert figures["statuses"]["4xx"] > 500
    assert set(figures["kinds"]) == {"raw", "head", "headers", "path", "text", "tree", "frames", "known"}
