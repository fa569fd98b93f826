import base64
import dataclasses
import errno
import os
from pathlib import Path

import pytest

from mesh.gossip_types import GossipConfig
from mesh.seal import DEVELOPMENT_KEY
from mesh.state import encode_load, encode_profile
from mesh.view import EMBEDDING, Address, ModelInfo, ModelLoad, NodeLoad, NodeProfile, Readiness
from nodes.config import (
    MODEL_NAME_BYTES_MAX,
    MODELS_MAX,
    ConfigInvalid,
    NodeConfig,
    is_loopback,
    load_config,
    parse_address,
)
from nodes.engine.model_loader import FINGERPRINT_HEX_CHARS
from nodes.gossip_settings import GossipSettings


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('slots = 2\nqueue = 3\nname = "from-file"\n')
    config = load_config(file, {"AI_CLUSTER_SLOTS": "4", "AI_CLUSTER_QUEUE": "5"}, {"slots": 6})
    assert (config.slots, config.queue, config.name) == (6, 5, "from-file")


def test_lists_are_comma_separated_in_the_environment() -> None:
    config = load_config(None, {"AI_CLUSTER_JOIN": "10.0.0.1:7946, 10.0.0.2:7946"}, {})
    assert config.join == (Address("10.0.0.1", 7946), Address("10.0.0.2", 7946))


@pytest.mark.parametrize(
    ("toml", "environment", "flags", "words"),
    [
        ("slotz = 2", {}, {}, ["slotz", "did you mean slots", "node.toml"]),
        ("", {"AI_CLUSTER_SLOTZ": "2"}, {}, ["AI_CLUSTER_SLOTZ", "environment", "slots"]),
        ("slots = 0", {}, {}, ["slots = 0", "greater than or equal to 1", "node.toml"]),
        ("", {"AI_CLUSTER_SLOTS": "many"}, {}, ["slots = 'many'", "environment", "integer"]),
        ("", {}, {"http": "8080"}, ["http = '8080'", "HOST:PORT", "command line"]),
        ("", {}, {"join": ["nowhere"]}, ["join", "HOST:PORT", "127.0.0.1:7946"]),
        ("slots = true", {}, {}, ["slots = true", "node.toml", "a whole number"]),
        ('slots = "8"', {}, {}, ["slots = '8'", "node.toml", "a whole number, without quotes"]),
        ("queue = 8.0", {}, {}, ["queue = 8.0", "a whole number"]),
        ('deadline_s = "8"', {}, {}, ["deadline_s = '8'", "a number, without quotes"]),
        ("deadline_s = true", {}, {}, ["deadline_s = true", "a number"]),
        ("hedge = 1", {}, {}, ["hedge = 1", "true or false"]),
        ('open = "yes"', {}, {}, ["open = 'yes'", "true or false"]),
        ('[gossip]\nconfirmations = "1"', {}, {}, ["gossip.confirmations = '1'", "node.toml", "a whole number"]),
        ("slots = ", {}, {}, ["node.toml", "TOML"]),
        ("", {}, {"provider": "tpu"}, ["provider = 'tpu'", "cuda"]),
        ("", {}, {"name": "two words"}, ["name = 'two words'"]),
    ],
)
def test_a_bad_configuration_is_one_line_that_names_key_value_and_source(
    tmp_path: Path, toml: str, environment: dict[str, str], flags: dict[str, object], words: list[str]
) -> None:
    file = tmp_path / "node.toml"
    file.write_text(toml)
    with pytest.raises(ConfigInvalid) as raised:
        load_config(file, environment, flags)
    message = str(raised.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_texts_of_the_environment_are_read_as_numbers_and_whole_numbers_of_a_file_as_seconds(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("deadline_s = 8\nslots = 4\nspinning = false\n[gossip]\nprobe_interval_s = 2\n")
    environment = {"AI_CLUSTER_QUEUE": "7", "AI_CLUSTER_HEDGE": "true", "AI_CLUSTER_GOSSIP_CONFIRMATIONS": "1"}
    config = load_config(file, environment, {})
    assert (config.deadline_s, config.slots, config.spinning, config.gossip.probe_interval_s) == (8.0, 4, False, 2.0)
    assert (config.queue, config.hedge, config.gossip.confirmations) == (7, True, 1)


def test_a_missing_configuration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"absent\.toml: No such file"):
        load_config(tmp_path / "absent.toml", {}, {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8080",
        "host",
        ":8080",
        "host:",
        "host:port",
        "host:70000",
        "host:-1",
        "http://a:1",
        "a b:1",
        "x:y:1",
        "127.0.0.1:1:1",
        "a..b:1",
        "a\x00b:1",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(text)


def test_a_password_before_what_is_no_address_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="'node:x' is no HOST:PORT") as caught:
        parse_address("https://me:secret@node:x")
    assert "secret" not in str(caught.value)


def test_an_address_survives_its_own_text() -> None:
    for address in (
        Address("::1", 80),
        Address("fe80::1%eth0", 80),
        Address("10.1.2.3", 7946),
        Address("node.example", 1),
    ):
        assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("x.y", False)],
)
def test_loopback_is_told_from_the_rest(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_mesh_on_loopback_runs_under_the_development_key() -> None:
    assert NodeConfig().cluster_key() == DEVELOPMENT_KEY


def test_a_mesh_off_loopback_needs_a_key() -> None:
    with pytest.raises(ConfigInvalid, match="keyring new"):
        load_config(None, {}, {"mesh": "0.0.0.0:7946"}).cluster_key()


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    key = bytes(range(32))
    text = base64.b64encode(key).decode()
    file = tmp_path / "cluster.key"
    file.write_text(text + "\n")
    assert load_config(None, {}, {"cluster_key_file": file}).cluster_key() == key
    assert load_config(None, {"AI_CLUSTER_KEY": text}, {}).cluster_key() == key


@pytest.mark.parametrize("text", ["", "short", base64.b64encode(b"x" * 16).decode()])
def test_a_bad_key_is_refused_without_being_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigInvalid) as raised:
        load_config(None, {"AI_CLUSTER_KEY": text}, {}).cluster_key()
    assert "AI_CLUSTER_KEY" in str(raised.value)
    assert not text or text not in str(raised.value)


