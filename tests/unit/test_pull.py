"""Pulling models from a hub, which a small server on loopback plays."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.file_download
import pytest

from nodes.model_tools import pull as pull_module
from nodes.model_tools.errors import HubUnreachable, ModelToolError
from nodes.model_tools.manifest import Manifest, read_manifest
from nodes.model_tools.pull import Pulled, pull
from nodes.model_tools.random_llama import write_random_llama
from tests.unit.fake_hub import FakeHub, FakeRepository, HubHandler, running_hub

FIRST, SECOND = "a" * 40, "b" * 40
REPO = "owner/tiny-model"


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A builder's folder whose weights are in a data file."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nodes.model_tools.llama_onnx.EMBEDDED_BYTES_MAX", 1000)
        write_random_llama(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
        yield hub


@pytest.fixture
def repository(hub: FakeHub, model_files: dict[str, bytes]) -> FakeRepository:
    files = {**model_files, "README.md": b"# tiny", "model.safetensors": b"x" * 3000, "run.py": b"print()"}
    repository = FakeRepository({FIRST: files}, {"main": FIRST})
    hub.repositories[REPO] = repository
    return repository


def pulled(out: Path, revision: str | None = None, variant: str | None = None, repo: str = REPO) -> Pulled:
    return pull(repo, revision=revision, variant=variant, out=out)


def manifest_of(out: Path) -> Manifest:
    manifest = read_manifest(out)
    assert manifest is not None
    return manifest


def test_a_pull_takes_what_a_node_needs_and_writes_where_it_came_from(
    repository: FakeRepository, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert pulled(out).downloaded_files == len(model_files)
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.name != "manifest.json"} == model_files
    content = json.loads((out / "manifest.json").read_text())
    assert (content["repo"], content["revision"], content["commit"]) == (REPO, "main", FIRST)
    expected = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in model_files.items()}
    assert {entry["file"]: (entry["size_bytes"], entry["sha256"]) for entry in content["files"]} == expected


def test_a_second_pull_checks_the_folder_and_asks_no_hub(
    hub: FakeHub, repository: FakeRepository, tmp_path: Path
) -> None:
    pulled(tmp_path)
    hub.requests.clear()
    assert pulled(tmp_path).downloaded_files == 0
    assert pulled(tmp_path, revision=FIRST).downloaded_files == 0
    assert hub.requests == []


def test_a_damaged_or_missing_file_comes_again_from_the_pinned_commit(
    hub: FakeHub, repository: FakeRepository, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    pulled(tmp_path)
    repository.commits[SECOND] = {**repository.commits[FIRST], "tokenizer_config.json": b'{"newer": 1}'}
    repository.branches["main"] = SECOND
    data = bytearray((tmp_path / "model.onnx.data").read_bytes())
    data[5000] ^= 1
    (tmp_path / "model.onnx.data").write_bytes(data)
    (tmp_path / "tokenizer_config.json").unlink()
    hub.requests.clear()
    assert pulled(tmp_path).downloaded_files == 2
    assert sorted(hub.downloads()) == ["model.onnx.data", "tokenizer_config.json"]
    assert (tmp_path / "tokenizer_config.json").read_bytes() == model_files["tokenizer_config.json"]
    assert manifest_of(tmp_path).commit == FIRST


def test_a_named_revision_moves_the_folder_to_its_commit(
    hub: FakeHub, repository: FakeRepository, tmp_path: Path
) -> None:
    pulled(tmp_path)
    repository.commits[SECOND] = {**repository.commits[FIRST], "chat_template.jinja": b"{{ messages }}"}
    repository.branches |= {"main": SECOND, "v1": FIRST}
    assert pulled(tmp_path, revision="main").downloaded_files == 1
    assert manifest_of(tmp_path).commit == SECOND
    assert pulled(tmp_path, revision="v1").downloaded_files == 0
    assert (manifest_of(tmp_path).commit, manifest_of(tmp_path).revision) == (FIRST, "v1")


def test_a_half_finished_pull_goes_on_within_the_file(
    hub: FakeHub,
    repository: FakeRepository,
    model_files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what a break may lose
    half = 300_000
    repository.cut["model.onnx.data"] = [half] + [0] * 9
    with pytest.raises(HubUnreachable, match="goes on where it stopped"):
        pulled(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert not (tmp_path / "model.onnx.data").exists()
    repository.cut.clear()
    hub.requests.clear()
    assert pulled(tmp_path).downloaded_files == 1
    ranges = [asked for _, path, asked in hub.requests if path.startswith("/storage/")]
    assert ranges == [f"bytes={half}-"]
    assert (tmp_path / "model.onnx.data").read_bytes() == model_files["model.onnx.data"]
    assert not (tmp_path / ".pull").exists()


def test_a_connection_that_breaks_once_is_not_noticed(
    repository: FakeRepository, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    repository.cut["model.onnx.data"] = [1000]
    pulled(tmp_path)
    assert (tmp_path / "model.onnx.data").read_bytes() == model_files["model.onnx.data"]


def test_a_part_that_is_not_the_hubs_is_thrown_away(
    hub: FakeHub, repository: FakeRepository, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    data = model_files["model.onnx.data"]
    (tmp_path / ".pull").mkdir()
    (tmp_path / ".pull" / f"{hashlib.sha256(data).hexdigest()}.part").write_bytes(b"?" * 5000)
    pulled(tmp_path)
    assert (tmp_path / "model.onnx.data").read_bytes() == data


def test_bytes_that_the_hub_did_not_announce_are_refused(
    monkeypatch: pytest.MonkeyPatch, repository: FakeRepository, tmp_path: Path
) -> None:
    files = repository.commits[FIRST]
    listed = {**files, "model.onnx.data": bytes(len(files["model.onnx.data"]))}
    monkeypatch.setattr("tests.unit.fake_hub.HubHandler._list", _listing(listed))
    with pytest.raises(HubUnreachable, match=r"model\.onnx\.data came with other bytes than"):
        pulled(tmp_path)
    assert not (tmp_path / "model.onnx.data").exists()


def _listing(files: dict[str, bytes]) -> Callable[[HubHandler, str, str], None]:
    """As the fake lists, with these files instead of those it has."""
    original = HubHandler._list

    def listed(self: HubHandler, repo: str, revision: str) -> None:
        found = self.fake.repositories[repo]
        kept, found.commits = found.commits, {FIRST: files}
        try:
            original(self, repo, revision)
        finally:
            found.commits = kept

    return listed


@pytest.fixture
def optimum(hub: FakeHub, model_files: dict[str, bytes]) -> FakeRepository:
    """Configuration at the top, graphs of several precisions below onnx/, one with two files of external data."""
    graph = model_files["model.onnx"]
    files = {name: model_files[name] for name in ("tokenizer.json", "tokenizer_config.json")}
    files |= {"config.json": b"{}", "generation_config.json": b"{}", "onnx/model.onnx.data": b"f" * 9000}
    files |= {f"onnx/model{name}.onnx": graph for name in ("", "_q4", "_q4f16", "_fp16", "_quantized")}
    files["onnx/model_q4.onnx"] = _renamed(graph, b"model.onnx.data", b"model_q4.onnx_d")
    files["onnx/model_q4.onnx_d"] = model_files["model.onnx.data"]
    repository = FakeRepository({FIRST: files}, {"main": FIRST})
    hub.repositories[REPO] = repository
    return repository


def _renamed(graph: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    assert old in graph
    return graph.replace(old, new)


def names(out: Path) -> list[str]:
    return sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())


def test_of_several_precisions_the_one_that_suits_a_cpu_comes_with_its_own_data_alone(
    optimum: FakeRepository, tmp_path: Path
) -> None:
    assert pulled(tmp_path).manifest.variant == "q4"
    companions = ["config.json", "generation_config.json", "manifest.json"]
    tokenizer = ["tokenizer.json", "tokenizer_config.json"]
    assert names(tmp_path) == [*companions, "onnx/model_q4.onnx", "onnx/model_q4.onnx_d", *tokenizer]


@pytest.mark.parametrize("wanted", ["fp16", "model_fp16", "onnx/model_fp16.onnx", "model_fp16.onnx"])
def test_a_variant_goes_by_name_or_by_file(optimum: FakeRepository, tmp_path: Path, wanted: str) -> None:
    assert pulled(tmp_path, variant=wanted).manifest.variant == "fp16"
    assert "onnx/model_fp16.onnx" in names(tmp_path)
    assert "onnx/model_q4.onnx" not in names(tmp_path)


def test_a_second_variant_joins_the_first(hub: FakeHub, optimum: FakeRepository, tmp_path: Path) -> None:
    pulled(tmp_path)
    assert pulled(tmp_path, variant="fp16").downloaded_files == 2
    assert {entry.file for entry in manifest_of(tmp_path).files} == {*names(tmp_path)} - {"manifest.json"}
    (tmp_path / "onnx/model_q4.onnx").unlink()
    assert pulled(tmp_path).downloaded_files == 1
    assert (tmp_path / "onnx/model_q4.onnx").exists()


def test_an_unknown_variant_is_refused_with_those_there_are(optimum: FakeRepository, tmp_path: Path) -> None:
    with pytest.raises(ModelToolError, match="no variant 'q2'; choose one of: fp32, fp16, q4, q4f16, quantized"):
        pulled(tmp_path, variant="q2")


def test_a_builders_folder_below_the_top_becomes_the_model_folder(
    hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    tokenizer = model_files["tokenizer.json"]
    own = {name: data for name, data in model_files.items() if name != "tokenizer.json"}
    files = {f"cpu/int4/{name}": data for name, data in own.items()}
    files |= {f"cuda/fp16/{name}": data for name, data in own.items()} | {"tokenizer.json": tokenizer}
    hub.repositories[REPO] = FakeRepository({FIRST: files}, {"main": FIRST})
    assert pulled(tmp_path / "out").manifest.variant == "cpu/int4"
    assert names(tmp_path / "out") == sorted([*model_files, "manifest.json"])
    assert pulled(tmp_path / "gpu", variant="cuda/fp16").manifest.variant == "cuda/fp16"


@pytest.mark.parametrize("location", ["../../stolen.data", "/etc/model.data", "other.onnx.data"])
def test_weights_outside_the_repositorys_folder_are_refused(
    hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path, location: str
) -> None:
    graph = _renamed(model_files["model.onnx"], b"model.onnx.data", location.encode().ljust(15, b"x")[:15])
    hub.repositories[REPO] = FakeRepository({FIRST: {**model_files, "model.onnx": graph}}, {"main": FIRST})
    with pytest.raises(ModelToolError, match="has weights in"):
        pulled(tmp_path / "out")
    assert names(tmp_path) == sorted(name for name in names(tmp_path) if name.startswith("out/"))


def test_a_repository_without_a_graph_says_where_to_look(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories[REPO] = FakeRepository({FIRST: {"config.json": b"{}", "model.safetensors": b"x"}}, {"main": FIRST})
    with pytest.raises(ModelToolError, match=r"no ONNX graph .*onnx-community.*models build"):
        pulled(tmp_path)


def test_a_repository_that_is_not_there_is_named(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelToolError, match=r"has no repository owner/tiny-model.* HF_TOKEN") as caught:
        pulled(tmp_path)
    assert not isinstance(caught.value, HubUnreachable)


def test_a_private_repository_needs_the_token_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, repository: FakeRepository, tmp_path: Path
) -> None:
    repository.token = "hf_secret"
    with pytest.raises(ModelToolError, match="HF_TOKEN"):
        pulled(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert pulled(tmp_path).downloaded_files > 0


def test_a_gated_repository_says_so(repository: FakeRepository, tmp_path: Path) -> None:
    repository.is_gated = True
    with pytest.raises(ModelToolError, match="is gated: accept its terms"):
        pulled(tmp_path)


def test_an_unknown_revision_is_named(repository: FakeRepository, tmp_path: Path) -> None:
    with pytest.raises(ModelToolError, match="no revision 'v9'; leave --revision out"):
        pulled(tmp_path, revision="v9")


@pytest.mark.parametrize("name", ["a/b/c", "-x-", "white space/x"])
def test_what_is_no_repository_name_is_refused(hub: FakeHub, tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelToolError, match="no repository name"):
        pulled(tmp_path, repo=name)
    assert hub.requests == []


def test_a_hub_that_fails_and_one_that_is_away_are_network_trouble(
    hub: FakeHub, repository: FakeRepository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.broken = 500
    with pytest.raises(HubUnreachable, match="answered 500"):
        pulled(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubUnreachable, match=r"http://127\.0\.0\.1:1 cannot be reached"):
        pulled(tmp_path)


def test_an_endpoint_that_is_no_url_is_no_network_trouble(
    repository: FakeRepository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(ModelToolError, match=r"HF_ENDPOINT is 'hub\.example', and should be a URL"):
        pulled(tmp_path)


@pytest.mark.parametrize("body", [b"<html>Please log in</html>", b"[1]"])
def test_a_portal_that_answers_in_the_hubs_place_is_named(
    repository: FakeRepository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: bytes
) -> None:
    monkeypatch.setattr(HubHandler, "_list", lambda self, repo, revision: self._send(body, {}))
    with pytest.raises(ModelToolError, match="does not answer as a model hub does"):
        pulled(tmp_path / "out")


def test_a_server_without_the_hubs_paths_is_no_hub(hub: FakeHub, repository: FakeRepository, tmp_path: Path) -> None:
    hub.broken = 404
    with pytest.raises(ModelToolError, match=r"answered 404 .* is HF_ENDPOINT a model hub\?") as caught:
        pulled(tmp_path / "out")
    assert not isinstance(caught.value, HubUnreachable)
    assert not (tmp_path / "out").exists(), "a pull that brought nothing leaves nothing"


def test_offline_mode_is_named_as_the_reason(
    repository: FakeRepository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelToolError, match="HF_HUB_OFFLINE is set"):
        pulled(tmp_path)


def test_a_disk_without_room_is_refused_before_the_weights_come(
    hub: FakeHub, repository: FakeRepository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=pull_module.DISK_RESERVE_BYTES + 300_000)
    monkeypatch.setattr("nodes.model_tools.pull.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ModelToolError, match=r"MB are to come, and 0 MB are free there; .*--out"):
        pulled(tmp_path)
    assert "model.onnx.data" not in hub.downloads()


def test_a_disk_that_fills_while_bytes_come_is_one_line(
    repository: FakeRepository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nodes.model_tools.hub.http_get", full)
    with pytest.raises(ModelToolError, match="No space left on device; free space"):
        pulled(tmp_path)


def test_a_folder_of_something_else_is_left_alone(repository: FakeRepository, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"jpg")
    with pytest.raises(ModelToolError, match="holds files that no pull put there"):
        pulled(tmp_path)
    assert names(tmp_path) == ["holiday.jpg"]


def test_a_folder_holds_one_repository(repository: FakeRepository, tmp_path: Path) -> None:
    pulled(tmp_path)
    with pytest.raises(ModelToolError, match="holds owner/tiny-model; give other/model another folder"):
        pulled(tmp_path, repo="other/model")


def test_what_says_how_an_embedding_model_pools_comes_with_its_graph(optimum: FakeRepository, tmp_path: Path) -> None:
    files = {"modules.json": b"[]", "1_Pooling/config.json": b"{}", "2_Dense/model.safetensors": b"weights"}
    optimum.commits[FIRST] |= files
    pulled(tmp_path)
    assert (tmp_path / "1_Pooling" / "config.json").read_bytes() == b"{}"
    assert (tmp_path / "modules.json").read_bytes() == b"[]"
    assert not (tmp_path / "2_Dense").exists()
