"""The Jinja that foreign templates run in: they may not change what they are given, and what they make is counted.

Each way in which a template can make something goes through the rendering's allowance: loops, calls, operators,
filters, and what is written. Those that jinja2 compiles to plain Python, it is given as filters: concatenation, slices,
and lists, tuples and tables that are spelled out. Templates are foreign code, so what is not known to be bounded is
refused.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sized
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from nodes.engine.template_allowance import Allowance, allowance_of
from nodes.engine.template_filters import bounded_filters
from nodes.engine.template_text import StrFormat, call_method, require_operation

LOOP_BYTES = 64  # for one turn over items that are made as they are taken: `loop.length` keeps them
# Filters of the sandbox's own. A template that spells them gets what it would get anyway.
COUNTED, MADE, CONCATENATED = "counted", "made", "concatenated"
# What jinja2 adds to the calls that a template makes in a loop or block, for functions that want the context.
COMPILED_ARGUMENTS = ("_loop_vars", "_block_vars")
GLOBALS = ("cycler", "dict", "joiner", "namespace", "range")  # not lipsum, which writes


@jinja2.pass_context
def _written(context: Context, value: Any) -> str:
    """What goes into the text, or into that of a macro or block."""
    allowance = allowance_of(context)
    text = allowance.text(value)
    return allowance.made(text)


@jinja2.pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterable[Any]:
    """The items of a loop, each a step. Their number is known where it was: jinja2 would keep all to count them."""
    counted = _count_items(allowance_of(context), items)
    return _Sized(counted, len(items)) if isinstance(items, Sized) else counted


def _count_items(allowance: Allowance, items: Iterable[Any]) -> Iterator[Any]:
    item_bytes = 0 if isinstance(items, Sized) else LOOP_BYTES
    for item in items:
        allowance.step()
        allowance.take(item_bytes)
        yield item


class _Sized:
    def __init__(self, items: Iterator[Any], length: int) -> None:
        self._items = items
        self._length = length

    def __iter__(self) -> Iterator[Any]:
        return self._items

    def __len__(self) -> int:
        return self._length


@jinja2.pass_context
def _made(context: Context, value: Any) -> Any:
    return allowance_of(context).made(value)


@jinja2.pass_context
def _concatenated(context: Context, parts: list[Any]) -> str:
    allowance = allowance_of(context)
    return allowance.joined("", [allowance.text(part) for part in parts])


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Renderings are given an Allowance as the variable ALLOWANCE."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        # Prompts are no HTML: escaping would change them.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False, finalize=_written
        )
        self.filters = bounded_filters() | {COUNTED: _counted, MADE: _made, CONCATENATED: _concatenated}
        self.globals = {name: self.globals[name] for name in GLOBALS}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = cast(nodes.Template, _Counting().visit(super()._parse(source, name, filename)))
        template.set_environment(self)
        return template

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as in jinja2
        allowance = allowance_of(__context)
        allowance.step()
        given = {name: value for name, value in kwargs.items() if name not in COMPILED_ARGUMENTS}
        if isinstance(__obj, StrFormat):
            return allowance.made(__obj.write(__self, allowance, args, given))
        if isinstance(__obj, types.BuiltinMethodType | types.MethodType) and not _is_of_jinja(__obj.__self__):
            if not __self.is_safe_callable(__obj):
                raise SecurityError(f"{__obj.__name__} may not be called")
            return call_method(allowance, __obj, __obj.__self__, args, given)
        if isinstance(__obj, type):
            for argument in (*args, *given.values()):
                allowance.made(argument)  # it is copied
        return allowance.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        allowance = allowance_of(context)
        require_operation(allowance, operator, left, right)
        return allowance.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        """What jinja2 gives a template in place of a text's `format`."""
        is_method = isinstance(value, types.BuiltinMethodType | types.MethodType)
        if is_method and isinstance(value.__self__, str) and value.__name__ in ("format", "format_map"):
            return StrFormat(value.__self__, value.__name__ == "format_map")
        return None


def _is_of_jinja(owner: object) -> bool:
    return type(owner).__module__.partition(".")[0] == "jinja2"


class _Counting(NodeTransformer):
    """Puts filters of the sandbox around what jinja2 would not ask it about."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - as jinja2 looks for it
        self.generic_visit(node)
        node.iter = _filtered(cast(nodes.Expr, node.iter), COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), CONCATENATED)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, MADE) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, MADE)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, MADE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, MADE) if node.ctx == "load" else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        return nodes.Const(node.data, lineno=node.lineno)  # which is written as any other value

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:  # noqa: N802
        raise jinja2.TemplateSyntaxError("a prompt is no HTML: autoescape is not for it", node.lineno)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
