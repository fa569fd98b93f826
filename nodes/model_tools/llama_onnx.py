"""Writes a Llama as a genai-format folder: numbers and numpy weights in, `model.onnx` and `genai_config.json` out.

The graph is of the shape that the onnxruntime-genai builder makes on the CPU with pruned head, so that an engine which
serves this folder serves downloaded ones too. Needs numpy alone, never torch.

Precisions: fp32; fp16, where weights, KV and logits are halves; int4, where every projection is a MatMulNBits and all
else is fp32, as the builder makes it for the CPU; int4-fp16, where all else is fp16, as it makes it for GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from nodes.model_tools.onnx_writer import (
    ELEMENT_TYPES,
    GRAPH_FILE,
    MICROSOFT,
    AnyArray,
    Graph,
    Payload,
    Progress,
    Tensor,
    save_graph,
)
from nodes.model_tools.quantise import BLOCK_SIZES, block_count, quantise_int4

Array = npt.NDArray[np.float32]
Precision = Literal["fp32", "fp16", "int4", "int4-fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
WeightSource = Callable[[str], Array]

EMBEDDED_BYTES_MAX = 100_000_000  # above this the weights go into model.onnx.data, which is mapped instead of read
ACCURACY_LEVEL_INT8 = 4  # MatMulNBits multiplies in int8 where the machine can, as the builder asks on the CPU


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The numbers of one Llama. ffn is the inner width of the gated MLP; context bounds prompt plus answer."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    rope_theta: float = 10_000.0
    rms_eps: float = 1e-5
    tied: bool = True

    def parameter_count(self) -> int:
        return sum(int(np.prod(shape)) for shape in weight_shapes(self).values())


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The three ids that genai_config.json names; eos ends an answer."""

    bos: int
    eos: int
    pad: int


def weight_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights, in Hugging Face's words; a projection is [out, in], as torch keeps it."""
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (shape.hidden,),
            f"{name}.self_attn.q_proj.weight": (q_width, shape.hidden),
            f"{name}.self_attn.k_proj.weight": (kv_width, shape.hidden),
            f"{name}.self_attn.v_proj.weight": (kv_width, shape.hidden),
            f"{name}.self_attn.o_proj.weight": (shape.hidden, q_width),
            f"{name}.post_attention_layernorm.weight": (shape.hidden,),
            f"{name}.mlp.gate_proj.weight": (shape.ffn, shape.hidden),
            f"{name}.mlp.up_proj.weight": (shape.ffn, shape.hidden),
            f"{name}.mlp.down_proj.weight": (shape.hidden, shape.ffn),
        }
    shapes["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocab, shape.hidden)
    return shapes


def rotary_caches(shape: LlamaShape) -> tuple[Array, Array]:
    """Cosines and sines, each float32 [context, head_dim / 2] (Su et al. 2021, the half-rotation layout)."""
    inverse = shape.rope_theta ** (-np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim)
    angle = np.outer(np.arange(shape.context, dtype=np.float64), inverse)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def write_llama(
    out: Path,
    shape: LlamaShape,
    weights: Mapping[str, Array],
    tokens: TokenIds,
    *,
    precision: Precision = "fp32",
    block_size: int = 32,
) -> Path:
    """Write `model.onnx` (with `model.onnx.data` past EMBEDDED_BYTES_MAX) and `genai_config.json` into out.

    block_size: 32 or 128, weights that share a scale in int4. Returns out. Raises ValueError when a weight is missing,
    superfluous or of another shape, or for another block size; nothing is written then.
    """
    expected = weight_shapes(shape)
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"weights do not fit {asdict(shape)}: {', '.join(wrong)}")
    return stream_llama(out, shape, weights.__getitem__, tokens, precision=precision, block_size=block_size)


def stream_llama(
    out: Path,
    shape: LlamaShape,
    source: WeightSource,
    tokens: TokenIds,
    *,
    precision: Precision = "fp32",
    block_size: int = 32,
    progress: Progress = lambda written, total: None,
) -> Path:
    """As write_llama, asking source for one weight after the other: memory for the largest two is enough.

    progress: called with weight bytes written so far and in all. Raises ValueError for another block size, OSError."""
    graph = llama_graph(shape, source, precision, block_size)
    out.mkdir(parents=True, exist_ok=True)
    save_graph(graph, out, embedded_bytes_max=EMBEDDED_BYTES_MAX, progress=progress)
    (out / "genai_config.json").write_text(json.dumps(genai_config(shape, tokens), indent=4) + "\n", encoding="utf-8")
    return out


