"""Calls of tools in what a model writes freely, told from content while the text comes. Sees no network and no clock.

    Hermes, Qwen   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, anywhere, any number of them
    Llama 3        <|python_tag|>{"name": ..., "parameters": {...}}, or the bare object as the answer's beginning;
                   several are parted by semicolons
    Mistral        [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]

Markers that are special tokens are not part of an answer's text, so the bare list is read as Mistral's too. Text that
could begin a marker is held back until that is decided; what turns out to be no call of a tool that was offered is
content as it stands. Blanks around calls belong to the form and are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from nodes.api.answer_pieces import CallArguments, CallStart, Content, Piece
from nodes.api.json_scanner import JsonScanner

# A call beyond this is taken for content, so that a bracket that is never closed holds nothing back for ever.
CALL_CHARS_MAX = 256 * 1024
# With which an object begins that could be a call. Any other object at an answer's beginning is passed on at once.
_FIRST_KEYS = ("name", "type", "id", "function", "parameters", "arguments")
_SEPARATORS = " \t\r\n;,"
# Markers of an answer that begin no call, after which no more are looked for: each costs another look at the rest.
GIVEN_UP_MAX = 16
# Of a value: in which its first key is found, or it is none.
CHARS_LOOKED_AT = 256


@dataclass(frozen=True, slots=True)
class _Form:
    """opening: the characters that its value may begin with. closing: a tag after the value, which may be missing.
    is_repeated: values follow one another without the marker."""

    marker: str
    opening: str
    closing: str = ""
    is_repeated: bool = False


HERMES = _Form("<tool_call>", "{", "</tool_call>")
LLAMA = _Form("<|python_tag|>", "{", is_repeated=True)
MISTRAL = _Form("[TOOL_CALLS]", "[{", is_repeated=True)
MARKED = (HERMES, LLAMA, MISTRAL)
BARE_OBJECT = _Form("", "{", is_repeated=True)
BARE_LIST = _Form("", "[")


class _Phase(Enum):
    TEXT = auto()
    OPENING = auto()  # after a marker, before the value
    VALUE = auto()
    CLOSING = auto()  # after a value, before its closing tag
    NEXT = auto()  # after a value, where another one may follow


class ToolCallReader:
    """names: of the tools that were offered. is_single: only the first call counts; further ones are dropped."""

    def __init__(self, names: Collection[str], *, is_single: bool = False) -> None:
        self._names = names
        self._is_single = is_single
        self._calls = 0
        self._given_up = 0
        self._phase = _Phase.TEXT
        self._form = HERMES
        self._buffer = ""  # not looked at yet
        self._held = ""  # of what may be a call: all since its marker's begin
        self._lead = 1  # of `held`: its marker and what is before, or the bracket that it begins with
        self._value_at = 0  # in `held`, where its value begins
        self._scanner = JsonScanner()
        self._is_beginning = True  # no content yet, and no call
        self._blanks = ""  # that are content if content follows
        self._drops_blanks = False  # after a call

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        while self._buffer and self._step(pieces):
            pass
        return _joined(pieces)

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        while True:
            while self._buffer and self._step(pieces):
                pass
            if self._phase not in (_Phase.OPENING, _Phase.VALUE):
                break
            self._give_up(pieces)
        is_form = self._phase is _Phase.CLOSING or not self._buffer.strip(_SEPARATORS)
        if self._phase is _Phase.TEXT or not is_form:
            self._content(self._buffer, pieces)
        if self._blanks and not self._calls:
            pieces.append(Content(self._blanks))
        return _joined(pieces)

    def _step(self, pieces: list[Piece]) -> bool:
        """Do what the buffer decides; False where more text is needed."""
        match self._phase:
            case _Phase.TEXT:
                return self._read_text(pieces)
            case _Phase.OPENING:
                return self._read_opening(pieces)
            case _Phase.VALUE:
                return self._read_value(pieces)
            case _Phase.CLOSING:
                return self._read_closing()
            case _Phase.NEXT:
                return self._read_next()

    def _read_text(self, pieces: list[Piece]) -> bool:
        text = self._buffer
        if self._given_up > GIVEN_UP_MAX:
            self._content(text, pieces)
            self._buffer = ""
            return False
        if self._is_beginning:
            start = text.lstrip()
            if not start:
                return False
            if not any(form.marker.startswith(start[: len(form.marker)]) for form in MARKED):
                for form in (BARE_OBJECT, BARE_LIST):
                    if start[0] in form.opening:
                        self._blanks += text[: len(text) - len(start)]
                        self._begin(form, "", start)
                        return True
        found = [(at, form) for form in MARKED if (at := text.find(form.marker)) >= 0]
        if found:
            at, form = min(found, key=lambda pair: pair[0])
            self._content(text[:at], pieces)
            self._begin(form, form.marker, text[at + len(form.marker) :])
            return True
        held = max(_overlap(text, form.marker) for form in MARKED)
        if held < len(text):
            self._content(text[: len(text) - held], pieces)
            self._buffer = text[len(text) - held :]
        return False

    def _begin(self, form: _Form, held: str, rest: str) -> None:
        self._form = form
        self._held = held
        self._lead = max(1, len(held))
        self._buffer = rest
        self._phase = _Phase.OPENING

    def _read_opening(self, pieces: list[Piece]) -> bool:
        start = self._buffer.lstrip()
        blanks = len(self._buffer) - len(start)
        self._held += self._buffer[:blanks]
        self._buffer = start
        if not start:
            return False
        if start[0] not in self._form.opening:
            self._give_up(pieces)
            return True
        self._value_at = len(self._held)
        self._scanner = JsonScanner()
        self._phase = _Phase.VALUE
        return True

    def _read_value(self, pieces: list[Piece]) -> bool:
        end = self._scanner.feed(self._buffer)
        taken = self._buffer if end is None else self._buffer[:end]
        self._held += taken
        self._buffer = self._buffer[len(taken) :]
        is_unlikely = not self._form.marker and not _may_be_call(self._held[self._value_at :][:CHARS_LOOKED_AT])
        if is_unlikely or len(self._held) - self._value_at > CALL_CHARS_MAX:
            self._give_up(pieces)
            return True
        if end is None:
            return False
        calls = _calls(self._held[self._value_at :], self._names)
        if calls is None:
            self._give_up(pieces)
            return True
        for name, arguments in calls:
            if not (self._is_single and self._calls):
                pieces += (CallStart(self._calls, name), CallArguments(self._calls, arguments))
                self._calls += 1
        self._held = self._blanks = ""
        self._is_beginning = False
        self._drops_blanks = True
        self._phase = _Phase.CLOSING if self._form.closing else _Phase.NEXT if self._form.is_repeated else _Phase.TEXT
        return True

    def _read_closing(self) -> bool:
        start, closing = self._buffer.lstrip(), self._form.closing
        if start.startswith(closing):
            self._buffer = start[len(closing) :]
        elif closing.startswith(start):
            return False
        self._phase = _Phase.TEXT
        return True

    def _read_next(self) -> bool:
        start = self._buffer.lstrip(_SEPARATORS)
        separators = self._buffer[: len(self._buffer) - len(start)]
        marker = self._form.marker
        if not start or (marker and start != marker and marker.startswith(start)):
            return False
        if marker and start.startswith(marker):
            self._begin(self._form, separators + marker, start[len(marker) :])
        elif start[0] in self._form.opening:
            self._begin(self._form, separators, start)
        else:
            self._phase = _Phase.TEXT
        return True

    def _give_up(self, pieces: list[Piece]) -> None:
        """It was no call: its marker is content, and what follows is looked at again, for there may be one in it."""
        held, self._held = self._held, ""
        self._phase = _Phase.TEXT
        self._is_beginning = False
        self._given_up += 1
        self._buffer = held[self._lead :] + self._buffer
        self._content(held[: self._lead], pieces)

    def _content(self, text: str, pieces: list[Piece]) -> None:
        """Blanks at its end wait for what follows."""
        text = self._blanks + text
        if self._drops_blanks:
            text = text.lstrip()
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        if kept:
            self._is_beginning = self._drops_blanks = False
            pieces.append(Content(kept))


def _may_be_call(value: str) -> bool:
    """False once the first key of the first object is none of a call's."""
    start = value.lstrip("[{ \t\r\n")
    if not start:
        return True
    if not start.startswith('"'):
        return False
    return any(f'{key}"'.startswith(start[1 : len(key) + 2]) for key in _FIRST_KEYS)


def _calls(text: str, names: Collection[str]) -> list[tuple[str, str]] | None:
    """(name, arguments as JSON) of each call in the value; None where it is anything else."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    calls = [_call(item, names) for item in (value if isinstance(value, list) else [value])]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _call(value: Any, names: Collection[str]) -> tuple[str, str] | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return None
    name = value.get("name", value.get("function"))
    if not isinstance(name, str) or name not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    try:
        return name, json.dumps(arguments, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of the marker."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Content that follows content is one piece."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, Content) and joined and isinstance(joined[-1], Content):
            joined[-1] = Content(joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined
