"""A complete model folder of random weights, for tests and benchmarks: no download, no torch, the same bytes each time.

`python -m deploy.models.random_llama --out DIR --size tiny|200m --seed 7`. The text it generates is noise, but varied
noise: greedy decoding neither repeats one token nor ends by itself, so a test gets exactly the tokens it asks for.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from deploy.models.llama_onnx import Array, LlamaShape, TokenIds, weight_shapes, write_llama

SPECIAL_TOKENS = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
BOS, IM_START, IM_END = range(3)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SIZES = {
    "tiny": LlamaShape(
        hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=176, vocab=512, context=512, tied=False
    ),
    "200m": LlamaShape(
        hidden=1024, layers=12, heads=16, kv_heads=4, head_dim=64, ffn=2816, vocab=32_000, context=2048, tied=False
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


def write_random_llama(out: Path, size: str = "tiny", seed: int = 7) -> Path:
    """Write a folder that an engine can serve: graph, configuration, tokenizer and chat template. Returns out."""
    shape = SIZES[size]
    write_llama(out, shape, random_weights(shape, seed), TokenIds(bos=BOS, eos=IM_END, pad=IM_END))
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
    """Gaussian weights that keep activations near 1 through any depth. Special rows of the head are 0: never best."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    for name, dims in weight_shapes(shape).items():
        if len(dims) == 1:
            weights[name] = np.ones(dims, np.float32)
            continue
        weight = rng.standard_normal(dims, np.float32)
        if name != "model.embed_tokens.weight":
            weight *= np.float32(dims[1] ** -0.5)
        weights[name] = weight
    if "lm_head.weight" in weights:
        weights["lm_head.weight"] *= np.float32(HEAD_GAIN)
        weights["lm_head.weight"][: len(SPECIAL_TOKENS)] = 0
    return weights


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it is made if missing")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    folder = write_random_llama(arguments.out, arguments.size, arguments.seed)
    print(f"{folder}: {SIZES[arguments.size].parameter_count() / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
