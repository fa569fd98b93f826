import json
import logging
import re
import sys
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from mesh.view import Address
from observability.log_files import ROTATE_BYTES, ROTATED_FILES
from observability.log_lines import (
    CORE_FIELDS,
    FIELD_CHARS_MAX,
    LINE_BYTES_MAX,
    STACK_TRACE_CHARS_MAX,
    json_formatter,
    plain_formatter,
)
from observability.log_writer import STOP_TIMEOUT_S
from observability.logs import LOSS_MESSAGE, QUEUE_RECORDS_MAX

PAGE = Path(__file__).parents[2] / "docs" / "logging.md"


def written(message: object = "message", **fields: object) -> dict[str, Any]:
    """The fields of the JSON line of one record."""
    record = logging.makeLogRecord({"name": "x", "levelno": 20, "levelname": "INFO", "msg": message, **fields})
    line = json_formatter("node-1").format(record)
    assert line.isascii()
    assert "\n" not in line
    assert len(line) <= LINE_BYTES_MAX
    answer: dict[str, Any] = json.loads(line)
    return answer


def raised(error: BaseException) -> tuple[Any, Any, Any]:
    try:
        raise error
    except BaseException:
        return sys.exc_info()


class Colour(StrEnum):
    RED = "red"


class Shape(Enum):
    ROUND = 1


class Opaque:
    def __repr__(self) -> str:
        return "a prompt"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(3, 3, id="integer"),
        pytest.param(True, True, id="boolean"),
        pytest.param(None, None, id="none"),
        pytest.param(float("nan"), "nan", id="not a number"),
        pytest.param(float("-inf"), "-inf", id="infinite"),
        pytest.param(b"abc", "<3 bytes>", id="bytes"),
        pytest.param(Colour.RED, "red", id="string enum"),
        pytest.param(Shape.ROUND, "round", id="enum"),
        pytest.param(Path("/x/y"), "/x/y", id="path"),
        pytest.param(Address("127.0.0.1", 80), "127.0.0.1:80", id="address"),
        pytest.param(ValueError("bad"), "ValueError: bad", id="exception"),
        pytest.param(("a", 1), ["a", 1], id="tuple"),
        pytest.param({"a": {"b": (1,)}}, {"a": {"b": [1]}}, id="nested"),
        pytest.param({"api_key": "x", "n": 1}, {"api_key": "[redacted]", "n": 1}, id="secret inside"),
        pytest.param(Opaque(), "<Opaque>", id="an object's repr is not trusted"),
        pytest.param(list(range(100)), list(range(64)), id="long list"),
        pytest.param([[[[[1]]]]], [[[["<list>"]]]], id="deep list"),
        pytest.param("x" * 5_000, "x" * 4_000 + " [cut: 5000 characters]", id="long text"),
        pytest.param("\x1b[31m\u2028\ud800", "\x1b[31m\u2028\ud800", id="odd characters"),
    ],
)
def test_a_value_becomes(value: object, expected: object) -> None:
    assert written(field=value)["field"] == expected


@pytest.mark.parametrize(
    "name", ["prompt", "messages", "content", "api_key", "http.request.header.authorization", "cluster_key", "x-token"]
)
def test_a_field_named_for_a_secret_or_a_text_is_redacted(name: str) -> None:
    assert written(**{name: "abc"})[name] == "[redacted]"


@pytest.mark.parametrize("name", ["key_id", "prompt_tokens", "completion_tokens", "error.message", "tokens"])
def test_a_field_that_only_sounds_alike_is_kept(name: str) -> None:
    assert written(**{name: "abc"})[name] == "abc"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key sk-abc123-S3cretS3cret refused", "key sk-abc123-[redacted] refused"),
        ("key sk-" + "a" * 48, "key sk-[redacted]"),
        ("key sk-proj-aaa_bbb-ccc", "key sk-proj-[redacted]"),
        ("key sk-abc123 has no requests left", "key sk-abc123 has no requests left"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer [redacted]"),
        ("task-runner-2 is no key", "task-runner-2 is no key"),
    ],
)
def test_keys_are_cut_out_of_texts(text: str, expected: str) -> None:
    assert written(text)["message"] == expected
    assert written("x", exc_info=raised(ValueError(text)))["error.message"] == expected
    assert expected in written("x", exc_info=raised(ValueError(text)))["error.stack_trace"]


