"""What one rendering of a foreign template may use: steps, and bytes of everything it makes.

Bytes are counted when something is made and not given back when it is dropped, so the count bounds time as well. What
could be large is measured before it is made: by require(), with an upper bound.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

import jinja2
from jinja2.runtime import Context
from jinja2.utils import Namespace

Value = TypeVar("Value")

# Turns of loops and calls, of macros too, in one rendering; about a second. A conversation of 1,000 messages takes some
# 10,000 in the templates that models come with.
STEPS_MAX = 1_000_000
# Text and lists that a template makes, results in between included: of 60 templates that models come with, all but one
# make 1 to 10 times what they are given. That one appends to its text message by message, and takes some 250 messages.
MADE_BYTES_BASE = 4 * 1024 * 1024
MADE_PER_GIVEN_BYTE = 32
MADE_BYTES_MAX = 128 * 1024 * 1024  # a request has 8 MiB at most
CHARACTER_BYTES_MAX = 4
ITEM_CHARS = 128  # more than a number, an opaque object or brackets take, so that counting them ends soon
NUMBER_BITS_MAX = 256  # templates count; larger numbers only cost time
JSON_ESCAPED = "".join(map(chr, range(0x20))) + '"\\'
JSON_ESCAPE_CHARS = 6  # \u0001
REPR_ESCAPE_CHARS = 10  # \U00010ffff

# Variable by which a rendering's allowance is found; templates cannot spell it.
ALLOWANCE = "allowance of this rendering"


class AllowanceExceeded(Exception):
    """Not a TemplateError, so that nothing in jinja2 takes it for one of its own."""


class Allowance:
    """What is left to one rendering."""

    def __init__(self, given: Iterable[Mapping[str, Any]]) -> None:
        """given: the messages and tools, whose size the allowance depends on."""
        given_bytes = sum(map(_given_bytes, given))
        self._bytes_max = min(MADE_BYTES_BASE + MADE_PER_GIVEN_BYTE * given_bytes, MADE_BYTES_MAX)
        self._bytes_left = self._bytes_max
        self._steps_left = STEPS_MAX

    def step(self) -> None:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise AllowanceExceeded(f"takes more than {STEPS_MAX} steps")

    def require(self, size_bytes: int) -> None:
        """Let nothing of that size be made when so much is not left."""
        if size_bytes > self._bytes_left:
            raise AllowanceExceeded(f"makes more than {self._bytes_max} bytes")

    def take(self, size_bytes: int) -> None:
        self.require(size_bytes)
        self._bytes_left -= size_bytes

    def made(self, value: Value) -> Value:
        """Count what was just made, without what it refers to."""
        self.take(sys.getsizeof(value))
        return value

    def listed(self, items: Iterable[Any]) -> list[Any]:
        """The items of something that may make them as it goes, each counted."""
        taken: list[Any] = []
        for item in items:
            self.take(8 if isinstance(item, Mapping) else 8 + sys.getsizeof(item))
            taken.append(item)
        return taken

    def text(self, value: object) -> str:
        """As str(), of which lists that hold one another many times make more than there is."""
        if isinstance(value, str):
            return value
        self.require(self._written_bytes(value, _repr_chars))
        return self.made(str(value))

    def require_repr(self, value: object, times: int = 1) -> None:
        """Let the value be written by repr(), str() or ascii() so many times."""
        self.require(times * self._written_bytes(value, _repr_chars))

    def require_json(self, value: object, indent_chars: int) -> None:
        self.require(self._written_bytes(value, _json_chars, indent_chars))

    def joined(self, separator: str, parts: list[str]) -> str:
        self.require(
            text_bytes(sum(map(len, parts)) + len(separator) * len(parts), all(map(str.isascii, (separator, *parts))))
        )
        return self.made(separator.join(parts))

    def _written_bytes(self, value: object, string_chars: Callable[[str], int], indent_chars: int = 0) -> int:
        """At least what the value takes as text; some number beyond what is left when that is more."""
        chars, is_ascii = 0, True
        open_items: list[Iterator[Any]] = [iter((value,))]
        while open_items:
            if text_bytes(chars, is_ascii) > self._bytes_left:
                break
            try:
                item = next(open_items[-1])
            except StopIteration:
                open_items.pop()
                continue
            chars += ITEM_CHARS + indent_chars * len(open_items)
            match item:
                case str():
                    is_ascii = is_ascii and item.isascii()
                    chars += string_chars(item)
                case bytes():
                    chars += CHARACTER_BYTES_MAX * len(item)
                case int():
                    chars += item.bit_length()
                case Mapping():
                    open_items.append(iter(item.items()))
                case list() | tuple() | AbstractSet() | KeysView() | ValuesView() | ItemsView():
                    open_items.append(iter(item))
                case Namespace():
                    raise jinja2.TemplateRuntimeError("a namespace is no text")
                case _:
                    chars += ITEM_CHARS  # a number with a fraction; an object, by its type and address
        return text_bytes(chars, is_ascii)


def _given_bytes(value: object) -> int:
    """Of JSON, which its parser keeps from being nested too deep for this."""
    size = sys.getsizeof(value)
    if isinstance(value, Mapping):
        size += sum(map(_given_bytes, value.values()))
    elif isinstance(value, list | tuple):
        size += sum(map(_given_bytes, value))
    return size


def allowance_of(context: Context) -> Allowance:
    allowance = context.resolve(ALLOWANCE)
    assert isinstance(allowance, Allowance)
    return allowance


def text_bytes(chars: int, is_ascii: bool) -> int:
    return chars if is_ascii else chars * CHARACTER_BYTES_MAX


def check_number(value: object) -> None:
    """Raises TemplateRuntimeError for an integer of NUMBER_BITS_MAX bits and more."""
    if isinstance(value, int) and value.bit_length() >= NUMBER_BITS_MAX:
        raise jinja2.TemplateRuntimeError(f"a number has more than {NUMBER_BITS_MAX} bits")


def _repr_chars(text: str) -> int:
    return len(text) * (2 if text.isprintable() else REPR_ESCAPE_CHARS)


def _json_chars(text: str) -> int:
    return len(text) + (JSON_ESCAPE_CHARS - 1) * sum(map(text.count, JSON_ESCAPED))
