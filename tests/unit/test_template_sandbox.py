"""The sandbox of foreign templates: it gives what jinja2 gives, and not what would fill the memory."""
# ruff: noqa: E501 - a template is easier to read in one line

from __future__ import annotations

import json
import re
import tracemalloc

import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nodes.engine.chat_template import ChatTemplateError, ChatTemplateInvalid
from tests.unit.test_chat_template import USER, template

# What one rendering may take at its peak; each attack below asks for gigabytes, at least.
PEAK_BYTES_MAX = 8_000_000
LONG = "{% set x = 'x' * 1000000 %}"  # a megabyte, which is allowed
DAG = "{% set ns = namespace(l=['x']) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"

ATTACKS = {
    "product of text": "{{ 'x' * 9999999999 }}",
    "product of numbers and text": "{{ 9999999999 * 'x' }}",
    "product of a list": "{{ ([0] * 9999999999) | length }}",
    "product of a tuple": "{{ ((0, 1) * 9999999999) | length }}",
    "doubling by +": "{% set ns = namespace(t='xx') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(t='xx') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(t=[0]) %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "one ~ of many": LONG + "{{ (" + " ~ ".join(["x"] * 999) + ") | length }}",
    "kept texts": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l, 'x' * 999999] %}"
    "{% endfor %}",
    "kept slices": LONG + "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l, x[1:]] %}"
    "{% endfor %}",
    "kept small things": "{% set ns = namespace(l=[]) %}{% for i in range(999) %}{% for j in range(999) %}"
    "{% set ns.l = [ns.l, {'a': [1], 'b': (1, 2)}] %}{% endfor %}{% endfor %}",
    "printf width": "{{ '%9999999999d' % 1 }}",
    "printf precision": "{{ '%.2000000000f' % 1 }}",
    "printf star": "{{ '%*d' % (2000000000, 1) }}",
    "printf name": "{{ '%(a(b))2000000000d' % {'a(b)': 1} }}",
    "printf of much": LONG + "{{ ('%s' * 9999) % ((x,) * 9999) }}",
    "printf of one that is nested": DAG + "{{ '%s' % ns.l }}",
    "printf filter": "{{ '%2000000000d' | format(1) }}",
    "center filter": "{{ 'x' | center(2000000000) }}",
    "center filter in a map": "{{ ['x'] | map('center', 2000000000) | list | length }}",
    "indent filter": "{{ ('x\n' * 9999) | indent(9999999) }}",
    "indent filter by text": LONG + "{{ ('x\n' * 9999) | indent(x) }}",
    "replace filter": LONG + "{{ x | replace('x', x) }}",
    "replace filter of nothing": LONG + "{{ x | replace('', x) }}",
    "join filter": LONG + "{{ ([x] * 99999) | join }}",
    "join filter by much": LONG + "{{ range(99999) | join(x) }}",
    "join filter of an attribute": LONG + "{{ ([{'a': x}] * 99999) | join(',', 'a') }}",
    "tojson filter": LONG + "{{ ([x] * 99999) | tojson }}",
    "tojson filter nested": DAG + "{{ ns.l | tojson }}",
    "tojson filter indent": "{{ [1] | tojson(indent=2000000000) }}",
    "tojson filter escapes": "{{ ('\x01' * 4000000) | tojson }}",
    "string filter": DAG + "{{ ns.l | string | length }}",
    "upper filter": DAG + "{{ ns.l | upper | length }}",
    "title filter": "{{ ('a ' * 1900000) | title }}",
    "list filter": "{% set ns = namespace(l=[]) %}{% for i in range(999) %}{% set ns.l = [ns.l, range(99999) | list] %}"
    "{% endfor %}",
    "batch filter": "{{ [1] | batch(2000000000, 0) | list | length }}",
    "slice filter": "{{ [1] | slice(2000000000) | list | length }}",
    "round filter": "{{ 1.5 | round(2000000000, 'ceil') }}",
    "sum filter": "{{ ([[0] * 99999] * 9999) | sum(start=[]) | length }}",
    "sort filter keys": LONG + "{{ ([x] * 99999) | sort | length }}",
    "sort filter keys by attribute": LONG + "{{ ([{'a': x}] * 99999) | sort(attribute='a') | length }}",
    "unique filter keys": LONG + "{% set l = namespace(l=[]) %}{% for i in range(99) %}{% set l.l = l.l + [x ~ i] %}"
    "{% endfor %}{{ l.l | unique | list | length }}",
    "wordwrap filter": "{{ ('x' * 999999) | wordwrap(1, wrapstring='x' * 99999) }}",
    "urlize filter": "{{ ('www.a.com ' * 9999) | urlize(target='x' * 99999) }}",
    "ljust": "{{ 'x'.ljust(2000000000) }}",
    "zfill": "{{ 'x'.zfill(2000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(2000000000) }}",
    "replace": LONG + "{{ x.replace('x', x) }}",
    "replace counted": LONG + "{{ x.replace('x', x, 9999) }}",
    "join": LONG + "{{ ''.join([x] * 99999) }}",
    "join by much": LONG + "{{ x.join(['x'] * 99999) }}",
    "split": "{{ ('xy' * 1900000).split('x') | length }}",
    "split at blanks": "{{ ('x ' * 1900000).split() | length }}",
    "splitlines": "{{ ('xy\n' * 1200000).splitlines() | length }}",
    "partition kept": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l, ('x' * 99999)"
    ".partition('y')] %}{% endfor %}",
    "translate": LONG + "{{ x.translate({120: x}) }}",
    "encode": LONG + "{{ x.encode('utf-32') }}",
    "to_bytes": "{{ (1).to_bytes(2000000000, 'big') }}",
    "fromkeys": "{{ dict.fromkeys(range(99999)) }}",
    "format width": "{{ '{:2000000000}'.format(1) }}",
    "format precision": "{{ '{:.2000000000f}'.format(1.5) }}",
    "format nested width": "{{ '{:{}}'.format(1, 2000000000) }}",
    "format of much": LONG + "{{ ('{0}' * 99999).format(x) }}",
    "format of one that is nested": DAG + "{{ '{}'.format(ns.l) }}",
    "format converted": DAG + "{{ '{!r}'.format(ns.l) }}",
    "format_map": "{{ '{a:2000000000}'.format_map({'a': 1}) }}",
    "format by another name": "{% set f = '{:2000000000}'.format %}{{ f(1) }}",
    "format of marked text": "{{ ('{:2000000000}' | safe).format(1) }}",
    "lipsum": "{{ lipsum(9999999) }}",
    "written again and again": LONG + "{% macro f() %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endmacro %}"
    "{{ f() | length }}",
    "text of the template itself": "{% macro f() %}{% for i in range(99999) %}"
    + "x" * 9999
    + "{% endfor %}{% endmacro %}"
    "{{ f() | length }}",
    "a block that is set": LONG
    + "{% set y %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endset %}{{ y | length }}",
    "a block that is filtered": LONG
    + "{% filter length %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endfilter %}",
    "macros that double": "{% macro f0() %}"
    + "x" * 999
    + "{% endmacro %}"
    + "".join(f"{{% macro f{i + 1}() %}}{{{{ f{i}() }}}}{{{{ f{i}() }}}}{{% endmacro %}}" for i in range(30))
    + "{% set y = f30() %}",
    "a list that is written": DAG + "{{ ns.l }}",
    "a namespace that is written": DAG + "{{ ns }}",
    "numbers that double": "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "powers of powers": "{% set a = 9 ** 64 %}{% set b = a ** 64 %}{% set c = b ** 64 %}{{ (c ** 64) | length }}",
    "marked text": "{% set a = ('<' * 1000000) | safe %}{{ (a + '<' * 1900000) | length }}",
    "HTML": "{% autoescape true %}{{ '<' * 1900000 }}{% endautoescape %}",
    "lengths of loops": "{% macro f(n) %}{% for i in range(99999) | map('string') %}{{ loop.length }}"
    "{% if n %}{{ f(n - 1) }}{% endif %}{% endfor %}{% endmacro %}{{ f(99) }}",
    "copies of tables": "{% set d = namespace(d={}) %}{% for i in range(9999) %}{% set d.d = dict(d.d, **{'k' ~ i: 1}) %}"
    "{% set d.l = [d.l, namespace(d.d)] %}{% endfor %}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_template_cannot_build_gigabytes(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((ChatTemplateError, ChatTemplateInvalid)) as raised:
            template(ATTACKS[name]).render(USER)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < PEAK_BYTES_MAX
    assert not re.search("MemoryError|expected token|unknown tag", str(raised.value))