class Body(BaseModel):
    number: int


def test_input_that_pydantic_quotes_is_not_logged() -> None:
    prompt = " ".join(["my", "secret", "prompt"])  # not as such in the source lines of the stack trace
    with pytest.raises(ValidationError) as caught:
        Body.model_validate({"number": prompt})
    assert prompt in str(caught.value)
    assert prompt not in json.dumps(written("x", exc_info=raised(caught.value)))


def test_fields_of_the_core_cannot_be_replaced() -> None:
    record = written("x", node_id="node-9", level="loud")
    assert (record["node_id"], record["level"]) == ("node-1", "info")
    assert (record["extra.node_id"], record["extra.level"]) == ("node-9", "loud")


def test_the_end_of_a_long_stack_trace_is_kept() -> None:
    error = ValueError("last")
    cause: BaseException = error
    for _ in range(30):
        cause.__cause__ = ValueError("x" * 900)
        cause = cause.__cause__
    trace = written("x", exc_info=raised(error))["error.stack_trace"]
    assert trace.endswith("ValueError: last")
    assert trace.startswith("[cut: ")
    assert len(trace) < 17_000


def test_a_line_too_long_as_a_whole_keeps_its_core() -> None:
    fields = {f"field-{i}": "x" * 4_000 for i in range(40)}
    record = written("y" * 4_000, request_id="r-1", exc_info=raised(ValueError("bad")), **fields)
    assert set(record) == {*CORE_FIELDS, "request_id", "error.type", "error.message", "truncated"}
    assert record["error.message"] == "bad"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)
names = st.text(min_size=1, max_size=20).filter(lambda name: name not in logging.makeLogRecord({}).__dict__)


@given(st.text(), st.dictionaries(names, values, max_size=5))
def test_any_record_is_one_line_of_json(message: str, fields: dict[str, object]) -> None:
    record = written(message, **{k: v for k, v in fields.items() if k not in ("exc_info", "message")})
    assert list(record)[:5] == list(CORE_FIELDS)


@given(st.text(), st.dictionaries(names, values, max_size=3))
def test_no_plain_line_holds_a_control_character(message: str, fields: dict[str, object]) -> None:
    core = {"name": "x", "levelno": 20, "levelname": "INFO", "msg": message}
    line = plain_formatter("node-1", with_colour=False).format(logging.makeLogRecord({**fields, **core}))
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line)


def test_a_plain_line_is_followed_by_its_stack_trace() -> None:
    core = {
        "name": "x",
        "levelno": 40,
        "levelname": "ERROR",
        "msg": "failed",
        "exc_info": raised(ValueError("\x1b[2J")),
    }
    first, *rest = plain_formatter("node-1", with_colour=False).format(logging.makeLogRecord(core)).split("\n")
    assert first.endswith('failed error.type=ValueError error.message="\\u001b[2J"')
    assert rest[0].startswith("Traceback")
    assert "\x1b" not in "".join(rest)


def test_the_page_names_every_field_and_limit() -> None:
    page = " ".join(PAGE.read_text().split())
    errors = set(written("x", exc_info=raised(ValueError()))) - set(CORE_FIELDS)
    for name in (*CORE_FIELDS, *errors, "truncated", LOSS_MESSAGE):
        assert f"`{name}`" in page, name
    assert f"exceed {ROTATE_BYTES // 1_000_000} MB" in page
    assert f"to `.{ROTATED_FILES}`" in page
    assert f"at most {2 * (ROTATED_FILES + 1) * ROTATE_BYTES // 1_000_000} MB" in page
    assert f"{LINE_BYTES_MAX // 1024} KiB" in page
    assert f"cut at {FIELD_CHARS_MAX:,} characters" in page
    assert f"last {STACK_TRACE_CHARS_MAX:,}" in page
    assert f"queue of {QUEUE_RECORDS_MAX:,}" in page
    assert f"at most {STOP_TIMEOUT_S:g} s" in page
