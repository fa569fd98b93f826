"""A small part of `python -m tests.cluster.chaos`: what clients see while nodes die, compared with what is right."""

from __future__ import annotations

from pathlib import Path

from tests.cluster import chaos


async def test_streams_of_entries_left_alone_are_exact_while_other_nodes_are_killed_and_stopped(tmp_path: Path) -> None:
    options = chaos.Options(streams=40, tokens=(250, 500), harms_max=3, seed=11)
    report = await chaos.run(tmp_path, options)
    assert report.violations == []
    assert report.figures["done"] == 40
    assert report.figures["entry_spared_exact"] == report.figures["entry_spared"] > 0
    assert report.figures["kills"] >= 1
