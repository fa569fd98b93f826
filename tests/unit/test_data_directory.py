from pathlib import Path

import pytest

from nodes.config import ConfigInvalid
from nodes.data_directory import DataDirectory, write_durably


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
