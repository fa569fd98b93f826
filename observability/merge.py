"""The text expositions of many nodes as one, every sample labelled with the node it is of. Works line by line, because
parsing the text of a hundred nodes into samples and writing them out again would take seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from observability.families import PREFIX

CLUSTER_VIEW = PREFIX + "cluster_"
SCRAPE_UP = CLUSTER_VIEW + "scrape_up"
TEXT_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TYPE = re.compile(r"# TYPE ([a-zA-Z_:][a-zA-Z0-9_:]*) (counter|gauge|histogram|summary|untyped)")
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)")
# In a quoted value the quote would have a backslash before it, so this is the label's name and no part of a value.
_NODE_ID = re.compile(r'(?:^|,)node_id="')
# Labels under which a node's view of the cluster tells of others than itself.
_SUBJECT = re.compile(r'(?:^|,)(?:node_id|key_id)="')


class _Family:
    __slots__ = ("head", "lines")

    def __init__(self, head: list[str]) -> None:
        self.head = head
        self.lines: list[str] = []


def merge(asked_id: str, texts: Mapping[str, str], is_up: Mapping[str, bool]) -> str:
    """texts: by node id, in Prometheus's text format 0.0.4; of asked_id's view of the cluster all is taken, of others'
    what tells of themselves: the rest would be every node times every node. is_up: by node id, whether it answered.
    Lines that are no such format are left out."""
    families: dict[str, _Family] = {}
    for node_id in sorted(texts, key=lambda node_id: (node_id != asked_id, node_id)):
        _add(families, node_id, texts[node_id], is_asked=node_id == asked_id)
    rows = [f'{SCRAPE_UP}{{node_id="{_escaped(node_id)}"}} {float(up)}' for node_id, up in sorted(is_up.items())]
    parts = [line for family in families.values() if family.lines for line in (*family.head, *family.lines)]
    parts += [f"# HELP {SCRAPE_UP} 1 where a node gave its metrics, else 0.", f"# TYPE {SCRAPE_UP} gauge", *rows]
    return "\n".join(parts) + "\n"


def _add(families: dict[str, _Family], node_id: str, text: str, *, is_asked: bool) -> None:
    label = f'node_id="{_escaped(node_id)}"'
    family: _Family | None = None
    name = help_line = ""
    for line in text.split("\n"):
        if line.startswith("#"):
            if line.startswith("# HELP "):
                help_line = line
            elif (declared := _TYPE.fullmatch(line)) is not None:
                name = declared[1]
                has_help = help_line.startswith(f"# HELP {name} ")
                family = families.setdefault(name, _Family([help_line, line] if has_help else [line]))
            continue
        sample = _SAMPLE.fullmatch(line)
        if sample is None or family is None or not sample[1].startswith(name):
            continue
        labels = sample[2] or ""
        if not is_asked and name.startswith(CLUSTER_VIEW) and _SUBJECT.search(labels):
            continue
        if not _NODE_ID.search(labels):
            labels = f"{labels},{label}" if labels else label
        family.lines.append(f"{sample[1]}{{{labels}}} {sample[3]}")


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
