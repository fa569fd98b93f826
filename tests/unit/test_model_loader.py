"""Model folders, whole and broken: each fault is one line that names the thing and the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.models.random_llama import BOS, IM_END, SIZES, write_random_llama
from nodes.engine.model_loader import (
    ModelFolderInvalid,
    TensorNames,
    fingerprint_of,
    load_model,
    read_model_folder,
)

TINY = SIZES["tiny"]
PRODUCER_VERSION = b"\x1a\x01x"  # field 3 of an ONNX model, a text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_llama(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A fault that changes a JSON file of the folder."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return apply


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return edit("genai_config.json", lambda content: change(content["model"]))


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def garbage(file: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / file).write_bytes(b"\x00garbage"))


def append(file: Path, data: bytes) -> None:
    file.write_bytes(file.read_bytes() + data)


def void(_: object) -> None:
    return None


def test_a_whole_folder_says_what_the_model_is(whole: Path) -> None:
    folder = read_model_folder(whole)
    assert (folder.layers, folder.kv_heads, folder.head_size) == (TINY.layers, TINY.kv_heads, TINY.head_dim)
    assert (folder.vocabulary_size, folder.context_length, folder.sliding_window) == (TINY.vocab, TINY.context, None)
    assert (folder.bos_id, folder.eos_ids) == (BOS, {IM_END})
    assert folder.tensors == TensorNames()
    model = load_model(folder)
    assert model.eos_ids == {IM_END}
    assert model.weight_bytes == (whole / "model.onnx").stat().st_size
    assert model.chat_template.render([{"role": "user", "content": "a"}]).startswith("<|bos|><|im_start|>user\na")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["no such folder", "--model"]),
        (remove("genai_config.json"), ["genai_config.json is missing"]),
        (remove("model.onnx"), ["model.onnx is missing"]),
        (remove("tokenizer.json"), ["tokenizer.json is missing"]),
        (garbage("genai_config.json"), ["genai_config.json is no JSON"]),
        (garbage("tokenizer.json"), ["tokenizer.json holds no tokenizer"]),
        (garbage("tokenizer_config.json"), ["tokenizer_config.json is no JSON"]),
        (remove("tokenizer_config.json"), ["no chat template", "chat_template.jinja"]),
        (edit("genai_config.json", lambda c: c.clear()), ["genai_config.json: model is missing"]),
        (config(lambda m: m.pop("decoder")), ["model.decoder is missing"]),
        (config(lambda m: m.pop("context_length")), ["model.context_length is missing"]),
        (config(lambda m: m.update(vocab_size=-1)), ["model.vocab_size is no positive integer"]),
        (config(lambda m: m.update(vocab_size=100)), ["tokenizer.json has ids up to 511", "has 100"]),
        (config(lambda m: m.update(eos_token_id=None)), ["model.eos_token_id"]),
        (config(lambda m: m.update(eos_token_id=[1, "x"])), ["model.eos_token_id"]),
        (config(lambda m: m["decoder"].update(filename="../x.onnx")), ["model.decoder.filename"]),
        (config(lambda m: m["decoder"].update(filename="y.onnx")), ["y.onnx is missing"]),
        (config(lambda m: m["decoder"]["inputs"].update(past_key_names="past")), ["'past' does not hold %d"]),
        (config(lambda m: m["decoder"].update(sliding_window={"size": 3})), ["sliding_window.window_size is missing"]),
        (
            edit("tokenizer_config.json", lambda c: c.update(chat_template="{% broken")),
            ["chat template is no Jinja", "line 1"],
        ),
        (edit("tokenizer_config.json", lambda c: c.update(chat_template=[{"name": "x"}])), ["no chat template"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_broken_folder_is_one_line_that_names_the_thing_and_the_fix(
    folder: Path, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(folder)
    with pytest.raises(ModelFolderInvalid) as raised:
        load_model(read_model_folder(folder))
    message = str(raised.value)
    assert [word for word in [str(folder), raised.value.fix, *words] if word not in message] == []
    assert "\n" not in message


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ModelFolderInvalid, match="it is a file"):
        read_model_folder(folder / "model.onnx")


def test_several_end_ids_and_token_objects_are_understood(folder: Path) -> None:
    config(lambda m: m.update(eos_token_id=[IM_END, 7]))(folder)
    edit("tokenizer_config.json", lambda c: c.update(bos_token={"content": "<b>"}, chat_template="{{ bos_token }}"))(
        folder
    )
    read = read_model_folder(folder)
    assert read.eos_ids == {IM_END, 7}
    assert load_model(read).chat_template.render([]) == "<b>"


def test_tokens_are_spelled_by_the_tokenizer_where_its_configuration_is_silent(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ bos_token }} {{ eos_token }}")
    assert load_model(read_model_folder(folder)).chat_template.render([]) == "<|bos|> <|im_end|>"


def test_a_template_file_wins_over_the_configuration_and_a_list_has_a_default(folder: Path) -> None:
    templates = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    edit("tokenizer_config.json", lambda c: c.update(chat_template=templates))(folder)
    assert read_model_folder(folder).chat_template == "d"
    (folder / "chat_template.jinja").write_text("file")
    assert read_model_folder(folder).chat_template == "file"


def test_equal_models_have_equal_fingerprints_and_every_part_counts(whole: Path, folder: Path) -> None:
    def fingerprint(path: Path) -> str:
        return fingerprint_of(read_model_folder(path))

    seen = [fingerprint(whole)]
    assert fingerprint(folder) == seen[0]
    assert len(seen[0]) >= 16
    assert set(seen[0]) <= set("0123456789abcdef")
    (folder / "README.md").write_text("not part of the model")
    (folder / "model.onnx.data").write_bytes(b"the graph names no such file")
    assert fingerprint(folder) == seen[0]
    changes: list[Callable[[Path], None]] = [
        edit("tokenizer_config.json", lambda c: c.update(chat_template="x")),
        edit("tokenizer.json", lambda c: c.update(truncation=None, extra=1)),
        config(lambda m: m.update(eos_token_id=5)),
        lambda path: append(path / "model.onnx", PRODUCER_VERSION),
    ]
    for change in changes:
        change(folder)
        seen.append(fingerprint(folder))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, (0.0, 0.8)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.8}, (0.7, 0.8)),
        ({}, (1.0, 1.0)),
        (None, (1.0, 1.0)),
    ],
    ids=["greedy", "sampled", "empty", "absent"],
)
def test_what_a_request_leaves_open_is_in_the_folder(
    folder: Path, search: dict[str, Any] | None, expected: tuple[float, float]
) -> None:
    edit("genai_config.json", lambda content: content.update(search=search))(folder)
    model = load_model(read_model_folder(folder))
    assert (model.temperature, model.top_p) == expected


@pytest.mark.parametrize(
    "search", [{"temperature": -1}, {"temperature": "hot"}, {"top_p": 2}, {"top_p": True}], ids=str
)
def test_a_default_that_is_none_is_named(folder: Path, search: dict[str, Any]) -> None:
    edit("genai_config.json", lambda content: content.update(search={"do_sample": True} | search))(folder)
    with pytest.raises(ModelFolderInvalid, match=f"search.{next(iter(search))}"):
        read_model_folder(folder)


def test_an_end_id_outside_the_vocabulary_is_named(folder: Path) -> None:
    config(lambda model: model.update(eos_token_id=9_999_999))(folder)
    with pytest.raises(ModelFolderInvalid, match="eos_token_id"):
        read_model_folder(folder)
