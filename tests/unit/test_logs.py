import io
import json
import logging
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import structlog

from observability.log_files import ROTATED_FILES
from observability.log_lines import CORE_FIELDS
from observability.logs import LOSS_MESSAGE, QUEUE_RECORDS_MAX, LogMerger, configure_logging
from tests.unit.test_log_lines import raised


def read(log_dir: Path, name: str = "combined.log") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log_dir / name).read_text().splitlines()]


# A process that logs.


def test_both_files_exist_before_the_first_line(tmp_path: Path) -> None:
    with configure_logging(tmp_path / "logs", "node-1"):
        assert (tmp_path / "logs" / "combined.log").read_bytes() == b""
        assert (tmp_path / "logs" / "error.log").read_bytes() == b""


def test_a_line_has_the_core_fields_and_then_what_the_caller_gave(tmp_path: Path) -> None:
    with configure_logging(tmp_path, "node-1"):
        logging.getLogger("nodes.api").warning("took %d tries", 3, extra={"http.route": "/v1", "duration_ms": 1.5})
    (record,) = read(tmp_path)
    assert list(record) == [*CORE_FIELDS, "http.route", "duration_ms"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("@timestamp"))
    assert record == {
        "level": "warning",
        "message": "took 3 tries",
        "logger": "nodes.api",
        "node_id": "node-1",
        "http.route": "/v1",
        "duration_ms": 1.5,
    }


def test_errors_are_in_both_files_and_nothing_else_is_in_error_log(tmp_path: Path) -> None:
    with configure_logging(tmp_path, "node-1", "debug"):
        for level in ("debug", "info", "warning", "error", "critical"):
            getattr(logging.getLogger("nodes.x"), level)(level)
    assert [record["level"] for record in read(tmp_path)] == ["debug", "info", "warning", "error", "critical"]
    assert [record["level"] for record in read(tmp_path, "error.log")] == ["error", "critical"]


@pytest.mark.parametrize(
    ("level", "name", "logged"),
    [
        ("info", "mesh.gossip", "info"),
        ("warning", "nodes.api", "warning"),
        ("error", "observability", "error"),
        ("debug", "nodes.node", "debug"),
        ("debug", "hpack", "info"),  # at debug it tells headers
        ("warning", "hypercorn.error", "warning"),
    ],
)
def test_the_least_level_is_that_configured_and_for_others_info(
    tmp_path: Path, level: str, name: str, logged: str
) -> None:
    with configure_logging(tmp_path, "node-1", level):
        for each in ("debug", "info", "warning", "error"):
            getattr(logging.getLogger(name), each)(each)
    assert read(tmp_path)[0]["level"] == logged


def test_structlog_and_stdlib_loggers_write_alike(tmp_path: Path) -> None:
    with configure_logging(tmp_path, "node-1"):
        logging.getLogger("nodes.a").info("from %s", "one", extra={"model": "demo"})
        structlog.get_logger("nodes.a").info("from %s", "one", model="demo")
    one, two = read(tmp_path)
    assert list(one) == list(two)
    assert {k: v for k, v in one.items() if k != "@timestamp"} == {k: v for k, v in two.items() if k != "@timestamp"}


def test_what_is_bound_to_the_context_is_on_the_lines_of_both(tmp_path: Path) -> None:
    with configure_logging(tmp_path, "node-1"), structlog.contextvars.bound_contextvars(trace_id="t-1"):
        logging.getLogger("nodes.a").info("one")
        logging.getLogger("nodes.a").info("two", extra={"trace_id": "t-2"})
        structlog.get_logger("nodes.a").info("three")
    assert [record["trace_id"] for record in read(tmp_path)] == ["t-1", "t-2", "t-1"]


@pytest.mark.parametrize("is_structlog", [False, True], ids=["stdlib", "structlog"])
def test_an_exception_becomes_three_fields_of_one_line(tmp_path: Path, is_structlog: bool) -> None:
    name = "nodes.engine"
    with configure_logging(tmp_path, "node-1"):
        try:
            raise ValueError("slot 9 exceeds 8")
        except ValueError:
            (structlog.get_logger(name) if is_structlog else logging.getLogger(name)).exception("step failed")
    (record,) = read(tmp_path, "error.log")
    assert record["message"] == "step failed"
    assert record["error.type"] == "ValueError"
    assert record["error.message"] == "slot 9 exceeds 8"
    assert record["error.stack_trace"].startswith("Traceback (most recent call last):\n")
    assert record["error.stack_trace"].endswith("ValueError: slot 9 exceeds 8")


def test_structlog_takes_an_exception_that_is_given(tmp_path: Path) -> None:
    with configure_logging(tmp_path, "node-1"):
        structlog.get_logger("nodes.a").error("failed", exc_info=raised(KeyError("x"))[1])
    assert read(tmp_path)[0]["error.type"] == "KeyError"


