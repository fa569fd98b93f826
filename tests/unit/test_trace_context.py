"""W3C Trace Context: what is read, what is none, and what is passed on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observability.trace_context import (
    KNOWN_FLAGS,
    STATE_CHARS_MAX,
    STATE_MEMBERS_MAX,
    TraceContext,
    context_of_headers,
    parse_trace_context,
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"

contexts = st.builds(
    lambda trace, span, flags: TraceContext(f"{trace:032x}", f"{span:016x}", flags),
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.integers(0, KNOWN_FLAGS),
)
keys = st.from_regex(r"[a-z][a-z0-9_*/-]{0,20}", fullmatch=True)
values = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters=",="), min_size=1).map(
    lambda text: text[:256].strip() or "v"
)
states = st.dictionaries(keys, values, max_size=STATE_MEMBERS_MAX)


@given(contexts)
def test_what_is_written_is_read_back(context: TraceContext) -> None:
    assert parse_trace_context(context.traceparent) == context
    assert len(context.traceparent) == 55


@given(st.text())
def test_any_text_is_a_context_or_none(text: str) -> None:
    found = parse_trace_context(text, text)
    assert found is None or parse_trace_context(found.traceparent, found.state) == found


@given(contexts, states)
def test_a_state_within_the_bound_is_passed_on_as_it_is(context: TraceContext, members: dict[str, str]) -> None:
    state = ",".join(f"{key}={value}" for key, value in members.items())
    found = parse_trace_context(context.traceparent, state)
    assert found is not None
    if len(state) <= STATE_CHARS_MAX:
        assert found.state == state
    kept = found.state.split(",") if found.state else []
    assert len(found.state) <= STATE_CHARS_MAX
    remaining = iter(state.split(","))
    assert all(member in remaining for member in kept), "whole members, in their order"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param(f"00-{TRACE}-{SPAN}", id="no flags"),
        pytest.param(f"ff-{TRACE}-{SPAN}-01", id="version ff"),
        pytest.param(f"00-{'0' * 32}-{SPAN}-01", id="trace id of zeros"),
        pytest.param(f"00-{TRACE}-{'0' * 16}-01", id="span id of zeros"),
        pytest.param(f"00-{TRACE.upper()}-{SPAN}-01", id="capitals"),
        pytest.param(f"00-{TRACE}-{SPAN}-01-more", id="more than version 00 has"),
        pytest.param(f"cc-{TRACE}-{SPAN}-01.more", id="a later version, badly separated"),
        pytest.param(f"00-{TRACE}-{SPAN}-0g", id="flags that are no number"),
        pytest.param(f"00-{TRACE}-{SPAN}-01\n", id="a line break"),
    ],
)
def test_what_is_no_traceparent_is_none(text: str) -> None:
    assert parse_trace_context(text) is None


def test_of_a_later_version_what_this_one_knows_is_read() -> None:
    found = parse_trace_context(f"cc-{TRACE}-{SPAN}-ff-more-of-it")
    assert found == TraceContext(TRACE, SPAN, KNOWN_FLAGS)
    assert found is not None
    assert found.is_sampled
    assert found.traceparent == f"00-{TRACE}-{SPAN}-03"


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        pytest.param("a=1 , b=2,,", "a=1,b=2", id="blanks and empty members"),
        pytest.param("a=1,a=2", "", id="a key twice"),
        pytest.param("a=1,B=2", "", id="a key that is none"),
        pytest.param("a=1=2", "", id="a value that is none"),
        pytest.param("a=1,b=\N{SNOWMAN}", "", id="not ASCII"),
        pytest.param(",".join(f"k{i}=v" for i in range(STATE_MEMBERS_MAX + 1)), "", id="too many"),
        pytest.param(f"a={'x' * 200},b=1,c={'y' * 250},d={'z' * 90}", f"b=1,d={'z' * 90}", id="long members first"),
        pytest.param(
            ",".join(f"k{i}={'v' * 96}" for i in range(7)),
            ",".join(f"k{i}={'v' * 96}" for i in range(5)),
            id="then the last",
        ),
    ],
)
def test_a_tracestate_is_passed_on_in_whole_members(state: str, kept: str) -> None:
    found = parse_trace_context(f"00-{TRACE}-{SPAN}-00", state)
    assert found is not None
    assert found.state == kept


def test_headers_are_read_and_two_traceparents_are_none() -> None:
    parent = (b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())
    found = context_of_headers([(b"tracestate", b"a=1"), parent, (b"tracestate", b"b=2"), (b"host", b"x")])
    assert found == TraceContext(TRACE, SPAN, 1, "a=1,b=2")
    assert context_of_headers([parent, parent]) is None
    assert context_of_headers([(b"tracestate", b"a=1")]) is None
    assert context_of_headers([(b"traceparent", b"\xff\xfe")]) is None
