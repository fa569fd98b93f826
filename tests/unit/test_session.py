"""What an engine may rely on of a session: the same tests for the real one on a tiny model and for the fake."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from nodes.engine import devices, graph_extension, memory
from nodes.engine import session as session_module
from nodes.engine.concat_kv_session import ConcatKvSession
from nodes.engine.cuda import DeviceUnavailable
from nodes.engine.engine import load_engine
from nodes.engine.executor import Session
from nodes.engine.graph import describe_graph
from nodes.engine.model_loader import ModelFolder, ModelFolderInvalid, fingerprint_of, read_model_folder
from nodes.engine.session import OnnxSession, load_session
from nodes.model_tools.llama_onnx import LlamaShape, TokenIds, write_llama
from nodes.model_tools.random_llama import SIZES, random_weights, small_tokenizer, write_random_llama
from tests.unit.fake_session import FakeSession

MODELS = Path(__file__).parents[1] / "models"
SLOTS = 4
CAPACITY = 160
PROMPTS = [[7, 99, 300, 17, 44], [5], list(range(10, 80)), list(range(3, 140))]

Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return read_model_folder(write_random_llama(tmp_path_factory.mktemp("tiny")))


def load(folder: ModelFolder, **options: Any) -> OnnxSession:
    options = {"slots": SLOTS, "capacity": CAPACITY, "threads": 1, "provider": "cpu"} | options
    return load_session(folder, **options)[0]


@pytest.fixture(scope="module")
def optimum() -> ModelFolder:
    """A graph without shared KV buffers."""
    return read_model_folder(MODELS / "llama-optimum")


@pytest.fixture(params=["onnx", "optimum", "fake"])
def session(request: pytest.FixtureRequest, folder: ModelFolder, optimum: ModelFolder) -> Session:
    if request.param == "fake":
        return FakeSession(SLOTS, CAPACITY)
    return load(folder if request.param == "onnx" else optimum)


@pytest.fixture(params=["onnx", "optimum", "onnx, extended", "optimum, extended"])
def real(
    request: pytest.FixtureRequest, folder: ModelFolder, optimum: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> OnnxSession:
    kind, _, extended = request.param.partition(", ")
    if extended:
        monkeypatch.setattr(graph_extension, "VOCABULARY_MIN", 0)
    loaded = load(folder if kind == "onnx" else optimum)
    assert (loaded.logit_blocks is not None) == bool(extended)
    return loaded


def prefill(session: Session, slot: int, prompt: list[int]) -> Logits:
    logits = np.empty(0, np.float32)
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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("head_size", [16, 64, 128])
def test_chunks_of_several_blocks_give_bit_for_bit_what_each_block_alone_gives(
    tmp_path: Path, head_size: int, threads: int
) -> None:
    shape = replace(SIZES["tiny"], hidden=256, head_dim=head_size, ffn=704)
    session = load(written(tmp_path, shape), capacity=512, threads=threads)
    assert session.prefill_tokens_max == 256
    prompt = [3 + 7 * i % 300 for i in range(320)]
    for start, total in [(0, 66), (0, 256), (44, 300), (62, 300), (64, 318), (100, 130)]:
        for slot in (0, 1):
            prefill(session, slot, prompt[:start])
        for first in range(start // 64 * 64, total, 64):
            piece = prompt[max(first, start) : min(first + 64, total)]
            pieces = session.prefill(0, np.array(piece), max(first, start)).copy()
        np.testing.assert_array_equal(session.prefill(1, np.array(prompt[start:total]), start), pieces)
        lengths = np.full(2, total)
        for _ in range(3):
            first_row, second_row = session.decode(np.full(2, 9), lengths)
            np.testing.assert_array_equal(first_row, second_row)
            lengths += 1


def test_what_gives_other_bits_in_large_chunks_has_small_ones(folder: ModelFolder, tmp_path: Path) -> None:
    large_heads = replace(SIZES["tiny"], head_dim=256)
    assert load(written(tmp_path, large_heads)).prefill_tokens_max == 64
    assert load(read_model_folder(MODELS / "llama-int4")).prefill_tokens_max == 64
    assert load(changed(folder, tmp_path, with_all_logits)).prefill_tokens_max == 64


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


def test_blocks_tell_of_the_logits_of_the_last_step(real: OnnxSession) -> None:
    tokens = [int(prefill(real, slot, prompt).argmax()) for slot, prompt in enumerate(PROMPTS)]
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    for count in (len(PROMPTS), 2, 1):
        logits = real.decode(np.array(tokens[:count]), lengths[:count])
        if (blocks := real.logit_blocks) is not None:
            assert [blocks.likeliest(row) for row in range(count)] == logits.argmax(axis=1).tolist()
            floors = np.sort(logits, axis=1)[:, -20]
            for row, floor in enumerate(floors.tolist()):
                assert blocks.reaching(row, floor).tolist() == np.flatnonzero(logits[row] >= floor).tolist()


def with_a_token_that_is_no_number(model: onnx.ModelProto) -> None:
    """The logit of one token is none, whatever the context."""
    for value in model.graph.initializer:
        if value.name.startswith("lm_head"):
            weights = numpy_helper.to_array(value).copy()
            weights[..., 300] = np.nan
            value.CopyFrom(numpy_helper.from_array(weights, value.name))


def test_blocks_tell_of_a_single_logit_that_is_no_number(
    folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_extension, "VOCABULARY_MIN", 0)
    session = load(changed(folder, tmp_path, with_a_token_that_is_no_number))
    token = int(np.nanargmax(prefill(session, 0, PROMPTS[0])))
    logits = session.decode(np.array([token]), np.array([len(PROMPTS[0])]))
    assert np.flatnonzero(np.isnan(logits[0])).tolist() == [300]
    assert session.logit_blocks is not None
    assert session.logit_blocks.likeliest(0) is None


def test_extended_graphs_give_the_same_bits(
    folder: ModelFolder, optimum: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in (folder, optimum):
        plain = load(model)
        with monkeypatch.context() as patch:
            patch.setattr(graph_extension, "VOCABULARY_MIN", 0)
            extended = load(model)
        for slot, prompt in enumerate(PROMPTS):
            assert (prefill(plain, slot, prompt) == prefill(extended, slot, prompt)).all()
        lengths = np.array([len(prompt) for prompt in PROMPTS])
        for token in range(3, 12):
            fed = np.full(len(PROMPTS), token)
            assert (plain.decode(fed, lengths) == extended.decode(fed, lengths)).all()
            lengths += 1


def test_a_graph_that_cannot_be_extended_is_run_as_it_is(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session_module, "extension", lambda graph: b"no protobuf")
    with caplog.at_level(logging.INFO):
        assert load(folder).logit_blocks is None
    assert "the graph cannot tell" in caplog.text


def test_a_file_with_its_weights_in_it_is_not_read_into_memory(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_extension, "VOCABULARY_MIN", 0)
    monkeypatch.setattr(session_module, "EXTENDED_BYTES_MAX", folder.graph_file.stat().st_size - 1)
    assert load(folder).logit_blocks is None


def with_weights_beside(folder: ModelFolder, out: Path) -> None:
    """The same folder with its weights in a file of their own."""
    shutil.copytree(folder.path, out, ignore=shutil.ignore_patterns("model.onnx"))
    onnx.save(
        onnx.load(str(folder.graph_file)), str(out / "model.onnx"), save_as_external_data=True, location="weights"
    )


def test_an_extended_graph_finds_its_weights_beside_it(
    folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_extension, "VOCABULARY_MIN", 0)
    with_weights_beside(folder, tmp_path / "beside")
    session = load(read_model_folder(tmp_path / "beside"))
    assert session.logit_blocks is not None
    assert (prefill(session, 0, PROMPTS[0]) == prefill(load(folder), 0, PROMPTS[0])).all()


def test_weights_behind_the_links_of_a_hub_cache_are_found_though_the_graph_cannot_be_extended(
    folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graph_extension, "VOCABULARY_MIN", 0)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    snapshot.mkdir(parents=True)
    with_weights_beside(folder, blobs)
    for number, file in enumerate(sorted(blobs.iterdir())):
        target = file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / target.name)
    with caplog.at_level(logging.INFO):
        session = load(read_model_folder(snapshot))
    assert "the graph cannot tell" in caplog.text
    assert (prefill(session, 0, PROMPTS[0]) == prefill(load(folder), 0, PROMPTS[0])).all()


def go_on(session: Session, slot_tokens: list[int], lengths: list[int], steps: int) -> list[list[int]]:
    """Tokens of slots 0, 1, … whose rows are there; slot_tokens: what each feeds first."""
    rows, ends = [[token] for token in slot_tokens], np.array(lengths)
    for _ in range(steps):
        logits = session.decode(np.array([row[-1] for row in rows]), ends)
        for row, best in zip(rows, logits.argmax(axis=1).tolist(), strict=True):
            row.append(best)
        ends += 1
    return rows


@pytest.mark.parametrize(("first", "second"), [(0, 3), (3, 0), (1, 2)], ids=str)
def test_swapped_slots_go_on_as_the_other_did(session: Session, first: int, second: int) -> None:
    expected = greedy(session, [PROMPTS[first], PROMPTS[second]], 8)
    best = [int(prefill(session, slot, PROMPTS[index]).argmax()) for slot, index in ((1, first), (0, second))]
    session.swap(1, 0, len(PROMPTS[first]), len(PROMPTS[second]))
    assert go_on(session, best, [len(PROMPTS[first]), len(PROMPTS[second])], 7) == expected
    session.swap(2, 3, 0, 0)


def test_a_session_goes_on_after_it_recovered(real: OnnxSession) -> None:
    expected = greedy(real, PROMPTS[:3], 9)
    best = [row[0] for row in expected]
    for slot, prompt in enumerate(PROMPTS[:3]):
        prefill(real, slot, prompt)
    lengths = [len(prompt) for prompt in PROMPTS[:3]]
    with pytest.raises(Exception, match=r"indices|idx"):
        real.decode(np.array([10**6] * 3), np.array(lengths))  # no such row in the embedding
    real.recover()
    assert go_on(real, best, lengths, 8) == expected


def test_rows_that_are_no_numbers_leave_no_trace_in_their_slot_or_others(real: OnnxSession) -> None:
    expected = greedy(real, PROMPTS[:3], 5)
    if isinstance(real, ConcatKvSession):
        real._past[:] = np.nan
        real._extents[:] = real.width  # as if they had been written
    else:
        for buffer in real._kv._buffers:  # type: ignore[attr-defined]
            buffer[:] = np.nan
    assert greedy(real, PROMPTS[:3], 5) == expected


def test_the_past_of_a_graph_without_shared_buffers_is_as_wide_as_the_longest_needs(optimum: ModelFolder) -> None:
    session = load(optimum, capacity=300)
    assert session.device == "cpu"
    assert isinstance(session, ConcatKvSession)
    assert session.width == 64
    expected = greedy(session, PROMPTS[:1], 70)
    assert session.width == 128
    long = list(range(3, 260))
    best = int(prefill(session, 1, long).argmax())
    assert greedy(session, PROMPTS[:1], 70) == expected
    assert session.width == 128
    # The long one's rows are still there.
    session.copy(1, 2, len(long))
    assert go_on(session, [5, 5, best], [3, 3, len(long)], 3)[2][1:] == go_on_alone(session, best, long, 3)
    assert session.width == 300
    greedy(session, PROMPTS[:1], 3)
    assert session.width == 64
    assert session.kv_bytes == 2 * SLOTS * 300 * 2 * 2 * 2 * 16 * 4


def test_rows_that_take_no_part_in_a_step_do_not_widen_it(optimum: ModelFolder) -> None:
    """A long prompt that is kept in an idle slot, or still being prefilled, costs the short batch beside it nothing."""
    session = load(optimum, capacity=300)
    assert isinstance(session, ConcatKvSession)
    long, short = list(range(3, 260)), PROMPTS[:2]
    expected = greedy(session, short, 40)
    alone = load(optimum, capacity=300)
    best = int(prefill(alone, 3, long).argmax())
    tokens, lengths = [row[0] for row in expected], np.array([len(prompt) for prompt in short])
    for slot, prompt in enumerate(short):
        prefill(session, slot, prompt)
    rows = [[token] for token in tokens]
    for start in range(0, len(long), 64):  # as an engine does: a chunk, a step, a chunk
        logits = session.prefill(3, np.array(long[start : start + 64]), start)
        found = int(logits.argmax())
        for row, token in zip(
            rows, session.decode(np.array([r[-1] for r in rows]), lengths).argmax(axis=1), strict=True
        ):
            row.append(int(token))
        lengths += 1
        assert session.width == 64
    assert found == best
    assert rows == [row[: len(rows[0])] for row in expected]
    # And while long ones decode, a short prompt's chunks are narrow.
    session.swap(0, 3, int(lengths[0]), len(long))
    assert go_on(session, [best], [len(long)], 3)[0][1:] == go_on_alone(alone, best, long, 3)
    assert session.width == 300
    prefill(session, 2, list(range(3, 90)))
    assert session._rows_of(2).shape[2] == 128
    assert (
        go_on(session, [5, 5, 7], [0, 0, 87], 2)[2] == go_on(alone, [7], [prefilled(alone, list(range(3, 90)))], 2)[0]
    )
    # What was moved out of the way is where it went.
    session.swap(0, 3, 2, int(lengths[0]))
    lengths -= 1
    assert session.width == 128
    assert go_on(session, [rows[0][-2]], [int(lengths[0])], 1)[0][1] == rows[0][-1]


def prefilled(session: Session, prompt: list[int]) -> int:
    prefill(session, 0, prompt)
    return len(prompt)


def go_on_alone(session: Session, first: int, prompt: list[int], steps: int) -> list[int]:
    prefill(session, 0, prompt)
    return go_on(session, [first], [len(prompt)], steps)[0][1:]


def test_only_float32_throughout_is_exact(folder: ModelFolder, optimum: ModelFolder, tmp_path: Path) -> None:
    assert load(folder).is_exact
    assert load(optimum).is_exact
    assert not load(read_model_folder(MODELS / "llama-int4")).is_exact
    assert not load(changed(folder, tmp_path, with_half_precision)).is_exact


def changed(folder: ModelFolder, path: Path, *changes: Callable[[onnx.ModelProto], None]) -> ModelFolder:
    """The folder with another graph, elsewhere."""
    model = onnx.load(str(folder.graph_file))
    for change in changes:
        change(model)
    onnx.save(model, str(path / "model.onnx"))
    return replace(folder, path=path, graph_file=path / "model.onnx")


def with_lengths_instead_of_a_mask(model: onnx.ModelProto) -> None:
    """Inputs seqlens_k and total_sequence_length, from which others compute the graph's own."""
    graph = model.graph
    given = {"seqlens_k": ["batch_size"], "total_sequence_length": list[str]()}
    for node in list(graph.node):
        if node.name.startswith("/model/attn_mask_reformat"):
            graph.node.remove(node)
        elif node.op_type == "GroupQueryAttention":
            node.input[5], node.input[6] = given
    (mask,) = [value for value in graph.input if value.name == "attention_mask"]
    graph.input.remove(mask)
    for name, shape in given.items():
        graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, shape))