def llama_graph(shape: LlamaShape, source: WeightSource, precision: Precision, block_size: int = 32) -> Graph:
    """The graph, its weights not made yet. Raises ValueError for a block size that no kernel is fast for."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block size {block_size} is none of {', '.join(map(str, BLOCK_SIZES))}")
    return _LlamaGraph(shape, source, precision, block_size).build()


def genai_config(shape: LlamaShape, tokens: TokenIds) -> dict[str, object]:
    """The content of genai_config.json, laid out as the builder lays it out."""
    return {
        "model": {
            "bos_token_id": tokens.bos,
            "context_length": shape.context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GRAPH_FILE,
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": shape.heads,
                "num_hidden_layers": shape.layers,
                "num_key_value_heads": shape.kv_heads,
            },
            "eos_token_id": tokens.eos,
            "pad_token_id": tokens.pad,
            "type": "llama",
            "vocab_size": shape.vocab,
        },
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": False,
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": shape.context,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


class _LlamaGraph:
    """Builds one model. Values are named after the node that makes them, as the builder does."""

    def __init__(self, shape: LlamaShape, source: WeightSource, precision: Precision, block_size: int) -> None:
        self._shape = shape
        self._source = source
        self._float = "float16" if precision in ("fp16", "int4-fp16") else "float32"
        self._is_int4 = precision in ("int4", "int4-fp16")
        self._block_size = block_size
        self._accuracy = {"accuracy_level": ACCURACY_LEVEL_INT8} if precision == "int4" else {}
        self._graph = Graph()

    def build(self) -> Graph:
        shape, graph = self._shape, self._graph
        cos, sin = rotary_caches(shape)
        graph.constant("cos_cache", cos.astype(self._float))
        graph.constant("sin_cache", sin.astype(self._float))
        lengths, width = self._lengths()

        embedding = "model.embed_tokens.weight"
        self._weight(embedding)
        stream = graph.node("Gather", [embedding, "input_ids"], "/model/embed_tokens/Gather")
        branch = ""
        for layer in range(shape.layers):
            stream, branch = self._layer(layer, stream, branch, lengths, width)
        normed, _ = self._norm("model.norm.weight", "/model/norm", stream, branch)
        self._head(normed)

        graph.input("input_ids", "int64", ["batch_size", "sequence_length"])
        graph.input("attention_mask", "int64", ["batch_size", "total_sequence_length"])
        graph.output("logits", self._float, ["batch_size", 1, shape.vocab])
        for layer in range(shape.layers):
            for side in ("key", "value"):
                dims: list[int | str] = ["batch_size", shape.kv_heads, "past_sequence_length", shape.head_dim]
                graph.input(f"past_key_values.{layer}.{side}", self._float, dims)
                dims[2] = "total_sequence_length"
                graph.output(f"present.{layer}.{side}", self._float, dims)
        return graph

    def _lengths(self) -> tuple[str, str]:
        """From the mask: int32 [batch] index of each row's newest key, and the int32 scalar width of the mask."""
        base, graph = "/model/attn_mask_reformat", self._graph
        axis = graph.constant("axis_1", np.array([1], np.int64))
        one = graph.constant("one", np.array([1], np.int64))
        index = graph.constant("index_1", np.array(1, np.int64))
        total = graph.node("ReduceSum", ["attention_mask", axis], f"{base}/ReduceSum", attributes={"keepdims": 0})
        newest = graph.node("Sub", [total, one], f"{base}/Sub")
        to_int32 = {"to": ELEMENT_TYPES["int32"]}
        lengths = graph.node("Cast", [newest], f"{base}/seqlens_k/Cast", attributes=to_int32)
        dims = graph.node("Shape", ["attention_mask"], f"{base}/Shape")
        width = graph.node("Gather", [dims, index], f"{base}/Gather", attributes={"axis": 0})
        return lengths, graph.node("Cast", [width], f"{base}/total_seq_len/Cast", attributes=to_int32)

    def _layer(self, layer: int, stream: str, branch: str, lengths: str, width: str) -> tuple[str, str]:
        """One transformer block. Returns the residual stream and the branch that the next norm adds to it."""
        shape, graph, weights = self._shape, self._graph, f"model.layers.{layer}"
        name = f"/model/layers.{layer}"
        normed, stream = self._norm(f"{weights}.input_layernorm.weight", f"{name}/input_layernorm", stream, branch)

        parts = [f"{weights}.self_attn.{part}_proj.weight" for part in "qkv"]
        packed = self._matmul(normed, parts, f"{name}/attn/qkv_proj")
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        attention = f"{name}/attn/GroupQueryAttention"
        attended = graph.node(
            "GroupQueryAttention",
            [packed, "", "", *past, lengths, width, "cos_cache", "sin_cache"],
            attention,
            outputs=[f"{attention}/output_0", f"present.{layer}.key", f"present.{layer}.value"],
            domain=MICROSOFT,
            attributes={
                "num_heads": shape.heads,
                "kv_num_heads": shape.kv_heads,
                "scale": shape.head_dim**-0.5,
                "do_rotary": 1,
                "rotary_interleaved": 0,
            },
        )
        branch = self._matmul(attended, [f"{weights}.self_attn.o_proj.weight"], f"{name}/attn/o_proj")

        normed, stream = self._norm(
            f"{weights}.post_attention_layernorm.weight", f"{name}/post_attention_layernorm", stream, branch
        )
        gate = self._matmul(normed, [f"{weights}.mlp.gate_proj.weight"], f"{name}/mlp/gate_proj")
        up = self._matmul(normed, [f"{weights}.mlp.up_proj.weight"], f"{name}/mlp/up_proj")
        sigmoid = graph.node("Sigmoid", [gate], f"{name}/mlp/act_fn/Sigmoid")
        swish = graph.node("Mul", [gate, sigmoid], f"{name}/mlp/act_fn/Mul")
        gated = graph.node("Mul", [swish, up], f"{name}/mlp/Mul")
        return stream, self._matmul(gated, [f"{weights}.mlp.down_proj.weight"], f"{name}/mlp/down_proj")

    def _norm(self, weight: str, name: str, stream: str, branch: str) -> tuple[str, str]:
        """RMS norm (Zhang and Sennrich 2019) of stream + branch; branch "" means none. Returns normed, sum."""
        self._weight(weight)
        attributes: dict[str, float] = {"epsilon": self._shape.rms_eps}
        if not branch:
            node = "SimplifiedLayerNormalization"
            normed = self._graph.node(
                node, [stream, weight], f"{name}/LayerNorm", attributes={"axis": -1, **attributes}
            )
            return normed, stream
        normed, total = f"{name}/output_0", f"{name}/output_3"
        self._graph.node(
            "SkipSimplifiedLayerNormalization",
            [stream, branch, weight],
            f"{name}/SkipLayerNorm",
            outputs=[normed, "", "", total],
            domain=MICROSOFT,
            attributes=attributes,
        )
        return normed, total

    def _head(self, normed: str) -> None:
        """Logits of the last position only. A tied head reads the embedding's bytes, stored once unless in int4."""
        graph, name = self._graph, "/lm_head"
        last = graph.constant("last", np.array([-1], np.int64))
        newest = graph.node("Gather", [normed, last], f"{name}/Gather", attributes={"axis": 1})
        weight = "model.embed_tokens.weight" if self._shape.tied else "lm_head.weight"
        if self._shape.tied and not self._is_int4:
            head = graph.node("Transpose", [weight], f"{name}/Transpose", attributes={"perm": [1, 0]})
            graph.node("MatMul", [newest, head], f"{name}/MatMul", outputs=["logits"])
        else:
            self._matmul(newest, [weight], name, outputs=["logits"])

    def _matmul(self, value: str, names: Sequence[str], name: str, *, outputs: Sequence[str] = ()) -> str:
        """value times the weights of these names, one above the other."""
        shapes = weight_shapes(self._shape)
        rows, width = sum(shapes[part][0] for part in names), shapes[names[0]][1]
        matrix = f"{name[1:].replace('/', '.')}.MatMul.weight"

        def stacked() -> Array:
            return self._read(names[0]) if len(names) == 1 else np.concatenate([self._read(part) for part in names])

        if not self._is_int4:
            tensor = Tensor(matrix, self._float, (width, rows))
            self._graph.payloads.append(Payload((tensor,), lambda: [stacked().T.astype(self._float)]))
            return self._graph.node("MatMul", [value, matrix], f"{name}/MatMul", outputs=outputs)

        block_size, blocks = self._block_size, block_count(width, self._block_size)
        nibbles = Tensor(f"{matrix}_Q4", "uint8", (rows, blocks, block_size // 2))
        scales = Tensor(f"{matrix}_scales", self._float, (rows, blocks))

        def quantised() -> list[AnyArray]:
            codes, steps = quantise_int4(stacked(), block_size)
            return [codes, steps.astype(self._float)]

        self._graph.payloads.append(Payload((nibbles, scales), quantised))
        return self._graph.node(
            "MatMulNBits",
            [value, nibbles.name, scales.name],
            f"{name}/MatMul_Q4",
            outputs=outputs,
            domain=MICROSOFT,
            attributes={"K": width, "N": rows, "bits": 4, "block_size": block_size, **self._accuracy},
        )

    def _weight(self, name: str) -> None:
        """A weight that stays as it is, but for its float type."""
        tensor = Tensor(name, self._float, weight_shapes(self._shape)[name])
        self._graph.payloads.append(Payload((tensor,), lambda: [self._read(name).astype(self._float, copy=False)]))

    def _read(self, name: str) -> Array:
        weight, expected = self._source(name), weight_shapes(self._shape)[name]
        if weight.shape != expected:
            raise ValueError(f"{name} is {weight.shape}, and this shape needs {expected}")
        return weight