def test_a_missing_key_file_is_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"absent\.key.*keyring new"):
        load_config(None, {}, {"cluster_key_file": tmp_path / "absent.key"}).cluster_key()


def test_a_key_file_that_may_not_be_read_is_not_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    config = load_config(None, {}, {"cluster_key_file": tmp_path / "cluster.key"})
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigInvalid) as raised:
        config.cluster_key()
    assert str(raised.value).endswith("cluster.key: Permission denied; let the user that the node runs as read it")


def test_models_are_named_by_their_folder_or_as_given() -> None:
    config = load_config(None, {}, {"model": ["/models/llama", "/other/llama=second"]})
    assert config.models() == [("llama", Path("/models/llama")), ("second", Path("/other/llama"))]


def test_one_model_name_for_two_folders_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="given twice"):
        load_config(None, {}, {"model": ["/models/llama", "/other/llama"]}).models()


def test_more_models_than_gossip_can_tell_of_are_refused() -> None:
    with pytest.raises(ConfigInvalid, match="at most"):
        load_config(None, {}, {"model": [f"/models/{i}" for i in range(MODELS_MAX + 1)]}).models()
    with pytest.raises(ConfigInvalid, match="bytes"):
        load_config(None, {}, {"model": ["/models/a=" + "x" * 65]}).models()


def test_what_gossip_tells_of_the_most_models_fits_a_section() -> None:
    model = ModelInfo("x" * MODEL_NAME_BYTES_MAX, "f" * FINGERPRINT_HEX_CHARS, 10**7, 256, 100_000, EMBEDDING)
    encode_profile(NodeProfile("[" + "f" * 39 + "]:65535", "0.1.0.dev12345", (model,) * MODELS_MAX))
    load = ModelLoad(256, 100_000, 256, 123456.789, 123456.789, 2**40, 10**8, 1.0, 1.0, 1.0, 256.0)
    names = [f"{i}".ljust(MODEL_NAME_BYTES_MAX, "x") for i in range(MODELS_MAX)]
    encode_load(NodeLoad(Readiness.READY, 10**6, 123456.7, 12.3, dict.fromkeys(names, load)))


def test_an_entry_without_models_cannot_be_given_one() -> None:
    with pytest.raises(ConfigInvalid, match="contradict"):
        load_config(None, {}, {"model": ["/models/llama"], "no_model": True}).models()