def with_logits_to_keep(model: onnx.ModelProto) -> None:
    """Input num_logits_to_keep says of how many positions, from the end, there are logits."""
    graph = model.graph
    (gather,) = [node for node in graph.node if node.name == "/lm_head/Gather"]
    gather.input[1] = "kept"
    (logits,) = [info for info in graph.output if info.name == "logits"]
    logits.type.tensor_type.shape.dim[1].dim_param = "kept_length"
    graph.input.append(onnx.helper.make_tensor_value_info("num_logits_to_keep", onnx.TensorProto.INT64, []))
    negated = onnx.helper.make_node("Neg", ["num_logits_to_keep"], ["negated"])
    kept = onnx.helper.make_node("Unsqueeze", ["negated", "zero_axis"], ["kept"])
    graph.initializer.append(numpy_helper.from_array(np.array([0]), "zero_axis"))
    for node in (kept, negated):
        graph.node.insert(0, node)


@pytest.mark.parametrize("change", [with_lengths_instead_of_a_mask, with_logits_to_keep])
def test_inputs_that_some_graphs_have_are_fed(
    folder: ModelFolder, tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    assert greedy(load(changed(folder, tmp_path, change)), PROMPTS, 6) == greedy(load(folder), PROMPTS, 6)


def with_positions_from_the_width(model: onnx.ModelProto) -> None:
    """position_ids computed as the number of columns that came before."""
    graph, helper = model.graph, onnx.helper
    (positions,) = [value for value in graph.input if value.name == "position_ids"]
    graph.input.remove(positions)
    constants = {"w0": np.array(0), "w1": np.array(1), "w2": np.array(2), "w_axis": np.array([0])}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    nodes = [
        helper.make_node("Shape", ["past_key_values.0.key"], ["w_past"]),
        helper.make_node("Shape", ["input_ids"], ["w_ids"]),
        helper.make_node("Gather", ["w_past", "w2"], ["w_width"]),
        helper.make_node("Gather", ["w_ids", "w1"], ["w_count"]),
        helper.make_node("Add", ["w_width", "w_count"], ["w_end"]),
        helper.make_node("Range", ["w_width", "w_end", "w1"], ["w_range"]),
        helper.make_node("Unsqueeze", ["w_range", "w_axis"], ["position_ids"]),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)


def test_a_graph_whose_positions_ignore_holes_is_refused(optimum: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderInvalid, match="cannot run several sequences together") as raised:
        load(changed(optimum, tmp_path, with_positions_from_the_width))
    assert "position_ids" in raised.value.fix


def renamed(graph: onnx.GraphProto, old: str, new: str) -> None:
    for value in (*graph.input, *graph.output):
        if value.name == old:
            value.name = new
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def add_input(name: str) -> Callable[[onnx.ModelProto], None]:
    value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["batch"])
    return lambda model: model.graph.input.append(value)