def test_arguments_are_told_as_they_were_when_logged(tmp_path: Path) -> None:
    waiting = ["a"]
    with configure_logging(tmp_path, "node-1"):
        logging.getLogger("nodes.a").info("waiting: %s", waiting)
        waiting.clear()
    assert read(tmp_path)[0]["message"] == "waiting: ['a']"


def test_arguments_that_do_not_fit_the_message_do_not_reach_the_caller(tmp_path: Path) -> None:
    with configure_logging(tmp_path, "node-1"):
        logging.getLogger("nodes.a").info("%d slots", "x")
    assert read(tmp_path)[0]["message"] == "%d slots"


class WatchedStream(io.StringIO):
    """Notes which threads write to it."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()

    def write(self, text: str) -> int:
        self.threads.add(threading.get_ident())
        return super().write(text)


def test_lines_are_made_and_written_by_another_thread(tmp_path: Path) -> None:
    stream = WatchedStream()
    with configure_logging(tmp_path, "node-1", console="json", stream=stream):
        logging.getLogger("nodes.a").info("one")
    assert stream.threads
    assert threading.get_ident() not in stream.threads


def test_the_json_console_writes_no_files(tmp_path: Path) -> None:
    stream = io.StringIO()
    with configure_logging(tmp_path / "logs", "node-1", console="json", stream=stream):
        logging.getLogger("nodes.a").info("one")
    assert json.loads(stream.getvalue())["message"] == "one"
    assert not (tmp_path / "logs").exists()


def test_the_automatic_console_is_silent_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    with configure_logging(tmp_path, "node-1", console="auto", stream=stream):
        logging.getLogger("nodes.a").info("one")
    assert stream.getvalue() == ""
    assert len(read(tmp_path)) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_colour", "has_colour"), [(None, True), ("1", False)], ids=["colour", "NO_COLOR"])
def test_a_terminal_gets_short_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_colour: str | None, has_colour: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour is not None:
        monkeypatch.setenv("NO_COLOR", no_colour)
    stream = Terminal()
    with configure_logging(tmp_path, "node-1", stream=stream):
        logging.getLogger("nodes.a").info("joined", extra={"peer": "node-2", "why": "a reason"})
    line = stream.getvalue()
    assert ("\x1b[" in line) == has_colour
    plain = re.sub(r"\x1b\[[\d;]*m", "", line)
    assert re.fullmatch(r'\d\d:\d\d:\d\d\.\d{3} info     node-1 joined peer=node-2 why="a reason"\n', plain)


def test_a_closed_terminal_costs_no_line_of_the_files(tmp_path: Path) -> None:
    stream = io.StringIO()
    with configure_logging(tmp_path, "node-1", console="plain", stream=stream) as writer:
        stream.close()
        logging.getLogger("nodes.a").info("one")
    assert [record["message"] for record in read(tmp_path)] == ["one"]
    assert writer.lines_dropped == 0


def test_a_collector_that_went_away_is_counted(tmp_path: Path) -> None:
    stream = io.StringIO()
    with configure_logging(tmp_path, "node-1", console="json", stream=stream) as writer:
        stream.close()
        logging.getLogger("nodes.a").info("one")
    assert writer.lines_dropped >= 1


class Broken:
    __slots__ = ()

    def __str__(self) -> str:
        raise RuntimeError("no")


class BrokenError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


class BrokenMapping(dict[str, object]):
    def items(self) -> Any:
        raise RuntimeError("no")


def test_a_record_that_cannot_be_written_is_told_of_and_counted_and_the_next_is_written(tmp_path: Path) -> None:
    messages = BrokenMapping(), "fine"
    with configure_logging(tmp_path, "node-1") as writer:
        for message in messages:
            logging.getLogger("nodes.a").info("x", extra={"field": message})
    told = [record["message"] for record in read(tmp_path)]
    assert sorted(told) == sorted(["a log record could not be written", "x", LOSS_MESSAGE])
    assert writer.lines_dropped == 1


def test_an_object_that_cannot_be_told_does_not_reach_the_caller(tmp_path: Path) -> None:
    with configure_logging(tmp_path, "node-1"):
        logging.getLogger("nodes.a").info(Broken())
        logging.getLogger("nodes.a").error("failed", exc_info=raised(BrokenError()))
    one, two = read(tmp_path)
    assert one["message"] == "<Broken>"
    assert two["error.message"] == "<BrokenError>"


def test_logging_is_as_before_when_the_context_ends(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.getLogger("mesh").level
    with configure_logging(tmp_path, "node-1", "debug"):
        assert root.handlers != before[0]
    assert (root.handlers[:], root.level, logging.getLogger("mesh").level) == before
    assert not structlog.is_configured()
    assert all((logging._srcfile, logging.logThreads, logging.logProcesses, logging.logMultiprocessing))
    assert "log-writer" not in {thread.name for thread in threading.enumerate()}


def test_a_folder_that_cannot_be_made_is_named_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    handlers = logging.getLogger().handlers[:]
    with pytest.raises(OSError, match="file"), configure_logging(tmp_path / "file" / "logs", "node-1"):
        pass
    assert logging.getLogger().handlers == handlers


def test_warnings_of_libraries_go_to_the_files(tmp_path: Path) -> None:
    with configure_logging(tmp_path, "node-1"):
        logging.getLogger("py.warnings").warning("%s", "deprecated")
    assert read(tmp_path)[0]["logger"] == "py.warnings"


def test_the_loss_of_log_lines_is_in_the_log(tmp_path: Path) -> None:
    lock = threading.Lock()

    class SlowStream(io.StringIO):
        def write(self, text: str) -> int:
            with lock:
                return super().write(text)

    with configure_logging(tmp_path, "node-1", console="json", stream=(stream := SlowStream())) as writer:
        with lock:
            for _ in range(QUEUE_RECORDS_MAX + 50):
                logging.getLogger("nodes.a").info("x")
            assert 49 <= writer.lines_dropped <= 50
        dropped = writer.lines_dropped
    last = json.loads(stream.getvalue().splitlines()[-1])
    assert (last["message"], last["level"], last["count"]) == (LOSS_MESSAGE, "warning", dropped)


def test_rotation_is_at_work_in_a_configured_process(tmp_path: Path) -> None:
    with configure_logging(tmp_path, "node-1", rotate_bytes=1_000):
        for number in range(60):
            logging.getLogger("nodes.a").error("line %d", number)
    for name in ("combined.log", "error.log"):
        assert (tmp_path / f"{name}.{ROTATED_FILES}").stat().st_size <= 1_000
        assert read(tmp_path, name)[-1]["message"] == "line 59"


def test_lines_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    for run in ("first", "second"):
        with configure_logging(tmp_path, "node-1"):
            logging.getLogger("nodes.a").info(run)
    assert [record["message"] for record in read(tmp_path)] == ["first", "second"]


# A parent that merges the lines of its children.


def line_of(level: str, message: str = "x") -> bytes:
    core = {"@timestamp": "2026-01-01T00:00:00.000Z", "level": level, "message": message, "logger": "a"}
    return json.dumps({**core, "node_id": "node-2"}).encode()


def test_lines_of_children_are_written_as_they_are_and_errors_to_both_files(tmp_path: Path) -> None:
    lines = [line_of(level) for level in ("debug", "info", "warning", "error", "critical")]
    with LogMerger(tmp_path) as merger:
        assert (tmp_path / "error.log").read_bytes() == b""
        for line in lines:
            merger.write_line(line)
        assert merger.lines_dropped == 0
    assert (tmp_path / "combined.log").read_bytes() == b"\n".join(lines) + b"\n"
    assert (tmp_path / "error.log").read_bytes() == b"\n".join(lines[3:]) + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"Segmentation fault", id="text"),
        pytest.param(b"\xff\xfe", id="no UTF-8"),
        pytest.param(b'{"level": 3}', id="level is no word"),
        pytest.param(b'{"message": "x"}', id="no level"),
        pytest.param(b'["level"]', id="no object"),
        pytest.param(b'{"level": "info"', id="half an object"),
        pytest.param(b"[" * 100_000, id="deep nesting"),
        pytest.param(b"x" * 70_000, id="long"),
    ],
)
def test_a_line_that_is_no_log_line_becomes_a_warning(tmp_path: Path, line: bytes) -> None:
    with LogMerger(tmp_path) as merger:
        merger.write_line(line + b"\r\n", "node-3")
    (record,) = read(tmp_path)
    assert set(record) == set(CORE_FIELDS)
    assert (record["level"], record["logger"], record["node_id"]) == ("warning", "stderr", "node-3")
    assert record["message"][:4_000] == line.decode(errors="replace")[:4_000]


def test_what_a_child_logs_is_what_its_parent_merges(tmp_path: Path) -> None:
    stream = io.StringIO()
    with configure_logging(tmp_path / "none", "node-2", console="json", stream=stream):
        logging.getLogger("nodes.a").error("failed", exc_info=raised(ValueError("bad\nvalue")))
    with LogMerger(tmp_path) as merger:
        for line in stream.getvalue().encode().splitlines():
            merger.write_line(line)
    (record,) = read(tmp_path, "error.log")
    assert record["error.message"] == "bad\nvalue"
    assert read(tmp_path) == [record]


def test_merged_files_are_rotated(tmp_path: Path) -> None:
    with LogMerger(tmp_path, rotate_bytes=500) as merger:
        for number in range(20):
            merger.write_line(line_of("info", str(number)))
    assert read(tmp_path)[-1]["message"] == "19"
    assert (tmp_path / "combined.log.1").exists()


def test_a_merger_that_is_not_entered_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="with LogMerger"):
        LogMerger(tmp_path).write_line(b"x")
