"""The filters that templates may use, each bounded before it is done.

Jinja's own, but for those that write HTML or lay text out, which no prompt needs; `tojson` is as transformers spells
it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2.filters import FILTERS, ignore_case, make_attrgetter, make_multi_attrgetter
from jinja2.runtime import Context

from nodes.engine.template_allowance import Allowance, allowance_of, text_bytes
from nodes.engine.template_text import (
    ITEM_BYTES,
    PIECE_BYTES,
    require_pieces,
    require_placeholders,
    require_replace,
    require_width,
)

Filter = Callable[..., Any]

PRECISION_MAX = 100  # digits to round to
INDENT_CHARS_MAX = 16  # of tojson, for each level

# Their results are small, or make their items as these are taken.
PLAIN = (
    "abs",
    "attr",
    "count",
    "d",
    "default",
    "first",
    "float",
    "int",
    "items",
    "length",
    "map",
    "reject",
    "rejectattr",
    "select",
    "selectattr",
)
# How many times the text their work takes.
OF_TEXT = {
    "capitalize": 4,
    "e": 6,
    "escape": 6,
    "forceescape": 6,
    "lower": 4,
    "safe": 1,
    "title": PIECE_BYTES,
    "trim": 1,
    "truncate": 2,
    "upper": 4,
}
OF_ITEMS = ("batch", "last", "max", "min", "reverse", "slice", "sum")


def bounded_filters() -> dict[str, Filter]:
    """By name."""
    filters: dict[str, Filter] = {name: _plain(FILTERS[name]) for name in PLAIN}
    filters |= {name: _of_text(FILTERS[name], growth) for name, growth in OF_TEXT.items()}
    filters |= {name: _of_items(FILTERS[name]) for name in OF_ITEMS}
    own: dict[str, Filter] = {
        "center": _center,
        "dictsort": _dictsort,
        "format": _format,
        "indent": _indent,
        "join": _join,
        "list": _list,
        "replace": _replace,
        "round": _round,
        "sort": _sort,
        "string": _string,
        "tojson": _to_json,
        "unique": _unique,
    }
    return filters | {name: jinja2.pass_context(function) for name, function in own.items()}


def _plain(function: Filter) -> Filter:
    @jinja2.pass_context
    def bounded(context: Context, *args: Any, **kwargs: Any) -> Any:
        return allowance_of(context).made(_call(function, context, *args, **kwargs))

    return bounded


def _of_text(function: Filter, growth: int) -> Filter:
    @jinja2.pass_context
    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        allowance = allowance_of(context)
        text = allowance.text(value)
        allowance.require(growth * text_bytes(len(text), text.isascii()))
        return allowance.made(_call(function, context, text, *args, **kwargs))

    return bounded


def _of_items(function: Filter) -> Filter:
    @jinja2.pass_context
    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        allowance = allowance_of(context)
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, int):
                allowance.require(ITEM_BYTES * argument)  # batch fills up to it
            elif not isinstance(argument, str | float | None):
                raise jinja2.TemplateRuntimeError("a filter takes numbers and text only")  # sum starts with it
        items = value if isinstance(value, str | list | tuple | Mapping) else allowance.listed(value)
        return allowance.made(_call(function, context, items, *args, **kwargs))

    return bounded


def _call(function: Filter, context: Context, *args: Any, **kwargs: Any) -> Any:
    """As jinja2 calls a filter: some want the context, or what is in it, first."""
    wanted = getattr(function, "jinja_pass_arg", None)
    match None if wanted is None else wanted.name:
        case None:
            return function(*args, **kwargs)
        case "context":
            return function(context, *args, **kwargs)
        case "eval_context":
            return function(context.eval_ctx, *args, **kwargs)
        case _:
            return function(context.environment, *args, **kwargs)


def _center(context: Context, value: Any, width: int = 80) -> str:
    allowance = allowance_of(context)
    text = allowance.text(value)
    require_width(allowance, text, width)
    return allowance.made(text.center(width))


def _format(context: Context, value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise jinja2.TemplateRuntimeError("format takes positions or names, not both")
    allowance = allowance_of(context)
    pattern, values = allowance.text(value), kwargs or args
    require_placeholders(allowance, pattern, values)
    return allowance.made(pattern % values)


def _indent(context: Context, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    allowance = allowance_of(context)
    text = allowance.text(value)
    require_pieces(allowance, text, None)
    lines = text.count("\n") + len(text.splitlines()) + 1
    indention_chars = len(width) if isinstance(width, str) else width
    is_ascii = text.isascii() and (isinstance(width, int) or width.isascii())
    allowance.require(text_bytes(len(text) + lines * (indention_chars + 1), is_ascii))
    return allowance.made(str(FILTERS["indent"](str(text), width, first, blank)))


def _join(context: Context, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    allowance = allowance_of(context)
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    parts: list[str] = []
    for item in value:
        allowance.take(ITEM_BYTES)
        parts.append(allowance.text(item))
    return allowance.joined(str(allowance.text(d)), parts)


def _list(context: Context, value: Any) -> list[Any]:
    return allowance_of(context).listed(value)


def _replace(context: Context, s: Any, old: Any, new: Any, count: int | None = None) -> str:
    allowance = allowance_of(context)
    text, old, new = (str(allowance.text(part)) for part in (s, old, new))
    times = -1 if count is None else count
    require_replace(allowance, text, old, new, times)
    return allowance.made(text.replace(old, new, times))


def _round(context: Context, value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > PRECISION_MAX:
        raise jinja2.TemplateRuntimeError(f"a number is rounded to more than {PRECISION_MAX} digits")
    return FILTERS["round"](value, precision, method)


def _string(context: Context, value: Any) -> str:
    return allowance_of(context).text(value)


def _sort(
    context: Context,
    value: Any,
    reverse: bool = False,
    case_sensitive: bool = False,
    attribute: str | int | None = None,
) -> list[Any]:
    allowance = allowance_of(context)
    items = allowance.listed(value)
    allowance.take(2 * PIECE_BYTES * len(items))
    key = make_multi_attrgetter(context.environment, attribute, postprocess=_key(allowance, case_sensitive))
    return sorted(items, key=key, reverse=reverse)


def _dictsort(
    context: Context, value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False
) -> list[Any]:
    position = {"key": 0, "value": 1}[by]
    allowance = allowance_of(context)
    key = _key(allowance, case_sensitive)
    return sorted(allowance.listed(value.items()), key=lambda item: key(item[position]), reverse=reverse)


def _unique(
    context: Context, value: Any, case_sensitive: bool = False, attribute: str | int | None = None
) -> list[Any]:
    allowance = allowance_of(context)
    getter = make_attrgetter(context.environment, attribute, postprocess=_key(allowance, case_sensitive))
    first_ones: dict[Any, Any] = {}
    for item in value:
        allowance.take(2 * PIECE_BYTES)
        first_ones.setdefault(getter(item), item)
    return list(first_ones.values())


def _key(allowance: Allowance, case_sensitive: bool) -> Callable[[Any], Any]:
    """What things are sorted by. All keys are there together, so that each counts."""

    def key(value: Any) -> Any:
        return value if case_sensitive or not isinstance(value, str) else allowance.made(ignore_case(value))

    return key


def _to_json(context: Context, value: Any, indent: int | str | None = None) -> str:
    """As transformers spells it: jinja2's own filter would escape characters for HTML."""
    indent_chars = len(indent) if isinstance(indent, str) else indent or 0
    if indent_chars > INDENT_CHARS_MAX:
        raise jinja2.TemplateRuntimeError(f"JSON is indented by more than {INDENT_CHARS_MAX} characters")
    allowance = allowance_of(context)
    allowance.require_json(value, indent_chars)
    return allowance.made(json.dumps(value, ensure_ascii=False, indent=indent))
