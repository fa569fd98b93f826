import queue
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from observability.log_files import ROTATED_FILES, RotatingFile
from observability.log_writer import WriterThread

# The writer's thread.


class GatedSink:
    """Holds the thread at its first item until `gate` is set."""

    def __init__(self) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()
        self.items: list[object] = []
        self.losses: list[int] = []
        self.is_closed = False

    def write(self, item: object) -> int:
        self.entered.set()
        assert self.gate.wait(30)
        self.items.append(item)
        return 0

    def write_loss(self, count: int) -> None:
        self.losses.append(count)

    def flush(self) -> int:
        return 0

    def close(self) -> None:
        self.is_closed = True


@contextmanager
def stuck_writer(queue_items_max: int) -> Iterator[tuple[WriterThread[object], GatedSink]]:
    """A writer whose thread holds item 0, with an empty queue behind it."""
    sink = GatedSink()
    writer = WriterThread("stuck", sink, queue_items_max)
    writer.start()
    writer.offer(0)
    assert sink.entered.wait(30)
    yield writer, sink
    sink.gate.set()
    writer.stop()


def test_a_full_queue_drops_and_counts_and_the_loss_is_told_once() -> None:
    with stuck_writer(3) as (writer, sink):
        for item in range(1, 11):
            writer.offer(item)
        assert writer.lines_dropped == 7
    assert sink.items == [0, 1, 2, 3]
    assert sink.losses == [7]
    assert sink.is_closed


def test_what_is_offered_after_the_end_is_counted() -> None:
    with stuck_writer(3) as (writer, sink):
        pass
    writer.offer("late")
    assert writer.lines_dropped == 1
    assert sink.items == [0]


@pytest.mark.parametrize("queued", [0, 5], ids=["queue has room", "queue is full"])
def test_a_sink_that_is_stuck_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch, queued: int) -> None:
    monkeypatch.setattr("observability.log_writer.STOP_TIMEOUT_S", 0.02)
    with stuck_writer(3) as (writer, sink):
        for item in range(queued):
            writer.offer(item)
        writer.stop()
        assert not sink.is_closed


class TellingSink(GatedSink):
    """Never stuck; says when it was flushed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate.set()
        self.flushed: queue.SimpleQueue[list[object]] = queue.SimpleQueue()

    def flush(self) -> int:
        self.flushed.put(list(self.items))
        return 0


@contextmanager
def gathering_writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[WriterThread[object], TellingSink]]:
    """A writer that has flushed item 0 and would now gather for an hour, with a queue of 8 behind it."""
    monkeypatch.setattr("observability.log_writer.GATHER_S", 3600.0)
    sink = TellingSink()
    writer = WriterThread("gathering", sink, 8)
    writer.start()
    writer.offer(0)
    assert sink.flushed.get(timeout=30) == [0]
    yield writer, sink
    writer.stop()


def test_what_is_urgent_is_written_at_once_with_what_came_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with gathering_writer(monkeypatch) as (writer, sink):
        writer.offer(1)
        writer.offer(2, is_urgent=True)
        assert sink.flushed.get(timeout=30) == [0, 1, 2]


def test_a_queue_that_is_half_full_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with gathering_writer(monkeypatch) as (writer, sink):
        for item in range(1, 5):
            writer.offer(item)
        assert sink.flushed.get(timeout=30)[:5] == [0, 1, 2, 3, 4]


def test_the_end_does_not_wait_for_more_to_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    with gathering_writer(monkeypatch) as (writer, sink):
        writer.offer(1)
        writer.stop()
        assert sink.is_closed
    assert sink.items == [0, 1]


# The files.


def test_a_file_is_rotated_by_size_and_the_youngest_lines_are_kept(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "x.log", rotate_bytes=100)
    for number in range(200):
        assert file.write(b"line %03d\n" % number) == 0
        if number % 7 == 0:
            file.flush()
    file.flush()
    file.close()
    names = [f"x.log.{age}" for age in range(ROTATED_FILES, 0, -1)] + ["x.log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    texts = [(tmp_path / name).read_text() for name in names]
    assert all(len(text) <= 100 for text in texts)
    numbers = [int(line.split()[1]) for text in texts for line in text.splitlines()]
    assert numbers == list(range(200 - len(numbers), 200))


def test_a_line_longer_than_a_file_is_written_all_the_same(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "x.log", rotate_bytes=10)
    for line in (b"a" * 50 + b"\n", b"b\n"):
        file.write(line)
    file.flush()
    file.close()
    assert (tmp_path / "x.log.1").read_bytes() == b"a" * 50 + b"\n"
    assert (tmp_path / "x.log").read_bytes() == b"b\n"


def move_away(path: Path) -> None:
    path.rename(path.with_name("moved"))


def remove_folder(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()


def truncate(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("happen", [move_away, remove_folder, truncate])
def test_a_file_touched_from_outside_is_written_on(tmp_path: Path, happen: Any) -> None:
    path = tmp_path / "logs" / "x.log"
    file = RotatingFile(path)
    file.write(b"before\n")
    file.flush()
    happen(path)
    file.write(b"after\n")
    assert file.flush() == 0
    file.close()
    assert path.read_bytes() == b"after\n"


def test_of_two_processes_one_rotates_and_the_other_follows(tmp_path: Path) -> None:
    one, two = (RotatingFile(tmp_path / "x.log", rotate_bytes=20) for _ in range(2))
    for number in range(4):
        for file in (one, two):
            file.write(b"line %d\n" % number)
            file.flush()
    one.close()
    two.close()
    texts = [path.read_bytes() for path in tmp_path.iterdir()]
    assert all(len(text) <= 20 + len(b"line 0\n") for text in texts)  # what the other wrote since the last look
    assert len(texts) > 1
    assert sorted(b"".join(texts).split()[1::2]) == [b"0", b"0", b"1", b"1", b"2", b"2", b"3", b"3"]


@contextmanager
def files_end_at(size_bytes: int) -> Iterator[None]:
    """The operating system takes no more than this into any file of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_the_disk_does_not_take_are_counted_and_the_next_is_whole(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "x.log")
    file.write(b"a" * 30 + b"\n")
    file.write(b"b" * 30 + b"\n")
    with files_end_at(40):
        assert file.flush() == 2
    file.write(b"whole\n")
    assert file.flush() == 0
    file.close()
    assert (tmp_path / "x.log").read_bytes() == b"a" * 30 + b"\n" + b"b" * 9 + b"\nwhole\n"