def test_every_key_is_on_the_configuration_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    assert [key for key in NodeConfig.model_fields if f"`{key}`" not in page] == []


def test_every_gossip_key_is_on_the_configuration_page_and_in_the_protocols_parameters() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    assert [key for key in GossipSettings.model_fields if f"`{key}`" not in page] == []
    assert GossipSettings().config() == GossipConfig()
    assert set(GossipSettings.model_fields) == {field.name for field in dataclasses.fields(GossipConfig)}


def test_the_gossip_table_is_read_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("[gossip]\nprobe_interval_s = 2.0\npacket_burst = 90\n")
    gossip = load_config(file, {"AI_CLUSTER_GOSSIP_PROBE_INTERVAL_S": "1.5"}, {}).gossip.config()
    assert (gossip.probe_interval_s, gossip.packet_burst, gossip.stall_s) == (1.5, 90, 0.5)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        pytest.param("probe_intervall_s = 2.0", ["probe_intervall_s", "did you mean probe_interval_s"], id="typo"),
        pytest.param("confirmations = 3", ["gossip.confirmations = 3", "less than or equal to 2"], id="out of bounds"),
        pytest.param("probe_interval_s = true", ["gossip.probe_interval_s = true", "write a number"], id="no number"),
        pytest.param("packet_burst = 6", ["packet_burst = 6", "3 times packet_reserve"], id="nothing left to publish"),
        pytest.param("verdict_timeout_s = 0.3", ["at least 2 times direct_timeout_s"], id="a contradiction"),
    ],
)
def test_a_bad_gossip_key_is_named(tmp_path: Path, table: str, words: list[str]) -> None:
    file = tmp_path / "node.toml"
    file.write_text(f"[gossip]\n{table}\n")
    with pytest.raises(ConfigInvalid) as caught:
        load_config(file, {}, {})
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:4318",
        "https://otlp.example.org",
        "https://otlp.example.org:443/otlp/v1/traces",
        "http://[::1]:1",
    ],
)
def test_an_endpoint_of_a_collector_is_a_url(endpoint: str) -> None:
    assert load_config(None, {}, {"tracing_endpoint": endpoint}).tracing_endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint",
    [
        "127.0.0.1:4318",
        "grpc://x:4317",
        "http://",
        "http://x:99999",
        "http://me:pw@x",
        "http://x/?token=t",
        "http://x/#a",
    ],
)
def test_anything_else_is_refused_as_an_endpoint(endpoint: str) -> None:
    with pytest.raises(ConfigInvalid, match="an endpoint is http://HOST:PORT"):
        load_config(None, {}, {"tracing_endpoint": endpoint})


def test_the_headers_of_a_collector_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "headers"
    file.write_text("Authorization: Basic abc==\n\n  x-scope-orgid:one \n")
    expected = {"authorization": "Basic abc==", "x-scope-orgid": "one"}
    assert load_config(None, {}, {"tracing_headers_file": file}).collector_headers() == expected
    environment = {"AI_CLUSTER_TRACING_HEADERS": "authorization: Basic abc==\nx-scope-orgid: one"}
    config = load_config(None, environment, {})
    assert config.collector_headers() == expected
    assert "abc" not in repr(config)
    assert load_config(None, {}, {}).collector_headers() == {}


@pytest.mark.parametrize("line", ["a secret", "na me: secret", "name:", ": secret", "name: sec\x00ret", "name: sécret"])
def test_a_line_that_is_no_header_is_named_and_not_quoted(tmp_path: Path, line: str) -> None:
    file = tmp_path / "headers"
    file.write_text(f"good: value\n{line}\n")
    with pytest.raises(ConfigInvalid, match="line 2") as raised:
        load_config(None, {}, {"tracing_headers_file": file}).collector_headers()
    assert "cret" not in str(raised.value)
    with pytest.raises(ConfigInvalid, match="No such file"):
        load_config(None, {}, {"tracing_headers_file": tmp_path / "absent"}).collector_headers()


@pytest.mark.parametrize("name", ["URL", "CA_FILE", "API_KEY"])
def test_variables_of_the_commands_are_none_of_a_nodes(name: str) -> None:
    load_config(None, {f"AI_CLUSTER_{name}": "what commands read"}, {})
