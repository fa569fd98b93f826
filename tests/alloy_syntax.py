"""Reads Grafana Alloy's configuration syntax, as strictly as Alloy does, and no more of it than configurations use.

Blocks (`name "label" { … }`), attributes (`name = expression`, each on a line of its own), and expressions of literals,
arrays, objects, references, calls and `+`. Raises AlloySyntaxError with the line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"(?P<space>[ \t\r]+|//[^\n]*|/\*.*?\*/)|(?P<newline>\n)|(?P<string>\"(?:[^\"\\\n]|\\.)*\")"
    r"|(?P<number>\d+(?:\.\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<mark>[{}\[\](),.=+])",
    re.DOTALL,
)
_OPENING = {"[": "]", "{": "}", "(": ")"}


class AlloySyntaxError(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Reference:
    """Such as loki.write.default.receiver, or a function."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    function: str
    arguments: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Sum:
    parts: tuple[object, ...]


@dataclass(slots=True)
class Block:
    """attributes: strings, numbers and booleans as they are, lists, dicts, and the three above."""

    name: str
    label: str = ""
    attributes: dict[str, object] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)


def parse(text: str) -> Block:
    """The file as one block without a name."""
    parser = _Parser(text)
    root = Block("")
    parser.body(root, "")
    return root


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str, int]] = []
        position, line = 0, 1
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise AlloySyntaxError(f"line {line}: {text[position]!r}")
            kind = str(match.lastgroup)
            if kind != "space":
                self._tokens.append((kind, match[0], line))
            line += match[0].count("\n")
            position = match.end()
        self._tokens.append(("end", "", line))
        self._at = 0

    def body(self, block: Block, closing: str) -> None:
        while True:
            self._skip_newlines()
            if self._text() == closing and self._kind() in ("mark", "end"):
                return
            name = self._dotted_name()
            if self._text() == "=":
                if "." in name or name in block.attributes:
                    raise self._error(f"{name} is set twice or no name of an attribute")
                self._next()
                block.attributes[name] = self._expression()
            else:
                block.blocks.append(self._block(name))
            if self._kind() not in ("newline", "end") and self._text() != closing:
                raise self._error("a statement ends with its line")

    def _block(self, name: str) -> Block:
        label = json.loads(self._next()) if self._kind() == "string" else ""
        if label and not re.fullmatch(r"[A-Za-z_]\w*", label):
            raise self._error(f"label {label!r} is no identifier")
        block = Block(name, label)
        self._expect("{")
        self.body(block, "}")
        self._expect("}")
        return block

    def _expression(self) -> object:
        parts = [self._operand()]
        while self._text() == "+":
            self._next()
            self._skip_newlines()
            parts.append(self._operand())
        return parts[0] if len(parts) == 1 else Sum(tuple(parts))

    def _operand(self) -> object:
        kind, text = self._kind(), self._text()
        if kind == "string":
            return json.loads(self._next())
        if kind == "number":
            return float(self._next())
        if text == "[":
            return self._items(self._expression)
        if text == "{":
            return dict(self._items(self._member))
        if kind == "name":
            if text in ("true", "false", "null"):
                return {"true": True, "false": False, "null": None}[self._next()]
            name = self._dotted_name()
            return Call(name, tuple(self._items(self._expression))) if self._text() == "(" else Reference(name)
        raise self._error("an expression is wanted")

    def _items(self, read: object) -> list[object]:
        """In brackets, separated by commas; a list over several lines ends with one."""
        closing = _OPENING[self._next()]
        found: list[object] = []
        self._skip_newlines()
        while self._text() != closing:
            found.append(read())  # type: ignore[operator]
            if self._text() == ",":
                self._next()
                self._skip_newlines()
            elif self._text() != closing:
                raise self._error(f"a comma or {closing} on the same line is wanted")
        self._next()
        return found

    def _member(self) -> tuple[str, object]:
        name = json.loads(self._next()) if self._kind() == "string" else self._take("name")
        self._expect("=")
        return name, self._expression()

    def _dotted_name(self) -> str:
        parts = [self._take("name")]
        while self._text() == ".":
            self._next()
            parts.append(self._take("name"))
        return ".".join(parts)

    def _kind(self) -> str:
        return self._tokens[self._at][0]

    def _text(self) -> str:
        return self._tokens[self._at][1]

    def _next(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1][1]

    def _take(self, kind: str) -> str:
        if self._kind() != kind:
            raise self._error(f"a {kind} is wanted")
        return self._next()

    def _expect(self, text: str) -> None:
        if self._text() != text:
            raise self._error(f"{text} is wanted")
        self._next()

    def _skip_newlines(self) -> None:
        while self._kind() == "newline":
            self._next()

    def _error(self, problem: str) -> AlloySyntaxError:
        _, text, line = self._tokens[self._at]
        return AlloySyntaxError(f"line {line}: {problem}, not {text!r}")