def set_type(name: str, kind: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            if value.name == name:
                value.type.tensor_type.elem_type = kind

    return change


def without_cache(model: onnx.ModelProto) -> None:
    for value in [value for value in model.graph.input if value.name.startswith("past")]:
        model.graph.input.remove(value)


def with_paged_attention(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "PagedAttention", "com.microsoft"


@pytest.mark.parametrize(
    ("change", "reason", "fix"),
    [
        (with_paged_attention, "has paged attention", "build the folder"),
        (add_input("use_cache_branch"), "is a merged decoder", "optimum-cli export onnx"),
        (add_input("encoder_hidden_states"), "is the decoder of an encoder-decoder model", "decoder-only"),
        (add_input("past_conv.0"), "has an input past_conv.0 that 2 layers do not explain", "build the folder"),
        (lambda m: renamed(m.graph, "input_ids", "inputs_embeds"), "takes inputs_embeds", "text-only"),
        (lambda m: renamed(m.graph, "logits", "scores"), "has no output logits", "build the folder"),
        (lambda m: renamed(m.graph, "present.1.key", "new.1.key"), "has no output present.1.key", "build"),
        (without_cache, "was exported without a KV cache", "text-generation-with-past"),
        (set_type("input_ids", onnx.TensorProto.INT32), "has input_ids of element type 6", "export"),
        (set_type("logits", onnx.TensorProto.BFLOAT16), "has logits of element type 16", "export"),
        (set_type("present.1.value", onnx.TensorProto.FLOAT16), "some keys and values in float and some in", "export"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_graph_that_cannot_work_is_refused_before_it_is_loaded(
    folder: ModelFolder, tmp_path: Path, change: Callable[[onnx.ModelProto], None], reason: str, fix: str
) -> None:
    with pytest.raises(ModelFolderInvalid) as raised:
        describe_graph(changed(folder, tmp_path, change))
    assert f"model.onnx {reason}" in str(raised.value) or reason in str(raised.value)
    assert fix in raised.value.fix
    assert "\n" not in str(raised.value)


def test_half_precision_and_logits_of_every_position_are_served(folder: ModelFolder, tmp_path: Path) -> None:
    half, whole = load(changed(folder, tmp_path, with_half_precision, with_all_logits)), load(folder)
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
    return written(tmp_path_factory.mktemp("long"), replace(SIZES["tiny"], layers=1, context=20_000))


def written(path: Path, shape: LlamaShape) -> ModelFolder:
    """Random weights of this shape."""
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


def test_external_weights_that_are_cut_off_are_told_before_they_are_loaded(folder: ModelFolder, tmp_path: Path) -> None:
    with_weights_beside(folder, tmp_path / "beside")
    weights = tmp_path / "beside" / "weights"
    size = weights.stat().st_size
    with weights.open("r+b") as stream:
        stream.truncate(size - 1)
    with pytest.raises(ModelFolderInvalid, match=rf"weights is cut off.* {size} bytes of it, and {size - 1} are there"):
        read_model_folder(tmp_path / "beside")


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


@pytest.mark.parametrize(
    ("wanted", "variant", "level"), [(None, "", "WARNING"), ("q4f16", "q4f16", "INFO")], ids=["left open", "named"]
)
def test_a_variant_that_was_chosen_for_a_device_gives_way_to_the_cpus_when_the_device_cannot_be_used(
    wanted: str | None,
    variant: str,
    level: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def prepare(device_index: int) -> None:
        raise DeviceUnavailable("libcudart.so.12 cannot be loaded")

    monkeypatch.setattr(devices, "NVIDIA_DEVICES", (str(tmp_path),))
    monkeypatch.setattr(session_module, "prepare_cuda", prepare)
    repository = tmp_path / "model"
    shutil.copytree(MODELS / "llama-optimum", repository)
    other = onnx.load(str(repository / "model.onnx"))
    other.doc_string = "other bytes"
    onnx.save_model(other, str(repository / "model_q4f16.onnx"))
    folder = read_model_folder(repository, wanted)
    assert folder.variant == "q4f16"
    caplog.set_level(logging.INFO)
    session, served = load_session(folder, slots=2, capacity=64, threads=1)
    assert (session.device, served.variant) == ("cpu", variant)
    fallback, loaded = caplog.records
    assert fallback.levelname == level
    assert "libcudart.so.12" in vars(fallback)["reason"]
    assert vars(loaded)["graph"] == f"model{'_' if variant else ''}{variant}.onnx"
    assert vars(loaded)["graph_reason"] == ("it was named" if wanted else "runs best on cpu of 2 variants")
    engine = load_engine(folder, slots=2, queue_limit=1, capacity=64, threads=1)
    assert engine.fingerprint == fingerprint_of(served)
    assert (fingerprint_of(folder) == fingerprint_of(served)) == (wanted is not None)
    with pytest.raises(ModelFolderInvalid, match="CUDA cannot run it"):
        load_session(folder, provider="cuda")


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "NVIDIA_DEVICES", ())


def test_slots_and_capacity_are_what_fits_into_the_limit(long_folder: ModelFolder) -> None:
    row = describe_graph(long_folder).kv_bytes_per_row
    room = long_folder.graph_file.stat().st_size * 5 // 4 + memory.HEADROOM_BYTES
    chosen, _ = load_session(long_folder, provider="cpu", threads=1, memory_limit_bytes=room + 8 * 2048 * row)
    assert (chosen.slots, chosen.capacity) == (8, 2048)
    with pytest.raises(ModelFolderInvalid, match="it does not fit into memory: 4 slots of 8192 tokens") as raised:
        load(long_folder, capacity=8192, memory_limit_bytes=room + 4 * 1000 * row)
    assert raised.value.fix == "4 slots would fit with a capacity of 1000"


def test_a_sliding_window_without_shared_buffers_bounds_the_capacity(optimum: ModelFolder) -> None:
    assert load(replace(optimum, sliding_window=200), capacity=None).capacity == 200 - 64
    with pytest.raises(ModelFolderInvalid, match="sliding window of 64 tokens leaves no room"):
        load(replace(optimum, sliding_window=64))


@pytest.mark.parametrize(
    ("error", "reason", "fix"),
    [
        (
            RuntimeError("Failed to allocate memory for requested buffer of size 99"),
            "memory ran out",
            "smaller variant",
        ),
        (MemoryError("Unable to allocate 9 GiB"), "memory ran out", "smaller variant"),
        (RuntimeError("Could not find an implementation for Paged(1) node"), "an operator Paged(1)", "q4 on the CPU"),
    ],
    ids=["runtime", "numpy", "kernel"],
)
def test_what_breaks_while_loading_is_told_with_what_to_do(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, fix: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(session_module.onnxruntime, "InferenceSession", fail)
    with pytest.raises(ModelFolderInvalid) as raised:
        load(folder)
    assert reason in raised.value.reason
    assert fix in raised.value.fix


@pytest.mark.gpu
@pytest.mark.skipif(not devices.is_nvidia_there(), reason="no NVIDIA device is there")
@pytest.mark.parametrize("model", ["llama-fp32", "qwen3-fp32", "llama-optimum"])
def test_a_gpu_says_what_the_cpu_says(model: str) -> None:
    folder = read_model_folder(MODELS / model)
    on_gpu, on_cpu = load(folder, provider="cuda"), load(folder)
    assert on_gpu.device == "cuda"
    assert greedy(on_gpu, PROMPTS, 12) == greedy(on_cpu, PROMPTS, 12)
    best = [int(prefill(on_gpu, slot, prompt).argmax()) for slot, prompt in enumerate(PROMPTS[:2])]
    on_gpu.swap(0, 1, len(PROMPTS[0]), len(PROMPTS[1]))
    on_gpu.copy(1, 2, len(PROMPTS[0]))
    on_gpu.swap(0, 2, len(PROMPTS[1]), len(PROMPTS[0]))
    assert go_on(on_gpu, best[:1], [len(PROMPTS[0])], 5) == [greedy(on_cpu, PROMPTS[:1], 6)[0]]
