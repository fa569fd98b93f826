"""Model folders, whole and broken: each fault is one line that names the thing and the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from nodes.engine import model_loader
from nodes.engine.model_loader import (
    ModelFolderInvalid,
    TensorNames,
    fingerprint_of,
    load_model,
    read_model_folder,
)
from nodes.model_tools.random_llama import BOS, IM_END, SIZES, write_random_llama

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
        (shutil.rmtree, ["no such folder", "the path of a model's folder"]),
        (remove("genai_config.json"), ["genai_config.json is missing"]),
        (remove("model.onnx"), ["model.onnx is missing"]),
        (remove("tokenizer.json"), ["tokenizer.json is missing"]),
        (garbage("genai_config.json"), ["genai_config.json is no JSON"]),
        (garbage("tokenizer.json"), ["tokenizer.json holds no tokenizer"]),
        (garbage("tokenizer_config.json"), ["tokenizer_config.json is no JSON"]),
        (
            remove("tokenizer_config.json"),
            ["no chat template", "chat_template.jinja nor tokenizer_config.json is there"],
        ),
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


@pytest.mark.parametrize(("fault", "fix"), [(PermissionError, "make it readable"), (OSError, "copy it again")])
def test_weights_that_cannot_be_read_are_told_with_what_helps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: type[OSError], fix: str
) -> None:
    def refuse(folder: object) -> str:
        raise fault(5, "it does not want to", "/somewhere/model.onnx.data")

    read = read_model_folder(folder)
    monkeypatch.setattr(model_loader, "fingerprint_of", refuse)
    with pytest.raises(ModelFolderInvalid, match=rf"model.onnx.data cannot be read \(it does not want to\).*{fix}"):
        load_model(read)


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


HUGGING_FACE = {
    "num_hidden_layers": TINY.layers,
    "num_attention_heads": TINY.heads,
    "num_key_value_heads": TINY.kv_heads,
    "head_dim": TINY.head_dim,
    "hidden_size": TINY.hidden,
    "vocab_size": TINY.vocab,
    "max_position_embeddings": TINY.context,
    "bos_token_id": BOS,
    "eos_token_id": 7,
}


@pytest.fixture
def repository(folder: Path) -> Path:
    """A folder as repositories of exported graphs have it: several variants in onnx/, and config.json."""
    (folder / "genai_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(HUGGING_FACE))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [IM_END, 7], "do_sample": True}))
    (folder / "onnx").mkdir()
    for variant in ("", "_q4", "_q4f16", "_fp16", "_quantized"):
        shutil.copy(folder / "model.onnx", folder / "onnx" / f"model{variant}.onnx")
    (folder / "model.onnx").unlink()
    return folder


def hugging_face(**changes: object) -> Callable[[Path], None]:
    """A change of config.json; None removes."""

    def change(content: dict[str, Any]) -> None:
        content.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del content[key]

    return edit("config.json", change)


def test_a_repository_says_what_the_model_is(repository: Path) -> None:
    folder = read_model_folder(repository, provider="cpu")
    assert (folder.layers, folder.kv_heads, folder.head_size) == (TINY.layers, TINY.kv_heads, TINY.head_dim)
    assert (folder.vocabulary_size, folder.context_length, folder.sliding_window) == (TINY.vocab, TINY.context, None)
    assert (folder.bos_id, folder.eos_ids) == (BOS, {IM_END, 7})
    assert (folder.temperature, folder.top_p) == (1.0, 1.0)
    assert (folder.variant, folder.graph_file) == ("q4", repository / "onnx" / "model_q4.onnx")
    assert folder.config_file == "config.json"
    assert load_model(folder).eos_ids == {IM_END, 7}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": None}, {"kv_heads": TINY.heads}),
        ({"head_dim": None}, {"head_size": TINY.hidden // TINY.heads}),
        ({"sliding_window": 128}, {"sliding_window": 128}),
        ({"sliding_window": 128, "use_sliding_window": False}, {"sliding_window": None}),
        ({"text_config": HUGGING_FACE | {"num_hidden_layers": 9}}, {"layers": 9}),
    ],
    ids=["no grouped heads", "no head size", "window", "window not used", "text model of a larger one"],
)
def test_what_a_configuration_leaves_out_follows_from_the_rest(
    repository: Path, changes: dict[str, object], expected: dict[str, object]
) -> None:
    hugging_face(**changes)(repository)
    folder = read_model_folder(repository)
    assert {name: getattr(folder, name) for name in expected} == expected


def test_end_ids_are_in_the_configuration_where_there_is_none_of_generation(repository: Path) -> None:
    (repository / "generation_config.json").unlink()
    assert read_model_folder(repository).eos_ids == {7}


@pytest.mark.parametrize(
    ("provider", "there", "variant"),
    [
        ("cpu", "fp32 q4 q4f16 fp16 quantized", "q4"),
        ("cpu", "fp32 q4f16 fp16 quantized", "quantized"),
        ("cpu", "fp32 q4f16 fp16", ""),
        ("cpu", "q4f16 fp16", "q4f16"),
        ("cpu", "fp32", ""),
        ("cuda", "fp32 q4 q4f16 fp16 quantized", "q4f16"),
        ("cuda", "fp32 q4 fp16 quantized", "fp16"),
        ("cuda", "fp32 q4 quantized", "q4"),
        ("cuda", "fp32 quantized", ""),
        ("cuda", "quantized", "quantized"),
    ],
)
def test_the_variant_is_the_one_that_the_provider_runs_best(
    repository: Path, provider: Any, there: str, variant: str
) -> None:
    for name in {"fp32", "q4", "q4f16", "fp16", "quantized"} - set(there.split()):
        (repository / "onnx" / ("model.onnx" if name == "fp32" else f"model_{name}.onnx")).unlink()
    assert read_model_folder(repository, provider=provider).variant == variant


@pytest.mark.parametrize("wanted", ["fp16", "model_fp16", "model_fp16.onnx", "onnx/model_fp16.onnx"])
def test_a_variant_is_chosen_by_its_name_or_its_file(repository: Path, wanted: str) -> None:
    assert read_model_folder(repository, wanted).variant == "fp16"
    assert read_model_folder(repository, "fp32").variant == ""


def test_an_unknown_variant_is_refused_with_those_there(repository: Path) -> None:
    with pytest.raises(ModelFolderInvalid, match="no variant 'int2'") as raised:
        read_model_folder(repository, "int2")
    assert raised.value.fix == "choose one of: fp16, fp32, q4, q4f16, quantized"


def test_a_variant_beside_the_builders_graph_is_chosen_by_name_only(folder: Path) -> None:
    shutil.copy(folder / "model.onnx", folder / "model_int4.onnx")
    assert read_model_folder(folder).graph_file.name == "model.onnx"
    assert read_model_folder(folder, "int4").graph_file.name == "model_int4.onnx"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: shutil.rmtree(path / "onnx"), ["model.onnx is missing", "onnx/ folder"]),
        (lambda path: merged(path), ["decoder_model_merged.onnx", "text-generation-with-past"]),
        (remove("config.json"), ["genai_config.json is missing", "config.json"]),
        (hugging_face(max_position_embeddings=None), ["config.json: max_position_embeddings is missing"]),
        (hugging_face(head_dim=0), ["config.json: head_dim is no positive integer"]),
        (edit("generation_config.json", lambda c: c.update(eos_token_id=[])), ["generation_config.json: eos_token_id"]),
        (edit("generation_config.json", lambda c: c.update(top_p=3)), ["generation_config.json: top_p"]),
        (garbage("generation_config.json"), ["generation_config.json is no JSON"]),
        (garbage("onnx/model_q4.onnx"), ["onnx/model_q4.onnx cannot be loaded"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_broken_repository_is_one_line_that_names_the_thing_and_the_fix(
    repository: Path, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(repository)
    with pytest.raises(ModelFolderInvalid) as raised:
        read_model_folder(repository, provider="cpu")
    message = str(raised.value)
    assert [word for word in [str(repository), raised.value.fix, *words] if word not in message] == []
    assert "\n" not in message


def merged(path: Path) -> None:
    """Only a graph whose name says that it is none of the served kind."""
    for file in (path / "onnx").iterdir():
        file.replace(path / "onnx" / "decoder_model_merged.onnx")


def with_external_weights(folder: Path, location: str) -> None:
    """Keep the weights in another file, and let the graph say that they are at `location`."""
    model = onnx.load(str(folder / "model.onnx"))
    onnx.save_model(model, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for constant in model.graph.initializer:
        for entry in constant.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_external_weights_are_part_of_the_model(folder: Path) -> None:
    with_external_weights(folder, "model.onnx.data")
    read = read_model_folder(folder)
    assert read.weight_files() == [folder / "model.onnx", folder / "model.onnx.data"]
    before = fingerprint_of(read)
    append(folder / "model.onnx.data", b"x")
    assert fingerprint_of(read) != before


@pytest.mark.parametrize("location", ["../outside.data", "/etc/hostname", "link.data", "sub/../../outside.data"])
def test_external_weights_outside_the_folder_are_refused(folder: Path, location: str) -> None:
    (folder.parent / "outside.data").write_bytes(b"secret")
    (folder / "sub").mkdir()
    (folder / "link.data").symlink_to(folder.parent / "outside.data")
    with_external_weights(folder, location)
    with pytest.raises(ModelFolderInvalid, match="is outside the folder") as raised:
        read_model_folder(folder)
    assert location in raised.value.reason


def test_external_weights_that_are_missing_are_named_before_loading(folder: Path) -> None:
    with_external_weights(folder, "weights.bin")
    with pytest.raises(ModelFolderInvalid, match=r"weights\.bin is missing, in which model\.onnx has its weights"):
        read_model_folder(folder)


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    with_external_weights(folder, "model.onnx.data")
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    assert len(read_model_folder(snapshot).weight_files()) == 2


def test_an_end_id_outside_the_vocabulary_is_named(folder: Path) -> None:
    config(lambda model: model.update(eos_token_id=9_999_999))(folder)
    with pytest.raises(ModelFolderInvalid, match="eos_token_id"):
        read_model_folder(folder)
