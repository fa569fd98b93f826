"""The same random weights in every contestant's format, made once in a directory and used again."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nodes.model_tools.llama_onnx import Precision
from nodes.model_tools.random_llama import SIZES, random_weights, write_random_llama
from tests.benchmark.engine.worker import REPOSITORY
from tests.benchmark.peers_env import python_of

SEED = 7
BLOCK_SIZE = 128  # of int4 weights, for this project's engine and onnxruntime-genai
PRECISIONS: tuple[Precision, ...] = ("fp32", "int4")


def graph_folder(work: Path, size: str, precision: Precision, block_size: int = BLOCK_SIZE) -> Path:
    """A folder for this engine and for onnxruntime-genai."""
    folder = work / (f"{size}-{precision}" if precision == "fp32" else f"{size}-{precision}-b{block_size}")
    if not (folder / "tokenizer.json").exists():  # written last
        write_random_llama(folder, size, SEED, precision=precision, block_size=block_size)
    return folder


def gguf_file(work: Path, size: str, precision: Precision, peers: Path) -> Path:
    """A file for llama.cpp: float32, or Q4_0 where the graph is int4."""
    files = {"fp32": work / f"{size}-f32.gguf", "int4": work / f"{size}-q4_0.gguf"}
    if not all(file.exists() for file in files.values()):
        archive = work / f"{size}.npz"
        shape = SIZES[size]
        arrays: dict[str, Any] = {"shape": json.dumps(asdict(shape)), **random_weights(shape, SEED)}
        np.savez(archive, **arrays)
        command = [str(python_of(peers)), "-m", "tests.benchmark.engine.gguf_writer", str(archive), str(files["fp32"])]
        subprocess.run([*command, "--q4", str(files["int4"])], check=True, cwd=REPOSITORY)
        archive.unlink()
    return files[precision]


def decode_bytes(size: str) -> int:
    """Bytes of float32 weights that one decode step reads: all but the embedding, of which it reads one row."""
    shape = SIZES[size]
    embedding = 0 if shape.tied else shape.vocab * shape.hidden
    return 4 * (shape.parameter_count() - embedding)


def kv_bytes(size: str, tokens: int) -> int:
    """Bytes of float32 KV rows that attention reads with so many tokens before."""
    shape = SIZES[size]
    return 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim * tokens
