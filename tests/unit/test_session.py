"""What an engine may rely on of a session: the same tests for the real one on a tiny model and for the fake."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from deploy.models.llama_onnx import TokenIds, write_llama
from deploy.models.random_llama import SIZES, random_weights, small_tokenizer, write_random_llama
from nodes.engine import devices
from nodes.engine.executor import Session
from nodes.engine.model_loader import ModelFolder, ModelFolderInvalid, read_model_folder
from nodes.engine.session import OnnxSession, load_session
from tests.unit.fake_session import FakeSession

SLOTS = 4
CAPACITY = 160
PROMPTS = [[7, 99, 300, 17, 44], [5], list(range(10, 80)), list(range(3, 140))]

Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return read_model_folder(write_random_llama(tmp_path_factory.mktemp("tiny")))


def load(folder: ModelFolder, **options: Any) -> OnnxSession:
    return load_session(folder, **({"slots": SLOTS, "capacity": CAPACITY, "threads": 1, "provider": "cpu"} | options))


@pytest.fixture(params=["onnx", "fake"])
def session(request: pytest.FixtureRequest, folder: ModelFolder) -> Session:
    return load(folder) if request.param == "onnx" else FakeSession(SLOTS, CAPACITY)


def prefill(session: Session, slot: int, prompt: list[int]) -> Logits:
    for start in range(0, len(prompt), 64):
        logits = session.prefill(slot, np.array(prompt[start : start + 64]), start)
    return logits.copy()


def greedy(session: Session, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Tokens of the prompts in slots 0, 1, …, decoded as one ragged batch."""
    tokens = [[int(prefill(session, slot, prompt).argmax())] for slot, prompt in enumerate(prompts)]
    lengths = np.array([len(prompt) for prompt in prompts])
    for _ in range(steps - 1):
        logits = session.decode(np.array([row[-1] for row in tokens]), lengths)
        for row, best in zip(tokens, logits.argmax(axis=1).tolist(), strict=True):
            row.append(best)
        lengths += 1
    return tokens


def test_a_ragged_batch_gives_each_row_what_it_gets_alone(session: Session) -> None:
    alone = [greedy(session, [prompt], 12)[0] for prompt in PROMPTS]
    assert greedy(session, PROMPTS, 12) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)


def test_a_prompt_prefilled_in_chunks_ends_where_one_fed_token_by_token_does(session: Session) -> None:
    prompt = PROMPTS[3]
    whole = prefill(session, 0, prompt)
    for length, token in enumerate(prompt):
        logits = session.decode(np.array([token]), np.array([length]))
    np.testing.assert_allclose(logits[0], whole, atol=1e-4)


def test_a_slot_is_used_again_without_a_trace_of_its_last_sequence(session: Session) -> None:
    first = greedy(session, PROMPTS[:2], 5)
    greedy(session, PROMPTS[3:1:-1], 10)
    assert greedy(session, PROMPTS[:2], 5) == first


def test_a_copied_slot_goes_on_as_the_one_it_was_copied_from(session: Session) -> None:
    expected = greedy(session, [PROMPTS[2]], 6)[0]
    best = int(prefill(session, 3, PROMPTS[2]).argmax())
    prefill(session, 0, PROMPTS[3])  # rows beyond the copied ones are somebody else's
    session.copy(3, 0, len(PROMPTS[2]))
    tokens, length = [best], len(PROMPTS[2])
    while len(tokens) < 6:
        tokens.append(int(session.decode(np.array(tokens[-1:]), np.array([length]))[0].argmax()))
        length += 1
    assert tokens == expected


def test_decoding_other_slots_leaves_a_slot_in_prefill_alone(session: Session) -> None:
    expected = prefill(session, 2, PROMPTS[3])
    first = prefill(session, 0, PROMPTS[0]).argmax()
    session.prefill(2, np.array(PROMPTS[3][:64]), 0)
    session.decode(np.array([first]), np.array([len(PROMPTS[0])]))
    session.prefill(2, np.array(PROMPTS[3][64:128]), 64)
    session.decode(np.array([first]), np.array([len(PROMPTS[0])]))
    np.testing.assert_allclose(session.prefill(2, np.array(PROMPTS[3][128:]), 128), expected, atol=1e-5)


def test_a_row_that_is_not_advanced_is_overwritten_by_the_next_step(session: Session) -> None:
    prefill(session, 0, PROMPTS[0])
    length = np.array([len(PROMPTS[0])])
    expected = session.decode(np.array([33]), length).copy()
    session.decode(np.array([44]), length)
    np.testing.assert_array_equal(session.decode(np.array([33]), length), expected)


def test_a_slot_can_be_filled_to_its_last_row(session: Session) -> None:
    prompt = list(range(1, CAPACITY))
    expected = prefill(session, 1, [*prompt, 9])
    prefill(session, 0, prompt)
    np.testing.assert_allclose(session.decode(np.array([9]), np.array([CAPACITY - 1]))[0], expected, atol=1e-4)


def test_half_precision_and_logits_of_every_position_are_served(folder: ModelFolder, tmp_path: Path) -> None:
    model = onnx.load(str(folder.graph_file))
    with_half_precision(model)
    with_all_logits(model)
    copy = replace(folder, path=tmp_path, graph_file=tmp_path / "model.onnx")
    onnx.save(model, str(copy.graph_file))
    half, whole = load(copy), load(folder)
    assert half.kv_bytes == whole.kv_bytes // 2
    for prompt in PROMPTS:
        np.testing.assert_allclose(prefill(half, 0, prompt), prefill(whole, 0, prompt), atol=0.1)
    logits = half.decode(np.array([3]), np.array([len(PROMPTS[-1])]))
    np.testing.assert_allclose(logits, whole.decode(np.array([3]), np.array([len(PROMPTS[-1])])), atol=0.1)
    assert logits.dtype == np.float32


