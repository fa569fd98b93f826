"""The Llama writer: its graph computes a Llama, and runs the ways that an engine runs it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from tokenizers import Tokenizer

from nodes.model_tools import llama_onnx
from nodes.model_tools.llama_onnx import PRECISIONS, Array, LlamaShape, Precision, TokenIds, rotary_caches, write_llama
from nodes.model_tools.quantise import quantise_int4
from nodes.model_tools.random_llama import IM_END, SIZES, random_weights, write_random_llama
from tests.unit.test_quantise import dequantise_int4

TINY = SIZES["tiny"]
PROMPT = [0, 1, 99, 300, 17, 44, 45, 46, 2, 7, 250, 511]
TOKENS = TokenIds(bos=0, eos=2, pad=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_llama(tmp_path_factory.mktemp("tiny"))


def session_of(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def empty_past(shape: LlamaShape, batch: int = 1) -> dict[str, Array]:
    return {
        f"past_key_values.{layer}.{side}": np.zeros((batch, shape.kv_heads, 0, shape.head_dim), np.float32)
        for layer in range(shape.layers)
        for side in ("key", "value")
    }


def step(
    session: onnxruntime.InferenceSession, ids: list[int], past: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """Feed ids after past; returns the logits of the last one and the longer past."""
    width = past["past_key_values.0.key"].shape[2] + len(ids)
    outputs = session.run(None, {"input_ids": np.array([ids]), "attention_mask": np.ones((1, width), np.int64), **past})
    names = [output.name.replace("present", "past_key_values") for output in session.get_outputs()]
    return outputs[0][0, 0], dict(zip(names[1:], outputs[1:], strict=True))


def greedy(session: onnxruntime.InferenceSession, count: int, prefill: list[list[int]]) -> list[int]:
    past = empty_past(TINY)
    for piece in prefill:
        logits, past = step(session, piece, past)
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        logits, past = step(session, tokens[-1:], past)
        tokens.append(int(logits.argmax()))
    return tokens


def numpy_llama(shape: LlamaShape, weights: dict[str, Array], ids: list[int]) -> npt.NDArray[np.float64]:
    """Logits of the last position, by the textbook, in float64: the second implementation that the graph must match."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    cos, sin = (cache[: len(ids), None].astype(np.float64) for cache in rotary_caches(shape))

    def norm(x: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        normed: npt.NDArray[np.float64] = x / np.sqrt((x**2).mean(-1, keepdims=True) + shape.rms_eps) * w[name]
        return normed

    def rotate(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        low, high = np.split(x, 2, -1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    stream = w["model.embed_tokens.weight"][ids]
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        x = norm(stream, f"{name}.input_layernorm.weight")
        q, k, v = ((x @ w[f"{name}.self_attn.{p}_proj.weight"].T).reshape(len(ids), -1, shape.head_dim) for p in "qkv")
        group = shape.heads // shape.kv_heads
        k, v = np.repeat(rotate(k), group, 1), np.repeat(v, group, 1)
        scores = np.einsum("qhd,khd->hqk", rotate(q), k) * shape.head_dim**-0.5
        scores += np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", share, v).reshape(len(ids), -1)
        stream = stream + attended @ w[f"{name}.self_attn.o_proj.weight"].T
        x = norm(stream, f"{name}.post_attention_layernorm.weight")
        gate, up = (x @ w[f"{name}.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        stream = stream + (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if shape.tied else "lm_head.weight"]
    logits: npt.NDArray[np.float64] = norm(stream[-1], "model.norm.weight") @ head.T
    return logits


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_graph_computes_the_llama_of_the_textbook(tmp_path: Path, tied: bool) -> None:
    shape = LlamaShape(
        hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=512, context=64, rope_theta=5e5, tied=tied
    )
    weights = random_weights(shape, seed=3)
    weights["model.norm.weight"] = np.linspace(0.5, 1.5, 64, dtype=np.float32)
    write_llama(tmp_path, shape, weights, TOKENS)
    logits, _ = step(session_of(tmp_path), PROMPT, empty_past(shape))
    np.testing.assert_allclose(logits, numpy_llama(shape, weights, PROMPT), atol=1e-4)


@pytest.mark.parametrize(
    ("accuracy_level", "tolerance"), [(1, 1e-4), (llama_onnx.ACCURACY_LEVEL_INT8, 0.25)], ids=["in float", "in int8"]
)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("block_size", [32, 128])
def test_int4_graph_computes_the_llama_of_the_dequantised_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block_size: int,
    tied: bool,
    accuracy_level: int,
    tolerance: float,
) -> None:
    monkeypatch.setattr(llama_onnx, "ACCURACY_LEVEL_INT8", accuracy_level)
    shape = replace(TINY, tied=tied)  # its ffn of 176 leaves the last block of either size incomplete
    weights = random_weights(shape, seed=3)
    write_llama(tmp_path, shape, weights, TOKENS, precision="int4", block_size=block_size)
    expected = numpy_llama(replace(shape, tied=False), rounded(shape, weights, block_size), PROMPT)
    logits, _ = step(session_of(tmp_path), PROMPT, empty_past(shape))
    np.testing.assert_allclose(logits, expected, atol=tolerance)


def rounded(shape: LlamaShape, weights: dict[str, Array], block_size: int) -> dict[str, Array]:
    """What the int4 model stands for, with a head of its own: the embedding is read as it is, a head tied to it not."""
    matrices = {name: weight for name, weight in weights.items() if weight.ndim == 2}
    matrices["lm_head.weight"] = weights["model.embed_tokens.weight" if shape.tied else "lm_head.weight"]
    for name, weight in matrices.items():
        matrices[name] = dequantise_int4(*quantise_int4(weight, block_size), inputs=weight.shape[1])
    return {**weights, **matrices, "model.embed_tokens.weight": weights["model.embed_tokens.weight"]}


def test_a_block_size_without_a_kernel_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block size 48 is none of 32, 128"):
        write_llama(tmp_path / "out", TINY, random_weights(TINY, seed=7), TOKENS, precision="int4", block_size=48)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["fp16", "int4-fp16"])
def test_half_precision_graph_keeps_kv_and_logits_in_halves(tmp_path: Path, precision: Precision) -> None:
    weights = random_weights(TINY, seed=3)
    write_llama(tmp_path, TINY, weights, TOKENS, precision=precision)
    session = session_of(tmp_path)
    types = {node.type for node in [*session.get_inputs()[2:], *session.get_outputs()]}
    assert types == {"tensor(float16)"}
    past = {name: value.astype(np.float16) for name, value in empty_past(TINY).items()}
    logits, _ = step(session, PROMPT, past)
    served = weights if precision == "fp16" else rounded(TINY, weights, 32)
    np.testing.assert_allclose(logits, numpy_llama(TINY, served, PROMPT), atol=0.03 if precision == "fp16" else 0.25)


def test_prefill_in_one_piece_and_token_by_token_give_the_same_greedy_tokens(folder: Path) -> None:
    session = session_of(folder)
    whole = greedy(session, 40, [PROMPT])
    assert greedy(session, 40, [[token] for token in PROMPT]) == whole
    assert greedy(session, 40, [PROMPT[:5], PROMPT[5:]]) == whole
    assert len(set(whole)) > 10, "random text repeats itself: tests on it would prove little"


def test_one_buffer_bound_as_past_and_present_serves_a_ragged_batch(folder: Path) -> None:
    session = session_of(folder)
    prompts = [PROMPT, PROMPT[3:9]]
    capacity, slots = 64, len(prompts)
    expected = [greedy(session, 12, [prompt]) for prompt in prompts]
    buffers = {name: np.zeros((slots, 2, capacity, 16), np.float32) for name in empty_past(TINY)}
    logits = np.empty((slots, 1, TINY.vocab), np.float32)

    def run(first: int, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> None:
        binding = session.io_binding()
        rows = len(ids)
        binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, mask.shape, mask.ctypes.data)
        for name, buffer in buffers.items():
            where = ("cpu", 0, np.float32, (rows, *buffer.shape[1:]), buffer[first:].ctypes.data)
            binding.bind_input(name, *where)
            binding.bind_output(name.replace("past_key_values", "present"), *where)
        binding.bind_output("logits", "cpu", 0, np.float32, (rows, 1, TINY.vocab), logits[first:].ctypes.data)
        session.run_with_iobinding(binding)

    lengths = np.array([len(prompt) for prompt in prompts])
    for slot, prompt in enumerate(prompts):
        run(slot, np.array([prompt]), np.ones((1, len(prompt)), np.int64))
    tokens = [logits[:, 0].argmax(-1)]
    for _ in range(11):
        lengths += 1
        mask = (np.arange(capacity) < lengths[:, None]).astype(np.int64)
        run(0, tokens[-1][:, None].copy(), mask)
        tokens.append(logits[:, 0].argmax(-1))
    assert np.array(tokens).T.tolist() == expected


def test_weights_past_the_embedded_bound_go_to_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = session_of(write_random_llama(tmp_path / "embedded"))
    monkeypatch.setattr(llama_onnx, "EMBEDDED_BYTES_MAX", 1000)
    for _ in range(2):  # the second write replaces the first instead of appending to it
        write_random_llama(tmp_path / "split")
    assert (tmp_path / "split" / "model.onnx.data").stat().st_size < 800_000
    assert greedy(session_of(tmp_path / "split"), 8, [PROMPT]) == greedy(embedded, 8, [PROMPT])


def test_a_weight_of_the_wrong_shape_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    weights = random_weights(TINY, seed=7)
    weights["model.norm.weight"] = np.ones(63, np.float32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        write_llama(tmp_path / "out", TINY, weights, TOKENS)
    assert not (tmp_path / "out").exists()


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_random_llama(tmp_path / "again")
    other = write_random_llama(tmp_path / "other", seed=8)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["genai_config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert (other / "model.onnx").read_bytes() != (folder / "model.onnx").read_bytes()


def test_every_id_of_the_random_model_has_a_token(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    assert tokenizer.get_vocab_size() == config["vocab_size"] == TINY.vocab
    assert all(tokenizer.id_to_token(token) is not None for token in range(TINY.vocab))
    assert config["eos_token_id"] == tokenizer.token_to_id("<|im_end|>") == IM_END
    text = "naïve ☃ {x}\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_file_is_one_that_onnx_itself_reads(tmp_path: Path, precision: Precision) -> None:
    write_random_llama(tmp_path, precision=precision)
    model = onnx.load(tmp_path / "model.onnx")
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 21, "com.microsoft": 1}
    weights = random_weights(TINY, seed=7)
    embedding = next(tensor for tensor in model.graph.initializer if tensor.name == "model.embed_tokens.weight")
    expected = weights[embedding.name].astype(np.float16 if "fp16" in precision else np.float32)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(embedding), expected)


def test_int4_matrices_are_laid_out_as_the_builder_lays_them_out(tmp_path: Path) -> None:
    """Names, types, shapes and attributes as onnxruntime-genai 0.18.0 wrote them for a Llama of this shape."""
    write_random_llama(tmp_path, precision="int4", block_size=128)
    model = onnx.load(tmp_path / "model.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(node for node in model.graph.node if node.name == "/model/layers.0/attn/qkv_proj/MatMul_Q4")
    assert (node.op_type, node.domain) == ("MatMulNBits", "com.microsoft")
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    assert attributes == {"K": 64, "N": 128, "accuracy_level": 4, "bits": 4, "block_size": 128}
    weight = "model.layers.0.attn.qkv_proj.MatMul.weight"
    assert list(node.input)[1:] == [f"{weight}_Q4", f"{weight}_scales"]
    assert (tensors[f"{weight}_Q4"].data_type, list(tensors[f"{weight}_Q4"].dims)) == (
        onnx.TensorProto.UINT8,
        [128, 1, 64],
    )
    assert (tensors[f"{weight}_scales"].data_type, list(tensors[f"{weight}_scales"].dims)) == (
        onnx.TensorProto.FLOAT,
        [128, 1],
    )
