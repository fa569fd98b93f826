from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mesh.seal import new_key
from mesh.view import Address
from nodes import cli
from nodes.config import ConfigInvalid, load_config
from nodes.config_check import check_start
from nodes.process import run_node
from nodes.sockets import bind_http, bound_address, check_distinct
from nodes.store import check_store, open_store
from tests.unit.certificates import write_certificate

Settings = dict[str, object]


def _no_model_folder(tmp_path: Path) -> Settings:
    return {"model": [str(tmp_path / "gone")]}


def _data_dir_is_a_file(tmp_path: Path) -> Settings:
    (tmp_path / "data").write_text("")
    return {}


def _data_dir_below_a_file(tmp_path: Path) -> Settings:
    (tmp_path / "file").write_text("")
    return {"data_dir": tmp_path / "file" / "data"}


def _log_dir_is_a_file(tmp_path: Path) -> Settings:
    (tmp_path / "logs").write_text("")
    return {}


def _no_cluster_key_file(tmp_path: Path) -> Settings:
    return {"cluster_key_file": tmp_path / "gone.key"}


def _cluster_key_is_none(tmp_path: Path) -> Settings:
    (tmp_path / "short.key").write_text("short")
    return {"cluster_key_file": tmp_path / "short.key"}


def _broken_keyring(tmp_path: Path) -> Settings:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "keyring").write_text("{}")
    return {}


def _short_admin_token(tmp_path: Path) -> Settings:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "admin-token").write_text("short")
    return {}


def _broken_generation(tmp_path: Path) -> Settings:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "generation").write_text("many")
    return {}


def _certificate_without_key(tmp_path: Path) -> Settings:
    return {"tls_cert_file": write_certificate(tmp_path)[0]}


def _key_of_another_certificate(tmp_path: Path) -> Settings:
    (tmp_path / "other").mkdir()
    return {"tls_cert_file": write_certificate(tmp_path)[0], "tls_key_file": write_certificate(tmp_path / "other")[1]}


def _store_of_another_program(tmp_path: Path) -> Settings:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cluster.sqlite3").write_bytes(b"no database at all" * 100)
    return {}


def _no_headers_for_the_collector(tmp_path: Path) -> Settings:
    return {"tracing_endpoint": "http://127.0.0.1:4318", "tracing_headers_file": tmp_path / "gone"}


def _http_host_that_does_not_resolve(tmp_path: Path) -> Settings:
    return {"http": "no-such-host.invalid:0"}


def _mesh_host_that_does_not_resolve(tmp_path: Path) -> Settings:
    return {"mesh": "no-such-host.invalid:0"}


def _http_address_of_another_machine(tmp_path: Path) -> Settings:
    return {"http": "192.0.2.1:0"}


def _mesh_address_of_another_machine(tmp_path: Path) -> Settings:
    return {"mesh": "192.0.2.1:0"}


def _one_port_twice(tmp_path: Path) -> Settings:
    return {"http": "127.0.0.1:7946", "mesh": "127.0.0.1:7946"}


def _one_port_of_all_addresses_and_of_one(tmp_path: Path) -> Settings:
    return {"http": "0.0.0.0:7946", "mesh": "localhost:7946"}


def _cuda_without_that_device(tmp_path: Path) -> Settings:
    return {"provider": "cuda", "device": 63}


def _advertises_nothing(tmp_path: Path) -> Settings:
    (tmp_path / "cluster.key").write_text(new_key())
    return {"mesh": "0.0.0.0:0", "cluster_key_file": tmp_path / "cluster.key"}


FAULTS = (
    _no_model_folder,
    _data_dir_is_a_file,
    _data_dir_below_a_file,
    _log_dir_is_a_file,
    _no_cluster_key_file,
    _cluster_key_is_none,
    _broken_keyring,
    _short_admin_token,
    _broken_generation,
    _certificate_without_key,
    _key_of_another_certificate,
    _store_of_another_program,
    _no_headers_for_the_collector,
    _http_host_that_does_not_resolve,
    _mesh_host_that_does_not_resolve,
    _http_address_of_another_machine,
    _mesh_address_of_another_machine,
    _one_port_twice,
    _one_port_of_all_addresses_and_of_one,
    _cuda_without_that_device,
)


def _settings(tmp_path: Path, prepare: Callable[[Path], Settings]) -> Settings:
    return {
        "http": "127.0.0.1:0",
        "mesh": "127.0.0.1:0",
        "data_dir": tmp_path / "data",
        "log_dir": tmp_path / "logs",
        "log_console": "none",
        **prepare(tmp_path),
    }


@pytest.mark.parametrize("prepare", FAULTS, ids=lambda prepare: prepare.__name__.strip("_"))
def test_the_check_says_what_the_start_says_and_makes_nothing(
    tmp_path: Path, prepare: Callable[[Path], Settings]
) -> None:
    config = load_config(None, {}, _settings(tmp_path, prepare))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigInvalid) as checked:
        check_start(config)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ConfigInvalid) as started:
        run_node(config)
    assert str(checked.value) == str(started.value)


def test_the_check_refuses_a_mesh_address_that_others_cannot_reach(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="--advertise"):
        check_start(load_config(None, {}, _settings(tmp_path, _advertises_nothing)))


def test_the_check_takes_addresses_that_a_node_has_bound(tmp_path: Path) -> None:
    with bind_http(Address("127.0.0.1", 0)) as http:
        address = str(bound_address(Address("127.0.0.1", 0), http))
        check_start(load_config(None, {}, _settings(tmp_path, lambda _: {"http": address})))


@pytest.mark.parametrize(
    "addresses",
    [("127.0.0.1:7946", "127.0.0.2:7946"), ("127.0.0.1:0", "127.0.0.1:0"), ("0.0.0.0:7946", "[::1]:7946")],
)
def test_ports_that_do_not_meet_are_taken(addresses: tuple[str, str]) -> None:
    http, mesh = addresses
    check_distinct(load_config(None, {}, {"http": http, "mesh": mesh}))


def test_the_check_takes_what_starts_and_makes_nothing(tmp_path: Path) -> None:
    check_start(load_config(None, {}, _settings(tmp_path, lambda _: {})))
    assert list(tmp_path.iterdir()) == []


async def test_the_check_leaves_nothing_beside_the_store_of_a_node_that_has_stopped(tmp_path: Path) -> None:
    async with open_store(tmp_path):
        check_store(tmp_path)  # a running node may have it open
    before = sorted(tmp_path.iterdir())
    check_store(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_fails_with_the_line_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "node.toml"
    file.write_text('tls_cert_file = "gone.pem"\ntls_key_file = "gone.key"\n')
    result = CliRunner().invoke(cli.app, ["config", "check", str(file)])
    assert result.exit_code == 2
    assert result.stderr == "ai-cluster: tls_cert_file gone.pem: No such file or directory\n"
