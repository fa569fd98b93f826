"""Foreign templates: what they may do, and what becomes of what they may not."""

from __future__ import annotations

import pytest

from nodes.engine import chat_template, template_allowance
from nodes.engine.chat_template import ChatTemplate, ChatTemplateError, ChatTemplateInvalid

USER = [{"role": "user", "content": "secret words"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m['content'] }}{% endfor %}", "<s>user: secret words"),
        ("{% if add_generation_prompt %}go{% endif %}{{ eos_token }}", "go</s>"),
        ("{% for m in messages %}\n  {% set x = 1 %}\n{{ x }}\n{% endfor %}\n", "1\n"),
        ("{{ {'a': '<ü>'} | tojson }}", '{"a": "<ü>"}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ messages[0].content | length }}{{ missing }}", "12"),
        ("{% generation %}x{% endgeneration %}", None),
    ],
    ids=["messages", "generation prompt", "trimmed blocks", "tojson", "loop controls", "undefined", "unknown tag"],
)
def test_templates_render_as_models_were_trained(source: str, text: str | None) -> None:
    if text is None:
        with pytest.raises(ChatTemplateInvalid, match="line 1"):
            template(source)
    else:
        assert template(source).render(USER) == text


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[3].content }}", "UndefinedError"),
        ("{{ messages[0].content + 3 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(1000000) %}x{% endfor %}", "OverflowError"),
    ],
)
def test_what_a_template_cannot_render_is_an_error_without_the_prompt(source: str, complaint: str) -> None:
    with pytest.raises(ChatTemplateError, match=complaint) as raised:
        template(source).render(USER)
    assert "secret" not in str(raised.value)


def test_a_template_that_writes_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDERED_CHARS_MAX", 1_000)
    source = "{% for i in range(9999) %}{% for j in range(9999) %}xxxx{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="1000 characters"):
        template(source).render(USER)


def test_a_long_complaint_is_cut() -> None:
    with pytest.raises(ChatTemplateError) as raised:
        template("{{ raise_exception('x' * 100000) }}").render(USER)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{% for i in [1] * 99 %}{% endfor %}{% endmacro %}{% for i in [1] * 999 %}{{ f() }}{% endfor %}",
    ],
    ids=["nested loops", "macros that call each other", "a loop in a macro"],
)
def test_a_template_that_loops_without_writing_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_allowance, "STEPS_MAX", 10_000)
    with pytest.raises(ChatTemplateError, match="10000 steps"):
        template(source).render(USER)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 9 ** (9 ** 9) }}", "TemplateRuntimeError"),
        ("{{ 'x' * (999999 * 999999) }}", "bytes"),
        ("{{ (999999 * 999999) * ['x'] }}", "bytes"),
    ],
)
def test_a_step_that_would_not_end_is_not_taken(source: str, complaint: str) -> None:
    with pytest.raises(ChatTemplateError, match=complaint):
        template(source).render(USER)


def test_loops_know_their_length_and_macros_their_arguments() -> None:
    source = (
        "{% macro say(m, end='.') %}{{ m.content }}{{ end }}{% endmacro %}"
        "{% for m in messages if m.role == 'user' %}{{ say(m) }}{{ loop.index }}/{{ loop.length }}"
        "{% if loop.last %}!{% endif %}{% else %}nobody{% endfor %}{{ 'ab' * 2 }}{{ 2 ** 3 }}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}"
    )
    assert template(source).render([*USER, *USER]) == "secret words.1/2secret words.2/2!abab8a1"
    assert template(source).render([]) == "nobodyabab8a1"


@pytest.mark.parametrize(
    "source",
    [
        "{% if true %}" * 200 + "{% endif %}" * 200,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "{% for i in x %}" * 30 + "{% endfor %}" * 30,
    ],
    ids=["blocks", "brackets", "a number", "loops"],
)
def test_a_template_that_python_cannot_compile_is_no_template(source: str) -> None:
    with pytest.raises(ChatTemplateInvalid):
        template(source).render(USER)
