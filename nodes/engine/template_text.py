"""What templates may do with text and lists: methods and operators, each bounded before it is done.

Methods that are not listed here are refused: of most it is not worth knowing how much they can make.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment, SandboxedFormatter

from nodes.engine.template_allowance import Allowance, check_number, text_bytes

EXPONENT_MAX = 64  # `9 ** 9 ** 9` is one step that does not end
ITEM_BYTES = 8  # of a list: a pointer
PIECE_BYTES = 64  # a short string, and its place in a list
ESCAPE_GROWTH = 6  # & to &amp; by text that is marked as HTML
FIELD_CHARS_MAX = 400  # one number written by % or format(): 1e308 with two digits behind the point

# A placeholder of `%` with a width and a precision of at most two digits.
PLACEHOLDER = re.compile(r"%(?:\(\w*\))?[#0\- +]*\d{0,2}(?:\.\d{0,2})?[a-zA-Z%]")
WIDE_FIELD = re.compile(r"\d{3}")
# Every character at which split() without arguments and splitlines() cut.
BLANKS = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)

# Methods whose result is about as large as the text; those that answer yes or no begin with `is`.
TEXT_METHODS = frozenset(
    {
        "capitalize",
        "casefold",
        "count",
        "endswith",
        "find",
        "index",
        "lower",
        "lstrip",
        "partition",
        "removeprefix",
        "removesuffix",
        "rfind",
        "rindex",
        "rpartition",
        "rstrip",
        "startswith",
        "strip",
        "swapcase",
        "title",
        "upper",
    }
)
LIST_METHODS = frozenset({"copy", "count", "index"})
MAPPING_METHODS = frozenset({"copy", "get", "items", "keys", "values"})


class StrFormat:
    """`text.format`, or `text.format_map`: not callable, so that only the sandbox, which knows the allowance, does."""

    def __init__(self, pattern: str, is_map: bool) -> None:
        self._pattern = pattern
        self._is_map = is_map

    def write(
        self, environment: SandboxedEnvironment, allowance: Allowance, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> str:
        if self._is_map:
            (kwargs,), args = args, ()
        return _BoundedFormatter(environment, allowance).vformat(str(self._pattern), args, kwargs)


class _BoundedFormatter(SandboxedFormatter):
    def __init__(self, environment: SandboxedEnvironment, allowance: Allowance) -> None:
        super().__init__(environment)
        self._allowance = allowance

    def format_field(self, value: Any, format_spec: str) -> Any:
        if WIDE_FIELD.search(format_spec):
            raise jinja2.TemplateRuntimeError("a field is wider than 99")
        check_number(value)
        if not isinstance(value, int | float):
            value = self._allowance.text(value)
            self._allowance.require(2 * text_bytes(len(value) + FIELD_CHARS_MAX, value.isascii()))
        return self._allowance.made(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is None:
            return value
        self._allowance.require_repr(value)
        return self._allowance.made(super().convert_field(value, conversion))


def call_method(
    allowance: Allowance, method: Callable[..., Any], owner: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call a method of text, a list or a table. Raises SecurityError for one that templates have no use for."""
    name = method.__name__
    match owner:
        case str():
            _require_text_method(allowance, name, owner, args, kwargs)
        case list() | tuple() if name in LIST_METHODS:
            pass
        case Mapping() if name in MAPPING_METHODS:
            pass
        case _:
            raise SecurityError(f"templates may not call {name} of {type(owner).__name__}")
    if name == "join" and isinstance(owner, str):
        (items,) = args
        return allowance.joined(str(owner), _texts(allowance.listed(items)))
    result = allowance.made(method(*args, **kwargs))
    if isinstance(owner, str) and isinstance(result, list | tuple):
        for piece in result:
            allowance.made(piece)
    return result


def require_operation(allowance: Allowance, operator: str, left: Any, right: Any) -> None:
    """For `left operator right`."""
    for operand in (left, right):
        check_number(operand)
    if operator == "**" and not (isinstance(right, int | float) and abs(right) <= EXPONENT_MAX):
        raise jinja2.TemplateRuntimeError(f"an exponent is beyond {EXPONENT_MAX}")
    if operator == "%" and isinstance(left, str):
        require_placeholders(allowance, left, right)
    elif operator == "*":
        for factor, times in ((left, right), (right, left)):
            if hasattr(factor, "__len__") and isinstance(times, int):
                allowance.require(_size(factor) * times)
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        allowance.require(_size(left) + _size(right))


def require_placeholders(allowance: Allowance, pattern: str, values: Any) -> None:
    """For `pattern % values`."""
    rest, count = PLACEHOLDER.subn("", pattern)
    if "%" in rest:
        raise jinja2.TemplateRuntimeError("a placeholder is wider than 99, or none")
    growth = ESCAPE_GROWTH if hasattr(pattern, "__html__") else 1
    allowance.require(_size(pattern))
    allowance.require_repr((values,), times=growth * max(count, 1))
    allowance.require(4 * FIELD_CHARS_MAX * count)


def require_replace(allowance: Allowance, text: str, old: str, new: str, count: int) -> None:
    found = text.count(old)
    found = found if count < 0 else min(found, count)
    allowance.require(_growth(text, new) * text_bytes(len(text) + found * len(new), text.isascii() and new.isascii()))


def require_width(allowance: Allowance, text: str, width: int, fill: str = " ") -> None:
    allowance.require(text_bytes(max(len(text), width), text.isascii() and fill.isascii()))


def require_pieces(allowance: Allowance, text: str, separator: str | None, pieces_max: int = -1) -> None:
    """For text that is cut at each separator, at blanks where it is None."""
    count = text.count(separator) if separator else sum(map(text.count, BLANKS))
    allowance.require(_size(text) + PIECE_BYTES * (count if pieces_max < 0 else min(count, pieces_max)))


def _require_text_method(
    allowance: Allowance, name: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    if name in TEXT_METHODS or name == "join" or name.startswith("is"):
        return
    match name, (*args, *kwargs.values()):
        case "replace", (str(old), str(new)):
            require_replace(allowance, text, old, new, -1)
        case "replace", (str(old), str(new), int(count)):
            require_replace(allowance, text, old, new, count)
        case "split" | "rsplit" | "splitlines", (None | bool(), *_) | ():
            require_pieces(allowance, text, None)
        case "split" | "rsplit", (str(separator),):
            require_pieces(allowance, text, separator)
        case "split" | "rsplit", (str(separator), int(pieces_max)):
            require_pieces(allowance, text, separator, pieces_max)
        case "split" | "rsplit", (int(),):  # maxsplit alone, by its name
            require_pieces(allowance, text, None)
        case "center" | "ljust" | "rjust" | "zfill", (int(width),):
            require_width(allowance, text, width)
        case "center" | "ljust" | "rjust", (int(width), str(fill)):
            require_width(allowance, text, width, fill)
        case _:
            raise SecurityError(f"templates may not call {name} of text with these arguments")


def _texts(items: list[Any]) -> list[str]:
    for item in items:
        if not isinstance(item, str):
            raise TypeError(f"text is joined with {type(item).__name__}")
    return items


def _size(value: Any) -> int:
    """Bytes of text or of a list, without what the list holds."""
    if isinstance(value, str):
        return _growth(value) * text_bytes(len(value), value.isascii())
    return ITEM_BYTES * len(value)


def _growth(*texts: str) -> int:
    return ESCAPE_GROWTH if any(hasattr(text, "__html__") for text in texts) else 1