def plainly(source: str, messages: list[dict[str, str]]) -> str:
    """What jinja2 gives without any bound."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(source).render(messages=messages)


@pytest.mark.parametrize(
    "expression",
    [
        "messages[0].content.split(' ', 1)[-1] ~ messages | length ~ none ~ true ~ 1.5 ~ [1, 'a', ('b',), {'c': none}]",
        "'a b\nc d'.split() + 'a,b,c'.split(',') + 'a,b,c'.rsplit(',', 1) + 'a\nb'.splitlines()",
        "'x'.join(['a', 'b']), 'abcabc'.replace('a', 'dd'), 'abcabc'.replace('a', 'dd', 1), '7'.zfill(3), 'x'.center(5, '-')",
        "'ab'.startswith('a'), 'ab'.upper(), ' a '.strip(), 'aXb'.partition('X'), 'ab'.find('b'), 'é'.encode is defined",
        "'%s is %d of %5.1f%%' % ('x', 3, 4.25), '%(a)s' % {'a': [1, 2]}, '%s' % 'y', '%s %s' | format('a', 'b')",
        "'{} {0!r} {:>5} {:.2f}'.replace('0', '').format('a', 'b', 'c', 1.234), '{a}'.format(a=1), '{a[b]}'.format(a={'b': 2})",
        "'{a}'.format_map({'a': 3}), '{:{w}}'.format(7, w=4), '{m.role}'.format(m=messages[0])",
        "['b', 'A', 'c'] | sort, [3, 1] | sort(reverse=true), [{'a': 2}, {'a': 1}] | sort(attribute='a')",
        "{'b': 1, 'A': 2} | dictsort, {'b': 1, 'a': 2} | dictsort(by='value'), ['a', 'A', 'b'] | unique | list",
        "[1, 2, 3] | batch(2, 0) | list, [1, 2, 3] | slice(2) | list, [1, 2] | sum, [{'n': 4}] | sum(attribute='n')",
        "[1, 2] | join('-'), messages | join(', ', attribute='role'), 'abc' | list, 'abc' | reverse, [1, 2] | reverse | list",
        "'a\nb\n\nc' | indent(2), 'a\nb' | indent('> ', first=true, blank=true), 'ab' | center(6), 'a b' | replace('a', 'c')",
        "messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list, [1, 0] | select | list",
        "'it is' | title, 'ab' | upper | capitalize, '  x ' | trim, ('x' * 300) | truncate(20), 1.456 | round(1)",
        "3 | string, '3' | int + 1, '2.5' | float, [1, 5] | max, [1, 5] | min, [] | first is undefined, [1, 2] | last",
        "messages[::-1][0].content[2:5], (1, 2) + (3,), [1] * 3, 'ab' * 2, 7 // 2, 7 % 4, 2 ** 5, 7 - 2, 1 / 4, -3 | abs",
        "{'a': [1, {'b': 'ü\n\u0001'}]} | tojson, {'a': [1, {}]} | tojson(indent=2), messages | tojson, '<' | e, '<b>' | safe",
        "dict(a=1, b=2).items() | list, {'a': 1}.get('b', 5), {'a': 1}.keys() | list, namespace(a=1).a, missing ~ 'x'",
    ],
)
def test_what_is_bounded_gives_what_jinja_gives(expression: str) -> None:
    for source in (f"{{{{ ({expression}) }}}}", f"{{% for m in messages %}}{{{{ ({expression}) }}}}{{% endfor %}}"):
        assert template(source).render(USER) == plainly(source, USER)


def test_statements_are_as_in_jinja() -> None:
    source = (
        "{% macro say(m, end='.') %}{{ m.content }}{{ end }}{{ caller() if caller }}{{ varargs }}{% endmacro %}"
        "{% set ns = namespace(last=none) %}{% for m in messages %}{% set ns.last = m.content.strip() %}"
        "{% call say(m, '!', 1) %} called {{ m.role }}{% endcall %}{{ loop.length }}{{ loop.last }}{{ loop.cycle('a', 'b') }}"
        "{{ loop.previtem.role if loop.previtem }}{% endfor %}{{ ns.last }}"
        "{% set text %}  <{{ messages[0].role }}>  {% endset %}{{ text }}|{% filter upper %}a{{ text }}{% endfilter %}"
        "{% for k, v in {'a': (1, 2)}.items() recursive %}{{ k }}{{ v }}{% endfor %}{% with a = 1 %}{{ a }}{% endwith %}"
        "{% for i in range(3) if i != 1 %}{{ i }}{% else %}none{% endfor %}{% set a, b = 'xy' %}{{ a }}{{ b }}"
        "{% block body %}{{ messages[0].role }}{% endblock %}{{ self.body() }}"
    )
    assert template(source).render([*USER, *USER]) == plainly(source, [*USER, *USER])


def test_long_conversations_and_large_messages_render() -> None:
    source = (
        "{% for m in messages %}{% set content = m.content | trim %}"
        "{{ '<|' ~ m.role ~ '|>' + content.split('</think>')[-1].lstrip('\n') + '\n' }}{% endfor %}"
    )
    many = [{"role": "user", "content": f"question {i}"} for i in range(5_000)]
    assert template(source).render(many) == plainly(source, many)
    large = [{"role": "user", "content": "ein Satz mit ä\n" * 250_000}]
    assert template(source).render(large) == plainly(source, large)
