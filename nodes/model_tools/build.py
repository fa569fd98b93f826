"""`models build`: a Hugging Face folder into one that a node serves, by the onnxruntime-genai builder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from nodes.engine.model_loader import ModelFolderInvalid, load_model, read_model_folder
from nodes.model_tools.builder_environment import prepare_environment, run_command
from nodes.model_tools.errors import ModelToolError

BuildPrecision = Literal["int4", "fp16", "fp32"]
BuildTarget = Literal["cpu", "cuda"]
BUILD_PRECISIONS: tuple[BuildPrecision, ...] = get_args(BuildPrecision)
BUILD_TARGETS: tuple[BuildTarget, ...] = get_args(BuildTarget)
BUILD_BLOCK_SIZES = (16, 32, 64, 128, 256)
# The builder writes them as transformers reads them, which adds to a Qwen2 tokenizer the tokens of the family it lacks,
# with ids past the vocabulary. What the model was trained with are those of the source.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
WEIGHT_BYTES_MIN = 1024  # of a weight file: one with less was not downloaded, or is a pointer to the file

Say = Callable[[str], None]


def build(
    source: Path,
    *,
    out: Path,
    precision: BuildPrecision,
    block_size: int,
    target: BuildTarget | None,
    environment: Path,
    python: Path | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Build `out`, which must not exist or be empty; it appears whole and checked or not at all. Returns it.

    block_size: weights that share a scale, of int4. target: None is cuda for fp16 and cpu for the others. environment:
    where the builder's packages are, or are put by `python`. Raises ModelToolError; CommandFailed has the builder's
    output."""
    _check_source(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelToolError(f"{out} is there already; give another folder with --out, or remove it")
    interpreter = prepare_environment(environment, python=python, say=say)
    say(f"building {out} from {source} in {precision}: minutes for a model of some billion parameters")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            built, cache = Path(scratch) / "model", Path(scratch) / "cache"
            command = builder_command(source, built, cache, precision, block_size, target)
            complaint = f"the builder could not build {source}; its output above says why"
            # Whatever it needs is in the folder; looking for more on a hub would need a network and an account.
            run_command([str(interpreter), *command], complaint, {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copy(source / name, built)
            _check_built(built)
            if out.exists():
                out.rmdir()
            shutil.move(built, out)
    except OSError as exc:
        raise ModelToolError(f"{exc.filename or out}: {exc.strerror}; give a writable folder with --out") from exc
    return out


def builder_command(
    source: Path, out: Path, cache: Path, precision: BuildPrecision, block_size: int, target: BuildTarget | None
) -> list[str]:
    """Arguments for the environment's Python. The builder ignores options that it does not know, and says nothing."""
    options = ["prune_lm_head=true"]  # logits of the last position only, which is all that generating needs
    if precision == "int4":
        options.append(f"block_size={block_size}")
    provider = target or ("cuda" if precision == "fp16" else "cpu")
    command = ["-m", "onnxruntime_genai.models.builder", "-m", str(source.resolve()), "-o", str(out.resolve())]
    command += ["-p", precision, "-e", provider, "-c", str(cache.resolve()), "--extra_options", *options]
    return command


def _check_source(source: Path) -> None:
    if not source.is_dir():
        raise ModelToolError(
            f"{source} is no folder; download the model first: hf download OWNER/NAME --local-dir FOLDER"
        )
    for name in ("config.json", "tokenizer.json"):
        if not (source / name).is_file():
            raise ModelToolError(f"{source} has no {name}; give the folder of a Hugging Face model, complete")
    weights = [file for pattern in WEIGHT_PATTERNS for file in source.glob(pattern)]
    if empty := next((file for file in weights if file.stat().st_size < WEIGHT_BYTES_MIN), None):
        raise ModelToolError(f"{empty} has {empty.stat().st_size} bytes and no weights; download the model completely")
    if not weights:
        raise ModelToolError(f"{source} has no weights ({', '.join(WEIGHT_PATTERNS)}); download the model completely")


def _check_built(built: Path) -> None:
    try:
        load_model(read_model_folder(built))
    except ModelFolderInvalid as exc:
        raise ModelToolError(f"what the builder wrote cannot be served: {exc.reason}; {exc.fix}") from exc
