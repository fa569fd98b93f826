"""A folder of an embedding model with random weights, for tests and trials: an encoder as sentence-transformers' are.

A small BERT (Devlin et al. 2018) in float32: learned positions, attention in both directions, layers normalised after
each sum. What it says of texts means nothing, but it depends on every token and on their order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import processors

from nodes.model_tools.onnx_writer import Graph, save_graph
from nodes.model_tools.random_llama import BOS, IM_END, IM_START, SPECIAL_TOKENS, small_tokenizer

Array = npt.NDArray[np.float32]

EMBEDDED_BYTES_MAX = 100_000_000
NORM_EPS = 1e-12
MASKED = float(np.finfo(np.float32).min)  # as transformers adds it to what may not be attended to
POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
WEIGHT_GAIN = 2.0  # above the usual 1, so that tokens differ by more than what their neighbours give all of them


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """The numbers of one encoder. context: the longest input, in tokens."""

    hidden: int = 32
    layers: int = 2
    heads: int = 4
    ffn: int = 64
    vocab: int = 512
    context: int = 64


# 22m has the shape of the public all-MiniLM-L6-v2.
ENCODER_SIZES = {
    "tiny": EncoderShape(context=512),
    "22m": EncoderShape(hidden=384, layers=6, heads=12, ffn=1536, vocab=30_522, context=512),
}


def write_random_encoder(
    out: Path,
    shape: EncoderShape | None = None,
    seed: int = 7,
    *,
    pooling: str | None = "mean_tokens",
    is_normalized: bool = True,
    is_pooled: bool = False,
    inputs: Sequence[str] = ("input_ids", "attention_mask", "token_type_ids"),
) -> Path:
    """Write graph, configurations and tokenizer. Returns out. Raises OSError.

    pooling: a key of 1_Pooling/config.json without pooling_mode_; None: there is neither that file nor modules.json.
    is_normalized: modules.json has Normalize. is_pooled: the graph itself gives sentence_embedding, by the mean.
    inputs: of the graph; position_ids may be one of them."""
    shape = shape or EncoderShape()
    out.mkdir(parents=True, exist_ok=True)
    save_graph(encoder_graph(shape, seed, inputs, is_pooled=is_pooled), out, embedded_bytes_max=EMBEDDED_BYTES_MAX)
    tokenizer = small_tokenizer(shape.vocab)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[BOS]} $A {SPECIAL_TOKENS[IM_END]}",
        special_tokens=[(SPECIAL_TOKENS[BOS], BOS), (SPECIAL_TOKENS[IM_END], IM_END)],
    )
    tokenizer.save(str(out / "tokenizer.json"))
    _write(
        out / "config.json",
        {
            "model_type": "bert",
            "hidden_size": shape.hidden,
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "max_position_embeddings": shape.context,
            "vocab_size": shape.vocab,
            "pad_token_id": IM_START,
        },
    )
    _write(
        out / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.context},
    )
    if pooling is not None:
        (out / "1_Pooling").mkdir(exist_ok=True)
        modes = {f"pooling_mode_{mode}": mode == pooling for mode in (*POOLING_MODES, pooling)}
        _write(out / "1_Pooling" / "config.json", {"word_embedding_dimension": shape.hidden, **modes})
        kinds = ["Transformer", "Pooling", *(["Normalize"] if is_normalized else [])]
        _write(
            out / "modules.json",
            [
                {
                    "idx": index,
                    "name": str(index),
                    "path": f"{index}_{kind}" if index else "",
                    "type": f"sentence_transformers.models.{kind}",
                }
                for index, kind in enumerate(kinds)
            ],
        )
    return out


def encoder_graph(shape: EncoderShape, seed: int, inputs: Sequence[str], *, is_pooled: bool = False) -> Graph:
    """input_ids and attention_mask to last_hidden_state [batch, sequence, hidden], or to token_embeddings and
    sentence_embedding [batch, hidden]."""
    builder = _Encoder(shape, seed)
    graph = builder.graph
    for name in inputs:
        graph.input(name, "int64", ["batch", "sequence"])
    hidden = builder.embeddings(inputs)
    mask = graph.node("Cast", ["attention_mask"], "mask", attributes={"to": 1})
    blocked = graph.node("Sub", [builder.constant("one", np.float32(1)), mask], "blocked")
    bias = graph.node("Mul", [blocked, builder.constant("masked", np.float32(MASKED))], "bias")
    bias = graph.node("Unsqueeze", [bias, builder.constant("bias_axes", np.array([1, 2]))], "bias_4d")
    for layer in range(shape.layers):
        hidden = builder.layer(f"layer.{layer}", hidden, bias)
    name = "token_embeddings" if is_pooled else "last_hidden_state"
    graph.node("Identity", [hidden], name, outputs=[name])
    graph.output(name, "float32", ["batch", "sequence", shape.hidden])
    if is_pooled:
        weights = graph.node("Unsqueeze", [mask, builder.constant("last_axis", np.array([2]))], "weights")
        axis = builder.constant("sequence_axis", np.array([1]))
        kept = graph.node("Mul", [hidden, weights], "kept")
        total = graph.node("ReduceSum", [kept, axis], "total", attributes={"keepdims": 0})
        count = graph.node("ReduceSum", [weights, axis], "count", attributes={"keepdims": 0})
        graph.node("Div", [total, count], "sentence_embedding", outputs=["sentence_embedding"])
        graph.output("sentence_embedding", "float32", ["batch", shape.hidden])
    return graph


class _Encoder:
    """Adds the parts of an encoder to a graph. Weights are drawn in the order in which they are asked for."""

    def __init__(self, shape: EncoderShape, seed: int) -> None:
        self.graph = Graph()
        self._shape = shape
        self._rng = np.random.default_rng(seed)

    def constant(self, name: str, value: Any) -> str:
        return self.graph.constant(name, np.asarray(value))

    def embeddings(self, inputs: Sequence[str]) -> str:
        shape, graph = self._shape, self.graph
        hidden = graph.node("Gather", [self._weight("words", shape.vocab, shape.hidden, 1.0), "input_ids"], "word")
        positions = self._weight("positions", shape.context, shape.hidden, 0.5)
        if "position_ids" in inputs:
            position = graph.node("Gather", [positions, "position_ids"], "position")
        else:
            length = graph.node("Shape", ["input_ids"], "length", attributes={"start": 1, "end": 2})
            zero = self.constant("zero", np.array([0]))
            position = graph.node("Slice", [positions, zero, length, zero], "position")
        hidden = graph.node("Add", [hidden, position], "word_position")
        if "token_type_ids" in inputs:
            kind = graph.node("Gather", [self._weight("types", 2, shape.hidden, 0.5), "token_type_ids"], "type")
            hidden = graph.node("Add", [hidden, kind], "word_position_type")
        return self._norm("embeddings.norm", hidden)

    def layer(self, name: str, hidden: str, bias: str) -> str:
        shape, graph = self._shape, self.graph
        size = shape.hidden // shape.heads
        split = self.constant(f"{name}.split", np.array([0, 0, shape.heads, size]))
        parts = {}
        for part, order in (("query", (0, 2, 1, 3)), ("key", (0, 2, 3, 1)), ("value", (0, 2, 1, 3))):
            projected = self._linear(f"{name}.{part}", hidden, shape.hidden, shape.hidden)
            heads = graph.node("Reshape", [projected, split], f"{name}.{part}.heads")
            parts[part] = graph.node("Transpose", [heads], f"{name}.{part}.turned", attributes={"perm": order})
        scores = graph.node("MatMul", [parts["query"], parts["key"]], f"{name}.scores")
        scale = self.constant(f"{name}.scale", np.float32(size**-0.5))
        scaled = graph.node("Mul", [scores, scale], f"{name}.scaled")
        masked = graph.node("Add", [scaled, bias], f"{name}.masked")
        shares = graph.node("Softmax", [masked], f"{name}.shares", attributes={"axis": -1})
        mixed = graph.node("MatMul", [shares, parts["value"]], f"{name}.mixed")
        turned = graph.node("Transpose", [mixed], f"{name}.turned_back", attributes={"perm": (0, 2, 1, 3)})
        joined = self.constant(f"{name}.joined_shape", np.array([0, 0, shape.hidden]))
        attended = graph.node("Reshape", [turned, joined], f"{name}.joined")
        attended = self._linear(f"{name}.attention", attended, shape.hidden, shape.hidden)
        hidden = self._norm(f"{name}.norm", graph.node("Add", [hidden, attended], f"{name}.sum"))
        inner = self._linear(f"{name}.inner", hidden, shape.hidden, shape.ffn)
        inner = graph.node("Gelu", [inner], f"{name}.gelu")
        outer = self._linear(f"{name}.outer", inner, shape.ffn, shape.hidden)
        return self._norm(f"{name}.norm_2", graph.node("Add", [hidden, outer], f"{name}.sum_2"))

    def _linear(self, name: str, value: str, width_in: int, width_out: int) -> str:
        product = self.graph.node(
            "MatMul", [value, self._weight(f"{name}.w", width_in, width_out, width_in**-0.5)], f"{name}.matmul"
        )
        bias = self.graph.constant(f"{name}.b", self._draw((width_out,), 0.1))
        return self.graph.node("Add", [product, bias], f"{name}.biased")

    def _norm(self, name: str, value: str) -> str:
        ones = self.graph.constant(f"{name}.scale", np.ones(self._shape.hidden, np.float32))
        zeros = self.graph.constant(f"{name}.shift", self._draw((self._shape.hidden,), 0.1))
        attributes = {"axis": -1, "epsilon": NORM_EPS}
        return self.graph.node("LayerNormalization", [value, ones, zeros], name, attributes=attributes)

    def _weight(self, name: str, rows: int, columns: int, gain: float) -> str:
        return self.graph.constant(name, self._draw((rows, columns), WEIGHT_GAIN * gain))

    def _draw(self, dims: tuple[int, ...], gain: float) -> Array:
        return self._rng.standard_normal(dims, np.float32) * np.float32(gain)


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