def with_half_precision(model: onnx.ModelProto) -> None:
    """KV, attention and logits in float16, all else as before."""
    graph, half = model.graph, onnx.TensorProto.FLOAT16
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            info.type.tensor_type.elem_type = half
    for constant in graph.initializer:
        if constant.name in ("cos_cache", "sin_cache"):
            cache = numpy_helper.to_array(constant).astype(np.float16)
            constant.CopyFrom(numpy_helper.from_array(cache, constant.name))
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type == "GroupQueryAttention":
            cast(graph, node.input[0], f"{node.input[0]}_half", half)
            node.input[0] += "_half"
        attended, is_head = node.output[0], node.output[0] == "logits"
        if node.op_type == "GroupQueryAttention" or is_head:
            node.output[0] += "_inner"
        graph.node.append(node)
        if node.output[0] != attended:
            cast(graph, node.output[0], attended, half if is_head else onnx.TensorProto.FLOAT)


def cast(graph: onnx.GraphProto, source: str, target: str, kind: int) -> None:
    graph.node.append(onnx.helper.make_node("Cast", [source], [target], to=kind))


def with_all_logits(model: onnx.ModelProto) -> None:
    """What the builder writes without prune_lm_head."""
    (gather,) = [node for node in model.graph.node if node.name == "/lm_head/Gather"]
    gather.CopyFrom(onnx.helper.make_node("Identity", gather.input[:1], gather.output, name=gather.name))
    (logits,) = [info for info in model.graph.output if info.name == "logits"]
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence_length"


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A model with a context of 20,000 tokens."""
    path = tmp_path_factory.mktemp("long")
    shape = replace(SIZES["tiny"], layers=1, context=20_000)
    write_llama(path, shape, random_weights(shape, seed=3), TokenIds(bos=0, eos=2, pad=2))
    small_tokenizer(shape.vocab).save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return read_model_folder(path)


@pytest.mark.parametrize(
    ("wanted", "context", "window", "capacity"),
    [
        (None, 512, None, 512),
        (None, 20_000, None, 8192),
        (None, 20_000, 16_384, 16_384),
        (None, 512, 4096, 512),
        (128, 512, None, 128),
        (4096, 512, None, 512),
        (128, 512, 128, 128),
    ],
)
def test_capacity_is_within_the_context_and_holds_the_window(
    long_folder: ModelFolder, wanted: int | None, context: int, window: int | None, capacity: int
) -> None:
    one = replace(long_folder, context_length=context, sliding_window=window)
    assert load(one, slots=1, capacity=wanted).capacity == capacity


def test_a_capacity_below_the_window_is_refused(folder: ModelFolder) -> None:
    with pytest.raises(ModelFolderInvalid, match="looks back 128 tokens"):
        load(replace(folder, sliding_window=128), capacity=64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": 3}, "has no input past_key_values.2.key"),
        ({"layers": 1}, "has an input past_key_values.1.key that 1 layers do not explain"),
        ({"kv_heads": 4}, "has a kv_heads of 2, and genai_config.json says 4"),
        ({"head_size": 8}, "has a head_size of 16"),
        ({"vocabulary_size": 600}, "has a vocabulary of 512"),
    ],
    ids=["more layers", "fewer layers", "heads", "head size", "vocabulary"],
)
def test_a_graph_that_is_not_the_configured_one_is_refused(
    folder: ModelFolder, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelFolderInvalid) as raised:
        load(replace(folder, **change))
    assert f"model.onnx {reason}" in str(raised.value)


@pytest.mark.parametrize("content", [b"\x00garbage", b""], ids=["garbage", "empty"])
def test_a_graph_that_cannot_be_loaded_is_named_in_one_line(
    folder: ModelFolder, tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    broken = replace(folder, path=tmp_path, graph_file=tmp_path / "model.onnx")
    with pytest.raises(ModelFolderInvalid, match=r"model\.onnx cannot be loaded") as raised:
        load(broken)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_external_weights_that_are_missing_are_named(folder: ModelFolder, tmp_path: Path) -> None:
    model = onnx.load(str(folder.graph_file))
    onnx.save_model(model, str(tmp_path / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    moved = replace(folder, path=tmp_path, graph_file=tmp_path / "model.onnx")
    assert load(moved, slots=1).capacity == CAPACITY
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ModelFolderInvalid, match=r"model\.onnx\.data is missing"):
        load(moved)


def test_without_a_device_auto_runs_on_the_cpu_silently_and_says_so_in_the_log(
    folder: ModelFolder, no_device: None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    assert load(folder, provider="auto").device == "cpu"
    assert [record.message for record in caplog.records] == ["running on the CPU", "model loaded"]
    assert "no NVIDIA device" in vars(caplog.records[0])["reason"]
    assert capfd.readouterr() == ("", "")


def test_without_a_device_cuda_is_refused_in_one_line(
    folder: ModelFolder, no_device: None, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelFolderInvalid, match="CUDA cannot run it") as raised:
        load(folder, provider="cuda")
    assert "\n" not in str(raised.value)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_device_without_cuda_libraries_falls_back_to_the_cpu(
    folder: ModelFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What a driver without its libraries looks like; where this machine has both, CUDA is what runs."""
    monkeypatch.setattr(devices, "NVIDIA_DEVICES", (str(tmp_path),))
    caplog.set_level(logging.INFO)
    loaded = load(folder, provider="auto")
    assert loaded.device == ("cpu" if caplog.records else "cuda")
    assert greedy(loaded, PROMPTS, 3) == greedy(load(folder), PROMPTS, 3)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "NVIDIA_DEVICES", ())
