"""Chat messages to the one text that a model was trained on, by the Jinja template that comes with it.

The template is foreign: it runs sandboxed, may not change what it is given, and neither writes nor loops without end.
Steps are counted instead of seconds, so that a conversation renders or not whatever else the machine does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Twice the largest request that travels between nodes; a template that writes more is looping.
RENDERED_CHARS_MAX = 16 * 1024 * 1024
# Turns of loops and calls, of macros too, in one rendering; about a second. A conversation of 1,000 messages takes some
# 10,000 in the templates that models come with.
STEPS_MAX = 1_000_000
EXPONENT_MAX = 64  # `9 ** 9 ** 9` is one step that does not end
# What a template raises when a message lacks what it reads, has another type than it expects, or is nested too deep.
FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
)
# A template's own complaint is shown to the client up to here.
COMPLAINT_CHARS_MAX = 200


class ChatTemplateError(Exception):
    """The template does not take these messages: the client's fault, as a rule a role out of order."""


class ChatTemplateInvalid(Exception):
    """The text is no template: the model folder's fault."""


class _Complaint(jinja2.TemplateError):
    """What a template raises by raise_exception."""


class _TooManySteps(Exception):
    """Not a TemplateError, so that nothing in jinja2 takes it for one of its own."""


class _Steps:
    """Counts one rendering's steps."""

    def __init__(self) -> None:
        self._left = STEPS_MAX

    def take(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise _TooManySteps


# Templates cannot spell these names.
STEPS = "steps of this rendering"
COUNTED = "counted"


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Every loop goes over its items through the filter COUNTED, and every call is counted."""

    intercepted_binops = frozenset({"*", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, COUNTED, [], [], None, None, lineno=loop.lineno)
        return template

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as in jinja2
        _steps_of(__context).take()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= EXPONENT_MAX):
            raise jinja2.TemplateRuntimeError(f"an exponent is beyond {EXPONENT_MAX}")
        if operator == "*":
            for factor, other in ((left, right), (right, left)):
                if hasattr(factor, "__len__") and isinstance(other, int) and len(factor) * other > RENDERED_CHARS_MAX:
                    raise jinja2.TemplateRuntimeError(f"a product is longer than {RENDERED_CHARS_MAX}")
        return super().call_binop(context, operator, left, right)


def _steps_of(context: Context) -> _Steps:
    steps = context.resolve(STEPS)
    assert isinstance(steps, _Steps)
    return steps


@jinja2.pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    """The items, each a step."""
    steps = _steps_of(context)
    for item in items:
        steps.take()
        yield item


class ChatTemplate:
    """bos_token, eos_token: how the tokenizer spells them; templates write them by these names."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        """Raises ChatTemplateInvalid when the source is no Jinja template."""
        # Prompts are no HTML: escaping would change them.
        environment = _BoundedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols],
            autoescape=False,
        )
        environment.filters |= {"tojson": _to_json, COUNTED: _counted}
        environment.globals |= {"raise_exception": _complain, "bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as exc:
            raise ChatTemplateInvalid(f"line {exc.lineno}: {exc.message}") from exc

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that ends where the assistant's answer begins.

        Raises ChatTemplateError; it says what the template complained about, and nothing of the messages' content.
        """
        parts: list[str] = []
        size = 0
        try:
            variables = {"messages": messages, "add_generation_prompt": True, STEPS: _Steps()}
            for part in self._template.generate(variables):
                parts.append(part)
                size += len(part)
                if size > RENDERED_CHARS_MAX:
                    raise ChatTemplateError(f"the chat template writes more than {RENDERED_CHARS_MAX} characters")
        except _TooManySteps as exc:
            raise ChatTemplateError(f"the chat template takes more than {STEPS_MAX} steps") from exc
        except _Complaint as exc:
            raise ChatTemplateError(f"the chat template refuses the messages: {exc}") from exc
        except FAILURES as exc:
            raise ChatTemplateError(f"the chat template cannot render the messages: {type(exc).__name__}") from exc
        return "".join(parts)


def _complain(message: object) -> NoReturn:
    raise _Complaint(str(message)[:COMPLAINT_CHARS_MAX])


def _to_json(value: object, indent: int | None = None) -> str:
    """As transformers spells it: jinja2's own filter would escape characters for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
