"""Renders chat messages into a prompt with the model's own jinja2 template, which is foreign code: sandboxed and bounded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Above the largest request by far; a template that writes more is broken or hostile.
PROMPT_CHARS_MAX = 16 * 1024 * 1024


class ChatTemplateError(Exception):
    """The template refuses the messages, or cannot render them. The message is the template's own where it has one."""


class _Refused(jinja2.TemplateError):
    """Raised by a template through raise_exception()."""


class ChatTemplate:
    """A compiled template. tokens: bos_token, eos_token and the like, as templates name them.

    Raises ChatTemplateError where the source does not compile."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        self._tokens = dict(tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as exc:
            raise ChatTemplateError(f"the chat template does not compile: {exc}") from exc

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt, ending where the assistant's answer begins. Raises ChatTemplateError."""
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(messages=messages, add_generation_prompt=True, **self._tokens):
                parts.append(part)
                size += len(part)
                if size > PROMPT_CHARS_MAX:
                    raise ChatTemplateError(f"the rendered prompt exceeds {PROMPT_CHARS_MAX} characters")
        except _Refused as exc:
            raise ChatTemplateError(f"the model's chat template refuses the messages: {exc}") from exc
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, OverflowError) as exc:
            raise ChatTemplateError(f"the model's chat template fails on the messages: {exc}") from exc
        return "".join(parts)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    """As templates expect it: not HTML-escaped, and not ASCII only."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
