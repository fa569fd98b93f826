"""The same random weights in every contestant's format, made once in a directory and used again."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np

from deploy.models.random_llama import SIZES, random_weights, write_random_llama
from tests.benchmark.engine.worker import REPOSITORY
from tests.benchmark.peers_env import python_of

SEED = 7
BLOCK_SIZE = 128  # of int4 weights, for this project's engine and onnxruntime-genai
PRECISIONS = ("fp32", "int4")


def graph_folder(work: Path, size: str, precision: str, block_size: int = BLOCK_SIZE) -> Path:
    """A folder for this engine and for onnxruntime-genai."""
    folder = work / (f"{size}-{precision}" if precision == "fp32" else f"{size}-{precision}-b{block_size}")
    if not (folder / "tokenizer.json").exists():  # written last
        write_random_llama(folder, size, SEED, precision=precision, block_size=block_size)
    return folder


def gguf_file(work: Path, size: str, precision: str, peers: Path) -> Path:
    """A file for llama.cpp: float32, or Q4_0 where the graph is int4."""
    files = {"fp32": work / f"{size}-f32.gguf", "int4": work / f"{size}-q4_0.gguf"}
    if not all(file.exists() for file in files.values()):
        archive = work / f"{size}.npz"
        shape = SIZES[size]
        np.savez(archive, shape=json.dumps(asdict(shape)), **random_weights(shape, SEED))
        command = [python_of(peers), "-m", "tests.benchmark.engine.gguf_writer", archive, files["fp32"]]
        subprocess.run([*command, "--q4", files["int4"]], check=True, cwd=REPOSITORY)
        archive.unlink()
    return files[precision]


def decode_bytes(size: str, precision: str) -> int:
    """Weight bytes that one decode step reads: everything but the embedding, of which it reads one row."""
    assert precision == "fp32", f"bytes of {precision} weights depend on the graph"
    shape = SIZES[size]
    embedding = 0 if shape.tied else shape.vocab * shape.hidden
    return 4 * (shape.parameter_count() - embedding)


def kv_bytes(size: str, tokens: int) -> int:
    """Bytes of float32 KV rows that attention reads with so many tokens before."""
    shape = SIZES[size]
    return 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim * tokens
