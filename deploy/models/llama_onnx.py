"""Writes a Llama as a genai-format folder: numbers and numpy weights in, `model.onnx` and `genai_config.json` out.

The graph is of the shape that the onnxruntime-genai builder makes for fp32 on the CPU with pruned head, so that an
engine which serves this folder serves downloaded ones too. Needs `onnx` and numpy, never torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[np.float32]

EMBEDDED_BYTES_MAX = 1_500_000_000  # protobuf ends at 2 GiB; above this the weights go into model.onnx.data
OPSET = 21
MICROSOFT = "com.microsoft"


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


def write_llama(out: Path, shape: LlamaShape, weights: Mapping[str, Array], tokens: TokenIds) -> Path:
    """Write `model.onnx` (with `model.onnx.data` past EMBEDDED_BYTES_MAX) and `genai_config.json` into out.

    Returns out. Raises ValueError when a weight is missing, superfluous or of another shape; nothing is written then.
    """
    expected = weight_shapes(shape)
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"weights do not fit {asdict(shape)}: {', '.join(wrong)}")
    out.mkdir(parents=True, exist_ok=True)
    model = _Graph(shape, weights).build()
    if 4 * shape.parameter_count() > EMBEDDED_BYTES_MAX:
        (out / "model.onnx.data").unlink(missing_ok=True)  # onnx appends to a file that is there
        onnx.save_model(model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    else:
        onnx.save_model(model, out / "model.onnx")
    (out / "genai_config.json").write_text(json.dumps(genai_config(shape, tokens), indent=4) + "\n", encoding="utf-8")
    return out


def genai_config(shape: LlamaShape, tokens: TokenIds) -> dict[str, object]:
    """The content of genai_config.json, laid out as the builder lays it out."""
    return {
        "model": {
            "bos_token_id": tokens.bos,
            "context_length": shape.context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
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


class _Graph:
    """Builds one model. Values are named after the node that makes them, as the builder does."""

    def __init__(self, shape: LlamaShape, weights: Mapping[str, Array]) -> None:
        self._shape = shape
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []

    def build(self) -> onnx.ModelProto:
        shape = self._shape
        cos, sin = rotary_caches(shape)
        self._constant("cos_cache", cos)
        self._constant("sin_cache", sin)
        lengths, width = self._lengths()

        self._constant("model.embed_tokens.weight", self._weights["model.embed_tokens.weight"])
        stream = self._node("Gather", ["model.embed_tokens.weight", "input_ids"], "/model/embed_tokens/Gather")
        branch = ""
        for layer in range(shape.layers):
            stream, branch = self._layer(layer, stream, branch, lengths, width)
        normed, _ = self._norm("model.norm.weight", "/model/norm", stream, branch)
        self._head(normed)

        def kv(name: str, steps: str) -> list[onnx.ValueInfoProto]:
            dims: list[str | int | None] = ["batch_size", shape.kv_heads, steps, shape.head_dim]
            return [
                helper.make_tensor_value_info(f"{name}.{layer}.{side}", TensorProto.FLOAT, dims)
                for layer in range(shape.layers)
                for side in ("key", "value")
            ]

        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        mask = helper.make_tensor_value_info(
            "attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]
        )
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", 1, shape.vocab])
        graph = helper.make_graph(
            self._nodes,
            "main_graph",
            [ids, mask, *kv("past_key_values", "past_sequence_length")],
            [logits, *kv("present", "total_sequence_length")],
            self._initializers,
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="ai-cluster")

    def _lengths(self) -> tuple[str, str]:
        """From the mask: int32 [batch] index of each row's newest key, and the int32 scalar width of the mask."""
        base = "/model/attn_mask_reformat"
        self._constant("axis_1", np.array([1], np.int64))
        self._constant("one", np.array([1], np.int64))
        self._constant("index_1", np.array(1, np.int64))
        total = self._node("ReduceSum", ["attention_mask", "axis_1"], f"{base}/ReduceSum", keepdims=0)
        newest = self._node("Sub", [total, "one"], f"{base}/Sub")
        lengths = self._node("Cast", [newest], f"{base}/seqlens_k/Cast", to=TensorProto.INT32)
        dims = self._node("Shape", ["attention_mask"], f"{base}/Shape")
        width = self._node("Gather", [dims, "index_1"], f"{base}/Gather", axis=0)
        return lengths, self._node("Cast", [width], f"{base}/total_seq_len/Cast", to=TensorProto.INT32)

    def _layer(self, layer: int, stream: str, branch: str, lengths: str, width: str) -> tuple[str, str]:
        """One transformer block. Returns the residual stream and the branch that the next norm adds to it."""
        shape, weights = self._shape, f"model.layers.{layer}"
        name = f"/model/layers.{layer}"
        normed, stream = self._norm(f"{weights}.input_layernorm.weight", f"{name}/input_layernorm", stream, branch)

        parts = [self._weights[f"{weights}.self_attn.{part}_proj.weight"] for part in "qkv"]
        packed = self._matmul(normed, np.concatenate(parts), f"{name}/attn/qkv_proj")
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        attended = f"{name}/attn/GroupQueryAttention/output_0"
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [packed, "", "", *past, lengths, width, "cos_cache", "sin_cache"],
                [attended, f"present.{layer}.key", f"present.{layer}.value"],
                name=f"{name}/attn/GroupQueryAttention",
                domain=MICROSOFT,
                num_heads=shape.heads,
                kv_num_heads=shape.kv_heads,
                scale=shape.head_dim**-0.5,
                do_rotary=1,
                rotary_interleaved=0,
            )
        )
        branch = self._matmul(attended, self._weights[f"{weights}.self_attn.o_proj.weight"], f"{name}/attn/o_proj")

        normed, stream = self._norm(
            f"{weights}.post_attention_layernorm.weight", f"{name}/post_attention_layernorm", stream, branch
        )
        gate = self._matmul(normed, self._weights[f"{weights}.mlp.gate_proj.weight"], f"{name}/mlp/gate_proj")
        up = self._matmul(normed, self._weights[f"{weights}.mlp.up_proj.weight"], f"{name}/mlp/up_proj")
        sigmoid = self._node("Sigmoid", [gate], f"{name}/mlp/act_fn/Sigmoid")
        swish = self._node("Mul", [gate, sigmoid], f"{name}/mlp/act_fn/Mul")
        gated = self._node("Mul", [swish, up], f"{name}/mlp/Mul")
        down = self._matmul(gated, self._weights[f"{weights}.mlp.down_proj.weight"], f"{name}/mlp/down_proj")
        return stream, down

    def _norm(self, weight: str, name: str, stream: str, branch: str) -> tuple[str, str]:
        """RMS norm (Zhang and Sennrich 2019) of stream + branch; branch "" means none. Returns normed, sum."""
        self._constant(weight, self._weights[weight])
        if not branch:
            node = "SimplifiedLayerNormalization"
            normed = self._node(node, [stream, weight], f"{name}/LayerNorm", axis=-1, epsilon=self._shape.rms_eps)
            return normed, stream
        normed, total = f"{name}/output_0", f"{name}/output_3"
        self._nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [stream, branch, weight],
                [normed, "", "", total],
                name=f"{name}/SkipLayerNorm",
                domain=MICROSOFT,
                epsilon=self._shape.rms_eps,
            )
        )
        return normed, total

    def _head(self, normed: str) -> None:
        """Logits of the last position only. A tied head reads the embedding's bytes, so they are stored once."""
        self._constant("last", np.array([-1], np.int64))
        newest = self._node("Gather", [normed, "last"], "/lm_head/Gather", axis=1)
        if self._shape.tied:
            head = self._node("Transpose", ["model.embed_tokens.weight"], "/lm_head/Transpose", perm=[1, 0])
        else:
            head = "lm_head.MatMul.weight"
            self._constant(head, self._weights["lm_head.weight"].T)
        self._nodes.append(helper.make_node("MatMul", [newest, head], ["logits"], name="/lm_head/MatMul"))

    def _matmul(self, value: str, weight: Array, name: str) -> str:
        matrix = f"{name[1:].replace('/', '.')}.MatMul.weight"
        self._constant(matrix, weight.T)
        return self._node("MatMul", [value, matrix], f"{name}/MatMul")

    def _node(self, kind: str, inputs: list[str], name: str, **attributes: float | list[int]) -> str:
        node = helper.make_node(kind, inputs, [f"{name}/output_0"], name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self._nodes.append(node)
        return f"{name}/output_0"

    def _constant(self, name: str, value: npt.NDArray[np.float32] | npt.NDArray[np.int64]) -> None:
        self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
