"""Building model folders, with a script in place of Python and its packages."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from nodes.model_tools.build import WEIGHT_BYTES_MIN, BuildPrecision, BuildTarget, build
from nodes.model_tools.builder_environment import PACKAGES, CommandFailed, default_environment, prepare_environment
from nodes.model_tools.errors import ModelToolError
from nodes.model_tools.random_llama import write_random_llama

# It makes an environment of itself, notes its arguments, and builds by copying the folder `model` beside it.
FAKE_PYTHON = f"""#!{sys.executable} -I
import json, os, pathlib, shutil, sys
home = pathlib.Path({{home!r}})
arguments = sys.argv[1:]
with open(home / "calls", "a") as calls:
    json.dump([arguments, os.environ.get("HF_HUB_OFFLINE")], calls)
    calls.write("\\n")
if arguments[1] == "venv":
    environment = pathlib.Path(arguments[-1])
    (environment / "bin").mkdir(parents=True, exist_ok=True)
    (environment / "pyvenv.cfg").touch()
    shutil.copy(__file__, environment / "bin/python")
if (home / f"fail-{{{{arguments[1]}}}}").exists():
    print("Traceback\\nValueError: no such architecture")
    sys.exit(1)
if arguments[1] == "onnxruntime_genai.models.builder":
    shutil.copytree(home / "model", arguments[arguments.index("-o") + 1])
