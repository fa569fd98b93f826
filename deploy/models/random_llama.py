"""`python -m deploy.models.random_llama --size 200m --out DIR`, without an installed `ai-cluster models random`."""

import argparse
from pathlib import Path

from nodes.model_tools.llama_onnx import PRECISIONS
from nodes.model_tools.quantise import BLOCK_SIZES
from nodes.model_tools.random_llama import (
    BOS,
    CHAT_TEMPLATE,
    IM_END,
    SIZES,
    SPECIAL_TOKENS,
    random_weights,
    small_tokenizer,
    write_random_llama,
)

__all__ = [
    "BOS",
    "CHAT_TEMPLATE",
    "IM_END",
    "SIZES",
    "SPECIAL_TOKENS",
    "random_weights",
    "small_tokenizer",
    "write_random_llama",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it is made if missing")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=32, help="of int4")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    folder = write_random_llama(
        arguments.out,
        arguments.size,
        arguments.seed,
        precision=arguments.precision,
        block_size=arguments.block_size,
    )
    print(f"{folder}: {SIZES[arguments.size].parameter_count() / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
