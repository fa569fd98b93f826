"""Folders of embedding models: told apart from others, read, and refused with a line that names file and reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nodes.engine.embedding_folder import EmbeddingFolder, load_embedding_model, read_embedding_folder
from nodes.engine.errors import PromptTooLong
from nodes.engine.model_folder import ModelFolder, ModelFolderInvalid
from nodes.engine.model_kinds import read_folder
from nodes.model_tools.onnx_writer import Graph, save_graph
from nodes.model_tools.random_encoder import write_random_encoder
from nodes.model_tools.random_llama import write_random_llama

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def edit(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file, which need not be there; None removes one."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content |= fields
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def write_graph(
    folder: Path,
    inputs: tuple[str, ...] = INPUTS,
    output: str = "last_hidden_state",
    dtype: str = "int64",
    dims: tuple[int | str, ...] = ("batch", "sequence"),
    output_dims: tuple[int | str, ...] = ("batch", "sequence", 32),
    output_dtype: str = "float32",
) -> None:
    """A graph of these inputs and outputs that computes nothing."""
    graph = Graph()
    for name in inputs:
        graph.input(name, dtype, list(dims))
    graph.output(output, output_dtype, list(output_dims))
    save_graph(graph, folder, embedded_bytes_max=10**6)


def test_the_graph_tells_which_kind_of_model_a_folder_has(tmp_path: Path) -> None:
    encoder = read_folder(write_random_encoder(tmp_path / "encoder"))
    assert isinstance(encoder, EmbeddingFolder)
    assert (encoder.output, encoder.pooling, encoder.is_normalized) == ("last_hidden_state", "mean", True)
    assert (encoder.context_length, encoder.vocabulary_size, encoder.pad_id) == (64, 512, 1)
    assert encoder.inputs == INPUTS
    assert isinstance(read_folder(write_random_llama(tmp_path / "llama")), ModelFolder)


@pytest.mark.parametrize(
    ("options", "output", "pooling", "is_normalized"),
    [
        ({"pooling": "cls_token"}, "last_hidden_state", "cls", True),
        ({"pooling": "max_tokens", "is_normalized": False}, "last_hidden_state", "max", False),
        ({"pooling": None}, "last_hidden_state", "mean", True),
        ({"is_pooled": True, "is_normalized": False}, "sentence_embedding", None, False),
        # What the graph has pooled needs no words for it.
        ({"is_pooled": True, "pooling": "mean_sqrt_len_tokens"}, "sentence_embedding", None, True),
    ],
    ids=["cls", "max", "no word of it", "by the graph", "by the graph, in its own way"],
)
def test_pooling_and_length_are_as_the_author_says(
    tmp_path: Path, options: dict[str, Any], output: str, pooling: str | None, is_normalized: bool
) -> None:
    folder = read_embedding_folder(write_random_encoder(tmp_path, **options))
    assert (folder.output, folder.pooling, folder.is_normalized) == (output, pooling, is_normalized)


@pytest.mark.parametrize(
    ("files", "length"),
    [
        ({}, 64),
        ({"sentence_bert_config.json": {"max_seq_length": 20}}, 20),
        ({"sentence_bert_config.json": {"max_seq_length": 1000}}, 64),
        ({"tokenizer_config.json": {"model_max_length": 50}}, 50),
        ({"tokenizer_config.json": {"model_max_length": 10**30}}, 64),
        ({"tokenizer_config.json": {"model_max_length": 1e30}}, 64),
        ({"config.json": {"max_position_embeddings": None}, "tokenizer_config.json": {"model_max_length": 48}}, 48),
        # Two rows of RoBERTa's table, with its padding token's id of 1, are of no token.
        ({"config.json": {"model_type": "roberta"}, "tokenizer_config.json": {"model_max_length": None}}, 62),
    ],
)
def test_the_longest_input_is_what_model_tokenizer_and_sentences_allow(
    tmp_path: Path, files: dict[str, dict[str, Any]], length: int
) -> None:
    write_random_encoder(tmp_path)
    for name, fields in files.items():
        edit(tmp_path / name, **fields)
    assert read_embedding_folder(tmp_path).context_length == length


def modules(folder: Path, *kinds: str) -> None:
    entries = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda p: (p / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda p: edit(p / "config.json", vocab_size="many"), "config.json: vocab_size is no positive integer"),
        (lambda p: (p / "modules.json").write_text('{"a": 1}'), "modules.json is no list of modules"),
        (lambda p: (p / "modules.json").write_text("[{]"), "modules.json is no list of modules"),
        (lambda p: modules(p, "Transformer", "Pooling", "Dense"), "modules.json has a module 'Dense'"),
        (lambda p: edit(p / "1_Pooling/config.json", pooling_mode_cls_token=True), "1_Pooling/config.json asks for"),
        (
            lambda p: edit(p / "1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_lasttoken=True),
            "1_Pooling/config.json asks for pooling_mode_lasttoken",
        ),
        (
            lambda p: edit(p / "config_sentence_transformers.json", default_prompt_name="query"),
            "config_sentence_transformers.json puts the prompt 'query'",
        ),
        (
            lambda p: [
                edit(p / "config.json", max_position_embeddings=None),
                edit(p / "tokenizer_config.json", model_max_length=10**30),
            ],
            "max_position_embeddings is missing",
        ),
        (lambda p: write_graph(p, inputs=("input_ids",)), "model.onnx has no input attention_mask"),
        (lambda p: write_graph(p, inputs=(*INPUTS, "pixel_values")), "model.onnx has an input pixel_values"),
        (lambda p: write_graph(p, dtype="int32"), "model.onnx has input_ids of element type 6"),
        (lambda p: write_graph(p, dims=(1, 128)), r"model.onnx has input_ids of the fixed shape \[1, 128\]"),
        (lambda p: write_graph(p, output_dims=("b", 2, 3, 32)), "last_hidden_state of 4 dimensions"),
        (lambda p: write_graph(p, output_dtype="int64"), "last_hidden_state of element type 7"),
        (
            lambda p: [write_graph(p, inputs=(*INPUTS, "position_ids")), edit(p / "config.json", model_type="roberta")],
            "an input position_ids, which a model of type roberta counts in its own way",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_file_and_reason(
    tmp_path: Path, spoil: Callable[[Path], object], named: str
) -> None:
    write_random_encoder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ModelFolderInvalid, match=named) as raised:
        read_folder(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda p: (p / "tokenizer.json").write_text("{}"), "tokenizer.json holds no tokenizer"),
        (lambda p: edit(p / "config.json", vocab_size=100), "tokenizer.json has ids up to 511"),
        (lambda p: edit(p / "config.json", pad_token_id=512), "config.json: pad_token_id is 512"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, spoil: Callable[[Path], object], named: str) -> None:
    write_random_encoder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ModelFolderInvalid, match=named):
        load_embedding_model(read_embedding_folder(tmp_path))


def test_a_graph_in_the_folder_onnx_is_found(tmp_path: Path) -> None:
    write_random_encoder(tmp_path)
    (tmp_path / "onnx").mkdir()
    shutil.move(tmp_path / "model.onnx", tmp_path / "onnx" / "model.onnx")
    folder = read_folder(tmp_path)
    assert isinstance(folder, EmbeddingFolder)
    assert folder.graph_name == "onnx/model.onnx"


def test_the_graph_in_float32_is_served_before_smaller_ones_unless_another_is_named(tmp_path: Path) -> None:
    write_random_encoder(tmp_path)
    (tmp_path / "onnx").mkdir()
    shutil.copy(tmp_path / "model.onnx", tmp_path / "onnx" / "model_quantized.onnx")
    assert read_embedding_folder(tmp_path).variant == ""
    assert read_embedding_folder(tmp_path, "quantized").variant == "quantized"
    with pytest.raises(ModelFolderInvalid, match="no variant 'q4'"):
        read_embedding_folder(tmp_path, "q4")
    (tmp_path / "model.onnx").unlink()
    assert read_embedding_folder(tmp_path).variant == "quantized"


def test_a_tokenizer_that_cuts_and_pads_by_itself_does_neither_here(tmp_path: Path) -> None:
    plain = load_embedding_model(read_embedding_folder(write_random_encoder(tmp_path / "plain")))
    padded = write_random_encoder(tmp_path / "padded")
    settings = {
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 30},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<|im_start|>",
        },
    }
    edit(padded / "tokenizer.json", **settings)
    model = load_embedding_model(read_embedding_folder(padded))
    text = "a node joins the mesh and serves the model"
    assert model.encode(text) == plain.encode(text)
    assert (plain.encode(text)[0], plain.encode(text)[-1]) == (0, 2)
    assert plain.encode("") == [0, 2]


def test_a_text_far_too_long_is_not_encoded_to_its_end(tmp_path: Path) -> None:
    model = load_embedding_model(read_embedding_folder(write_random_encoder(tmp_path)))
    with pytest.raises(PromptTooLong):
        model.encode("word " * 100_000)


def test_lower_case_models_see_lower_case(tmp_path: Path) -> None:
    write_random_encoder(tmp_path)
    edit(tmp_path / "sentence_bert_config.json", max_seq_length=64, do_lower_case=True)
    model = load_embedding_model(read_embedding_folder(tmp_path))
    assert model.encode("A Node") == model.encode("a node")


def test_what_decides_the_vectors_decides_the_fingerprint(tmp_path: Path) -> None:
    def fingerprint(name: str, **options: Any) -> str:
        return load_embedding_model(read_embedding_folder(write_random_encoder(tmp_path / name, **options))).fingerprint

    same = fingerprint("a"), fingerprint("b")
    others = {
        fingerprint("cls", pooling="cls_token"),
        fingerprint("long", is_normalized=False),
        fingerprint("seed", seed=8),
    }
    assert same[0] == same[1]
    assert len(others | {same[0]}) == 4
