import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nodes.config import ConfigInvalid, load_config
from nodes.data_directory import DataDirectory, write_durably
from nodes.process import run_node

FULL = r"data_dir .*: No space left on device; free space on its disk"


def fail_as_on_a_full_disk(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_each_start_has_a_higher_generation(tmp_path: Path) -> None:
    generations = []
    for _ in range(3):
        with DataDirectory(tmp_path / "data") as data:
            generations.append(data.next_generation())
    assert generations == [1, 2, 3]


def test_a_generation_that_peers_remembered_is_kept_for_the_next_start(tmp_path: Path) -> None:
    with DataDirectory(tmp_path) as data:
        data.next_generation()
        data.keep_generation(41)
        assert data.next_generation() == 42


def test_a_second_node_in_one_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with DataDirectory(tmp_path) as data:
        with pytest.raises(ConfigInvalid, match=r"in use by process \d+"), DataDirectory(tmp_path):
            pass
        assert data.next_generation() == 1


def test_the_folder_is_free_again_after_an_exit(tmp_path: Path) -> None:
    with DataDirectory(tmp_path):
        pass
    with DataDirectory(tmp_path) as data:
        assert data.next_generation() == 1


@pytest.mark.parametrize("text", ["many", "", "-1", "9" * 23])
def test_a_generation_file_that_holds_no_generation_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation").write_text(text)
    with DataDirectory(tmp_path) as data, pytest.raises(ConfigInvalid, match="generation holds no generation number"):
        data.next_generation()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigInvalid, match="--data-dir"), DataDirectory(tmp_path / "file" / "data"):
        pass


def test_a_full_disk_is_told_when_the_folder_is_taken_hold_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as disk:
        disk.setattr(os, "write", fail_as_on_a_full_disk)
        with pytest.raises(ConfigInvalid, match=FULL), DataDirectory(tmp_path):
            pass
    with DataDirectory(tmp_path):  # the lock was let go of
        pass


@pytest.mark.parametrize("write", [DataDirectory.next_generation, DataDirectory.admin_token])
def test_a_full_disk_is_told_by_each_file_of_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[DataDirectory], object]
) -> None:
    with DataDirectory(tmp_path) as data:
        monkeypatch.setattr(os, "fsync", fail_as_on_a_full_disk)
        with pytest.raises(ConfigInvalid, match=FULL):
            write(data)


def test_a_start_on_a_full_disk_ends_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"http": "127.0.0.1:0", "mesh": "127.0.0.1:0", "data_dir": tmp_path / "data", "log_dir": tmp_path / "logs"}
    monkeypatch.setattr(os, "fsync", fail_as_on_a_full_disk)
    with pytest.raises(ConfigInvalid, match=FULL):
        run_node(load_config(None, {}, {**places, "no_model": True, "log_console": "none"}))


def test_the_admin_token_is_made_once_and_readable_by_its_user_alone(tmp_path: Path) -> None:
    with DataDirectory(tmp_path) as data:
        token = data.admin_token()
    with DataDirectory(tmp_path) as data:
        assert data.admin_token() == token
    assert (tmp_path / "admin-token").stat().st_mode & 0o777 == 0o600
    with DataDirectory(tmp_path / "other") as data:
        assert data.admin_token() != token


@pytest.mark.parametrize("content", [b"", b"short\n", b"\xff" * 40])
def test_a_damaged_admin_token_is_named_with_the_fix(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "admin-token").write_bytes(content)
    with DataDirectory(tmp_path) as data, pytest.raises(ConfigInvalid, match=r"admin-token.*delete it"):
        data.admin_token()


def test_a_secret_is_never_readable_by_others_even_where_a_killed_process_left_its_file(tmp_path: Path) -> None:
    left = tmp_path / "secret.new"
    left.write_text("half")
    left.chmod(0o666)
    write_durably(tmp_path / "secret", "whole", mode=0o600)
    assert (tmp_path / "secret").read_text() == "whole"
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert not left.exists()
