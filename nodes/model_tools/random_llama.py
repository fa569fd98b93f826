"""A complete model folder of random weights, for tests and benchmarks: no download, no torch, the same bytes each time.

The text it generates is noise, but varied noise: greedy decoding neither repeats one token nor ends by itself, so a
test gets exactly the tokens it asks for.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nodes.model_tools.errors import ModelToolError
from nodes.model_tools.llama_onnx import (
    Array,
    LlamaShape,
    Precision,
    TokenIds,
    llama_graph,
    stream_llama,
    weight_shapes,
)
from nodes.model_tools.onnx_writer import Progress

SPECIAL_TOKENS = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
BOS, IM_START, IM_END = range(3)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# 1b and 7b have the shapes of the public Llama-3.2-1B (its context cut to 8192) and Llama-2-7B.
SIZES = {
    "tiny": LlamaShape(
        hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=176, vocab=512, context=512, tied=False
    ),
    "200m": LlamaShape(
        hidden=1024, layers=12, heads=16, kv_heads=4, head_dim=64, ffn=2816, vocab=32_000, context=2048, tied=False
    ),
    "1b": LlamaShape(
        hidden=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        ffn=8192,
        vocab=128_256,
        context=8192,
        rope_theta=500_000.0,
        tied=True,
    ),
    "7b": LlamaShape(
        hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, ffn=11_008, vocab=32_000, context=4096, tied=False
    ),
}

HEAD_GAIN = 3.0  # spreads the logits, so that the best two tokens differ by far more than float32 noise

SENTENCES = [
    "The quick brown fox jumps over the lazy dog while the cat is watching the river.",
    "A node joins the mesh, learns the other nodes by gossip and serves the model to everyone.",
    "Once upon a time there was a small model that answered questions about the weather.",
    "What is the capital of France? How many people live there, and what do they eat?",
    "Streams of tokens flow from the engine through the peers to the client, one after another.",
    "Please write a short story about a ship that sails around the world in eighty days.",
    "def main() -> None: print('hello, world'); return 0",
    'user assistant system {"role": "user", "content": "Hello!"} 0123456789',
]


class DiskTooSmall(ModelToolError):
    """The folder's disk has no room for the model. Nothing was written."""

    def __init__(self, out: Path, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{out}: the model takes {needed_bytes / 1e9:.1f} GB, and {free_bytes / 1e9:.1f} GB are free there; "
            "choose another disk with --out, or --precision int4"
        )


def write_random_llama(
    out: Path,
    size: str = "tiny",
    seed: int = 7,
    *,
    precision: Precision = "fp32",
    block_size: int = 32,
    progress: Progress = lambda written, total: None,
) -> Path:
    """Write a folder that an engine can serve: graph, configuration, tokenizer and chat template. Returns out.

    size: of SIZES. Memory for the two largest weights is enough: 1.3 GB for 7b. Raises DiskTooSmall, ValueError for a
    block size that is not 32 or 128, OSError."""
    shape = SIZES[size]
    source = RandomWeights(shape, seed)
    needed_bytes = llama_graph(shape, source, precision, block_size).weight_bytes
    existing = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    if (free_bytes := shutil.disk_usage(existing).free) < needed_bytes:
        raise DiskTooSmall(out, needed_bytes, free_bytes)
    tokens = TokenIds(bos=BOS, eos=IM_END, pad=IM_END)
    stream_llama(out, shape, source, tokens, precision=precision, block_size=block_size, progress=progress)
    small_tokenizer(shape.vocab).save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[IM_END],
        "pad_token": SPECIAL_TOKENS[IM_END],
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def random_weights(shape: LlamaShape, seed: int) -> dict[str, Array]:
    """All weights of RandomWeights at once."""
    source = RandomWeights(shape, seed)
    return {name: source(name) for name in weight_shapes(shape)}


class RandomWeights:
    """Gaussian weights that keep activations near 1 through any depth, each made when it is asked for.

    Special rows of the head are 0: never best, where the best of the others is far above 0.
    """

    def __init__(self, shape: LlamaShape, seed: int) -> None:
        self._shapes = weight_shapes(shape)
        self._seeds = {name: (seed, index) for index, name in enumerate(self._shapes)}
        self._head = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"

    def __call__(self, name: str) -> Array:
        dims = self._shapes[name]
        if len(dims) == 1:
            return np.ones(dims, np.float32)
        weight = np.random.default_rng(self._seeds[name]).standard_normal(dims, np.float32)
        if name == self._head:
            weight *= np.float32(HEAD_GAIN * dims[1] ** -0.5)
            weight[: len(SPECIAL_TOKENS)] = 0
        elif name != "model.embed_tokens.weight":
            weight *= np.float32(dims[1] ** -0.5)
        return weight


def small_tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE learned from SENTENCES; ids that these cannot fill get decodable words that no text encodes to."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator(SENTENCES, trainer)
    description = json.loads(trained.to_str())
    words = description["model"]["vocab"]
    for token_id in range(len(words), vocab):
        words[f"Ġword{token_id}"] = token_id
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
