"""Chat messages to the one text that a model was trained on, by the Jinja template that comes with it.

The template is foreign: it runs in nodes.engine.template_sandbox, may not change what it is given, and neither writes
nor loops nor grows without end. Steps and bytes are counted instead of seconds, so that a conversation renders or not
whatever else the machine does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.nodes

from nodes.engine.template_allowance import ALLOWANCE, Allowance, AllowanceExceeded
from nodes.engine.template_sandbox import TemplateSandbox
from nodes.engine.tool_messages import for_templates, with_tools_written

# Twice the largest request that travels between nodes; a template that writes more is looping.
RENDERED_CHARS_MAX = 16 * 1024 * 1024
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


class ChatTemplate:
    """bos_token, eos_token: how the tokenizer spells them; templates write them by these names. knows_tools: it reads
    the variable `tools`."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        """Raises ChatTemplateInvalid when the source is no Jinja template."""
        environment = TemplateSandbox()
        environment.globals |= {"raise_exception": _complain, "bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(source)
            names = environment.parse(source).find_all(jinja2.nodes.Name)
            self.knows_tools = any(name.name == "tools" and name.ctx == "load" for name in names)
        except jinja2.TemplateSyntaxError as exc:
            raise ChatTemplateInvalid(f"line {exc.lineno}: {exc.message}") from exc
        except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:  # of Python's compiler
            raise ChatTemplateInvalid(f"it is nested too deep or has too large a number: {type(exc).__name__}") from exc

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt that ends where the assistant's answer begins. tools: those that the model may call, as OpenAI's
        API has them. A template that does not know them gets messages into which they are written.

        Raises ChatTemplateError; it says what the template complained about, and nothing of the messages' content.
        """
        parts: list[str] = []
        size = 0
        try:
            messages = for_templates(messages) if self.knows_tools else with_tools_written(messages, tools)
            variables = {
                "messages": messages,
                "tools": tools or None,
                "add_generation_prompt": True,
                ALLOWANCE: Allowance([*messages, *tools]),
            }
            for part in self._template.generate(variables):
                parts.append(part)
                size += len(part)
                if size > RENDERED_CHARS_MAX:
                    raise ChatTemplateError(f"the chat template writes more than {RENDERED_CHARS_MAX} characters")
        except AllowanceExceeded as exc:
            raise ChatTemplateError(f"the chat template {exc}") from exc
        except _Complaint as exc:
            raise ChatTemplateError(f"the chat template refuses the messages: {exc}") from exc
        except FAILURES as exc:
            raise ChatTemplateError(f"the chat template cannot render the messages: {type(exc).__name__}") from exc
        return "".join(parts)


def _complain(message: object) -> NoReturn:
    raise _Complaint(str(message)[:COMPLAINT_CHARS_MAX])
