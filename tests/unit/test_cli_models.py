"""The `models` commands as they are typed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from click.testing import Result
from typer.testing import CliRunner

from nodes import cli
from nodes.cli_models import models_app
from nodes.engine.errors import EngineFault
from nodes.engine.model_loader import load_model, read_model_folder
from nodes.model_tools import inspect_folder
from nodes.model_tools.build import build
from nodes.model_tools.builder_environment import CommandFailed
from nodes.model_tools.random_encoder import write_random_encoder
from nodes.model_tools.random_llama import write_random_llama
from tests.unit.fake_hub import FakeRepository, running_hub

runner = CliRunner()
COMMIT = "a" * 40
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def models(*arguments: str) -> Result:
    return runner.invoke(cli.app, ["models", *arguments])


def one_line(result: Result, exit_code: int) -> str:
    """What stands on stderr, which has to be one line."""
    assert result.exit_code == exit_code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ai-cluster: ")
    return lines[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_llama(tmp_path_factory.mktemp("models") / "tiny", precision="int4")


def test_check_prints_what_the_folder_is_and_what_a_short_run_gave(tiny: Path) -> None:
    result = models("check", str(tiny), "--provider", "cpu", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    rows = {line[:12].strip(): line[13:] for line in result.stdout.splitlines()}
    assert rows["name"] == "tiny"
    assert rows["format"] == "genai (shared KV), model.onnx"
    assert rows["precision"] == "int4 block 32"
    assert rows["context"] == "512 tokens"
    assert rows["vocabulary"] == "512 tokens, ends with 2"
    assert rows["template"] == "tokenizer_config.json"
    assert rows["fingerprint"] == load_model(read_model_folder(tiny)).fingerprint
    # Two layers, keys and values, two heads of 16 floats, 512 rows.
    assert rows["KV per slot"] == f"{2 * 2 * 2 * 16 * 4 * 512 / 1000:.3g} kB at 512 tokens"
    assert float(rows["speed"].split()[0]) > 0
    assert len(rows["it says"]) > 2


def test_check_of_an_embedding_model_says_how_its_vectors_are_made(tmp_path: Path) -> None:
    folder = write_random_encoder(tmp_path / "encoder", pooling="cls_token")
    result = models("check", str(folder), "--provider", "cpu", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    rows = {line[:12].strip(): line[13:] for line in result.stdout.splitlines()}
    assert rows["format"] == "embedding, model.onnx"
    assert (rows["context"], rows["pooling"], rows["dimensions"]) == ("64 tokens", "cls, length 1", "32")
    assert rows["batches"] == "yes"
    assert rows["it says"].startswith("they are alike by")
    listed = models("list", "--dir", str(tmp_path))
    assert listed.exit_code == 0
    assert "embedding" in listed.stdout
    (folder / "1_Pooling" / "config.json").write_text("{}")
    assert "1_Pooling/config.json asks for none" in one_line(models("check", str(folder)), 2)


def test_check_without_loading_still_reads_everything(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(inspect_folder, "load_engine")
    result = models("check", str(tiny), "--no-load")
    assert result.exit_code == 0
    assert "KV per slot  262 kB at 512 tokens" in result.stdout
    assert "speed" not in result.stdout


def cut_graph(folder: Path) -> None:
    graph = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(graph[: len(graph) // 2])


def foreign_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["beyond"] = 600
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def complaining_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only tools') }}")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (cut_graph, "model.onnx cannot be loaded"),
        (foreign_tokenizer, "tokenizer.json has ids up to 600"),
        (complaining_template, "only tools"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
)
def test_check_names_what_cannot_be_served(tmp_path: Path, damage: Callable[[Path], None], complaint: str) -> None:
    damage(write_random_llama(tmp_path / "model"))
    assert complaint in one_line(models("check", str(tmp_path / "model")), 2)


def test_check_of_a_model_whose_steps_fail_is_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise EngineFault("the model gave numbers that are none")

    monkeypatch.setattr("nodes.engine.engine.Engine.submit", refuse)
    line = one_line(models("check", str(tiny), "--provider", "cpu"), 2)
    assert "loads and does not run: the model gave numbers that are none" in line


def test_a_provider_that_is_none_is_named_with_the_choices(tiny: Path) -> None:
    line = one_line(models("check", str(tiny), "--provider", "tpu"), 2)
    assert "--provider tpu is none of auto, cpu, cuda" in line


def test_list_shows_the_folders_below_a_directory_and_why_some_do_not_serve(tmp_path: Path) -> None:
    write_random_llama(tmp_path / "owner" / "good", precision="fp16")
    cut_graph(write_random_llama(tmp_path / "bad"))
    (tmp_path / "notes").mkdir()
    result = models("list", "--dir", str(tmp_path))
    assert result.exit_code == 0
    bad, good = result.stdout.splitlines()[1:]
    assert "cannot be served: model.onnx cannot be loaded" in bad
    folder = tmp_path / "owner" / "good"
    size = f"{(folder / 'model.onnx').stat().st_size / 1000:.3g}"
    assert good.split() == [str(folder), "genai", "fp16", size, "kB", "512"]


def test_list_of_a_directory_without_models_says_how_to_get_one(tmp_path: Path) -> None:
    assert "ai-cluster models pull" in one_line(models("list", "--dir", str(tmp_path)), 2)
    assert "is no folder" in one_line(models("list", "--dir", str(tmp_path / "none")), 2)


def test_random_makes_a_folder_that_check_takes(tmp_path: Path) -> None:
    out = tmp_path / "made"
    result = models("random", "llama:tiny", "--precision", "int4", "--block-size", "128", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    assert f"serve it: ai-cluster serve --model {out}" in result.stdout
    assert "int4 block 128" in models("check", str(out), "--no-load").stdout
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_random_makes_an_embedding_model_that_check_takes(tmp_path: Path) -> None:
    out = tmp_path / "made"
    result = models("random", "bert:tiny", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    assert f"serve it: ai-cluster serve --model {out}" in result.stdout
    checked = models("check", str(out), "--provider", "cpu", "--threads", "1").stdout
    assert "format       embedding, model.onnx" in checked
    assert "context      512 tokens" in checked
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["llama:9b"], "SHAPE llama:9b is none of llama:tiny, llama:200m, llama:1b, llama:7b, bert:tiny, bert:22m"),
        (["bert:tiny", "--precision", "int4"], "bert:tiny is made in fp32 alone; leave --precision int4 out"),
        (["llama:tiny", "--precision", "int3"], "--precision int3 is none of"),
        (["llama:tiny", "--block-size", "48"], "--block-size 48 is none of 32, 128"),
    ],
)
def test_random_refuses_what_it_cannot_make(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    assert complaint in one_line(models("random", *arguments, "--out", str(tmp_path / "made")), 2)
    assert list(tmp_path.iterdir()) == []


def test_random_overwrites_nothing_and_says_when_the_disk_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").touch()
    assert "is there already" in one_line(models("random", "llama:tiny", "--out", str(tmp_path)), 2)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr("nodes.model_tools.random_llama.shutil.disk_usage", lambda path: usage)
    line = one_line(models("random", "llama:7b", "--out", str(tmp_path / "made")), 2)
    assert "the model takes 27.0 GB, and 1.0 GB are free there" in line
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_pull_says_what_it_took_and_how_to_go_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.chdir(tmp_path)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        files = {file.name: file.read_bytes() for file in tiny.iterdir()}
        hub.repositories["owner/tiny"] = FakeRepository({COMMIT: files}, {"main": COMMIT})
        first = models("pull", "owner/tiny")
        assert first.exit_code == 0, first.stderr
        assert COMMIT in first.stderr
        assert "models/tiny: 4 of 4 files downloaded" in first.stdout
        assert "serve it: ai-cluster serve --model models/tiny" in first.stdout
        assert "nothing downloaded" in models("pull", "owner/tiny").stdout
        assert "no repository owner/other" in one_line(models("pull", "owner/other"), 2)
        hub.broken = 503
        assert "answered 503" in one_line(models("pull", "owner/third"), 1)
    assert models("check", "models/tiny", "--no-load").exit_code == 0


def test_build_passes_its_options_on_and_shows_the_builders_output_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, object]] = []

    def fake(source: Path, **options: object) -> Path:
        calls.append(options)
        if source.name == "strange":
            raise CommandFailed("the builder could not build strange", "Traceback: no such architecture")
        return Path(str(options["out"]))

    assert build.__kwdefaults__.keys() == {"python", "say"}, "the fake takes what the real one takes"
    monkeypatch.setattr("nodes.model_tools.build.build", fake)
    result = models("build", str(tmp_path / "hf"), "--precision", "fp16", "--env", str(tmp_path / "env"))
    assert result.exit_code == 0, result.stderr
    wanted = {"out": Path("models/hf-fp16"), "precision": "fp16", "block_size": 32, "target": None}
    assert calls[0].items() >= {**wanted, "environment": tmp_path / "env"}.items()
    failed = models("build", str(tmp_path / "strange"))
    assert failed.exit_code == 2
    assert failed.stderr.splitlines() == [
        "Traceback: no such architecture",
        "ai-cluster: the builder could not build strange",
    ]
    assert "--precision q4 is none of int4, fp16, fp32" in one_line(models("build", "hf", "--precision", "q4"), 2)


def test_every_option_of_every_models_command_is_on_its_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    group = typer.main.get_command(models_app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert f"`models {name}" in page
        section = page.partition(f"`models {name}")[2].partition("\n## ")[0]
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                missing = [
                    option for option in parameter.opts + parameter.secondary_opts if f"`{option}" not in section
                ]
                assert missing == []


def test_the_pages_first_commands_bring_a_model_that_can_be_served(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = PAGE.read_text(encoding="utf-8")
    pull, check, serve = (line.split() for line in page.partition("```\n")[2].partition("```")[0].splitlines())
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.chdir(tmp_path)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        files = {file.name: file.read_bytes() for file in tiny.iterdir()}
        hub.repositories[pull[3]] = FakeRepository({COMMIT: files}, {"main": COMMIT})
        assert runner.invoke(cli.app, pull[1:]).exit_code == 0
    assert runner.invoke(cli.app, [*check[1:], "--no-load"]).exit_code == 0
    assert serve[:3] == ["ai-cluster", "serve", "--model"]
    assert read_model_folder(Path(serve[3])).precision.kind == "int4"