"""


class FakeBuilder:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = home / "cache" / "builder"
        self.python = home / "python"
        self.python.write_text(FAKE_PYTHON.format(home=str(home)).replace("{{", "{").replace("}}", "}"))
        self.python.chmod(0o755)
        write_random_llama(home / "model")
        self.source = home / "hf"
        self.source.mkdir()
        (self.source / "config.json").write_text("{}")
        (self.source / "model.safetensors").write_bytes(bytes(WEIGHT_BYTES_MIN))
        shutil.copy(home / "model" / "tokenizer.json", self.source)

    def build(
        self, precision: BuildPrecision = "int4", block_size: int = 32, target: BuildTarget | None = None
    ) -> Path:
        return build(
            self.source,
            out=self.home / "out",
            precision=precision,
            block_size=block_size,
            target=target,
            environment=self.environment,
            python=self.python,
        )

    def calls(self) -> list[tuple[list[str], str | None]]:
        lines = (self.home / "calls").read_text().splitlines()
        return [(arguments, offline) for arguments, offline in map(json.loads, lines)]


@pytest.fixture
def builder(tmp_path: Path) -> FakeBuilder:
    return FakeBuilder(tmp_path)


def test_the_first_build_makes_the_environment_and_later_ones_use_it(builder: FakeBuilder) -> None:
    built = builder.build()
    venv, install, run = (arguments for arguments, _ in builder.calls())
    assert venv == ["-m", "venv", "--clear", str(builder.environment)]
    assert install[:3] == ["-m", "pip", "install"]
    assert install[-len(PACKAGES) :] == list(PACKAGES)
    assert run[:2] == ["-m", "onnxruntime_genai.models.builder"]
    shutil.rmtree(built)
    builder.build()
    assert [arguments[1] for arguments, _ in builder.calls()[3:]] == ["onnxruntime_genai.models.builder"]


@pytest.mark.parametrize(
    ("precision", "target", "expected"),
    [
        ("int4", None, ["-p", "int4", "-e", "cpu", "prune_lm_head=true", "block_size=128"]),
        ("int4", "cuda", ["-p", "int4", "-e", "cuda", "prune_lm_head=true", "block_size=128"]),
        ("fp32", None, ["-p", "fp32", "-e", "cpu", "prune_lm_head=true"]),
        ("fp16", None, ["-p", "fp16", "-e", "cuda", "prune_lm_head=true"]),
    ],
)
def test_the_builder_is_run_offline_with_the_options_of_its_version(
    builder: FakeBuilder, precision: BuildPrecision, target: BuildTarget | None, expected: list[str]
) -> None:
    builder.build(precision, block_size=128, target=target)
    arguments, offline = builder.calls()[-1]
    assert offline == "1"
    assert arguments[2:4] == ["-m", str(builder.source)]
    assert arguments[6:10] + arguments[13:] == expected
    assert arguments[10] == "-c"
    assert arguments[12] == "--extra_options"


def test_what_was_built_is_checked_and_appears_whole(builder: FakeBuilder) -> None:
    (builder.source / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelToolError, match=r"cannot be served: tokenizer\.json holds no tokenizer"):
        builder.build()
    assert sorted(path.name for path in builder.home.iterdir()) == ["cache", "calls", "hf", "model", "python"]


def test_the_tokenizer_is_that_of_the_source_whatever_the_builder_adds_to_it(builder: FakeBuilder) -> None:
    written = builder.home / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(written))
    tokenizer.add_special_tokens(["<|endoftext|>"])  # what transformers adds for Qwen2, past this model's vocabulary
    tokenizer.save(str(written))
    built = builder.build()
    assert (built / "tokenizer.json").read_bytes() == (builder.source / "tokenizer.json").read_bytes()
    assert (built / "tokenizer_config.json").read_bytes() == (written.parent / "tokenizer_config.json").read_bytes()


def test_a_failing_builder_shows_its_output_and_leaves_nothing(builder: FakeBuilder) -> None:
    (builder.home / "fail-onnxruntime_genai.models.builder").touch()
    with pytest.raises(CommandFailed, match="could not build") as caught:
        builder.build()
    assert "no such architecture" in caught.value.output
    assert not (builder.home / "out").exists()


def test_an_environment_that_was_not_completed_is_made_anew(builder: FakeBuilder) -> None:
    (builder.home / "fail-pip").touch()
    with pytest.raises(CommandFailed, match="packages cannot be installed"):
        builder.build()
    (builder.home / "fail-pip").unlink()
    builder.build()
    assert [arguments[1] for arguments, _ in builder.calls()] == [
        *("venv", "pip"),
        *("venv", "pip", "onnxruntime_genai.models.builder"),
    ]


def test_a_folder_with_other_things_is_not_made_an_environment(builder: FakeBuilder) -> None:
    builder.environment.mkdir(parents=True)
    (builder.environment / "thesis.tex").touch()
    with pytest.raises(ModelToolError, match="holds something else; give an empty folder with --env"):
        prepare_environment(builder.environment, python=builder.python)
    assert (builder.environment / "thesis.tex").exists()


def test_an_output_that_is_there_is_never_overwritten(builder: FakeBuilder) -> None:
    builder.build()
    with pytest.raises(ModelToolError, match="is there already"):
        builder.build()


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_source_that_is_not_complete_is_refused_before_anything_is_installed(
    builder: FakeBuilder, missing: str
) -> None:
    (builder.source / missing).unlink()
    with pytest.raises(ModelToolError, match=r"has no (weights|config|tokenizer)"):
        builder.build()
    assert not (builder.home / "calls").exists()


def test_weights_that_were_not_downloaded_are_refused_before_anything_is_installed(builder: FakeBuilder) -> None:
    (builder.source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelToolError, match=r"42 bytes and no weights; download the model completely"):
        builder.build()
    assert not (builder.home / "calls").exists()


def test_a_repository_name_in_place_of_a_folder_gets_the_command_that_downloads_it(builder: FakeBuilder) -> None:
    builder.source = Path("owner/name")
    with pytest.raises(ModelToolError, match="hf download"):
        builder.build()


def test_other_packages_get_another_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = default_environment()
    assert first.parent == tmp_path / "ai-cluster"
    monkeypatch.setattr("nodes.model_tools.builder_environment.PACKAGES", (*PACKAGES, "another==1"))
    assert default_environment() != first
