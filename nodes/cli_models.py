"""`ai-cluster models`: see what is served, and get, make and check model folders."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, get_args

import typer

from nodes.cli_options import DEFAULT_URL, ApiKey, CaFile, Url

if TYPE_CHECKING:
    from nodes.engine.devices import Provider as EngineProvider
    from nodes.model_tools.inspect_folder import FolderFacts
    from nodes.model_tools.onnx_writer import Progress

EXIT_NETWORK = 1  # the same command may do later
EXIT_USAGE = 2  # something here has to change first
DEFAULT_FOLDER = Path("models")
TEXT_CHARS_SHOWN = 100
PIPE_COLUMNS = 240  # a pipe has no width; there nothing may be cut off

Choice = TypeVar("Choice")

models_app = typer.Typer(
    help="See which models are served, and get, make and check the folders that nodes serve.",
    epilog="From nothing to a served model: ai-cluster models pull onnx-community/Qwen2.5-0.5B-Instruct, then "
    "ai-cluster models check models/Qwen2.5-0.5B-Instruct, then ai-cluster serve --model models/Qwen2.5-0.5B-Instruct",
    no_args_is_help=True,
)

Provider = Annotated[str, typer.Option("--provider", metavar="auto|cpu|cuda", help="where the model runs")]


@contextmanager
def _reported() -> Iterator[None]:
    """A failure is one line on stderr and an exit code; a command of others that failed shows its output before."""
    from nodes.engine.model_loader import ModelFolderInvalid
    from nodes.model_tools.builder_environment import CommandFailed
    from nodes.model_tools.errors import HubUnreachable, ModelToolError

    try:
        yield
    except (ModelToolError, ModelFolderInvalid) as exc:
        if isinstance(exc, CommandFailed):
            print(exc.output, file=sys.stderr)
        print(f"ai-cluster: {exc}", file=sys.stderr)
        raise typer.Exit(EXIT_NETWORK if isinstance(exc, HubUnreachable) else EXIT_USAGE) from exc


@models_app.command("list")
def models_list(
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="list the model folders below DIR instead")
    ] = None,
    api_key: ApiKey = None,
) -> None:
    """List the models that the mesh serves, or with --dir the model folders on this machine."""
    if directory is None:
        from nodes.client import list_models

        raise typer.Exit(list_models(url, ca_file, api_key))
    with _reported():
        _list_folders(directory)


def _list_folders(directory: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from nodes.engine.embedding_folder import is_embedding_folder
    from nodes.engine.model_loader import ModelFolderInvalid
    from nodes.model_tools.errors import ModelToolError
    from nodes.model_tools.inspect_embedding import read_embedding_facts
    from nodes.model_tools.inspect_folder import find_folders, read_facts

    if not directory.is_dir():
        raise ModelToolError(f"{directory} is no folder; give one that holds model folders with --dir")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("folder", "format", "precision"):
        table.add_column(heading, overflow="fold")
    for heading in ("size", "context"):
        table.add_column(heading, justify="right")
    table.add_column("variants", overflow="fold")
    for path in find_folders(directory):
        try:
            if is_embedding_folder(path):
                found = read_embedding_facts(path)
                precision, size = str(found.folder.precision), _size(found.weight_bytes)
                table.add_row(str(path), "embedding", precision, size, str(found.folder.context_length), "")
                continue
            facts = read_facts(path)
        except ModelFolderInvalid as exc:
            table.add_row(str(path), "-", "-", "-", "-", f"cannot be served: {exc.reason}")
            continue
        variants = ", ".join(name or "model.onnx" for name in facts.variants) if len(facts.variants) > 1 else ""
        context = str(facts.folder.context_length)
        table.add_row(
            str(path), facts.layout, str(facts.folder.precision), _size(facts.weight_bytes), context, variants
        )
    if not table.row_count:
        raise ModelToolError(
            f"no folder below {directory} has a model; get one with: ai-cluster models pull OWNER/NAME"
        )
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_COLUMNS)
    console.print(table)


@models_app.command(
    "check",
    epilog="Exit code 0: a node serves this folder. 2: it does not; the line says which thing is wrong and how to "
    "mend it.",
)
def models_check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")],
    load: Annotated[bool, typer.Option("--load/--no-load", help="also load the graph and generate some tokens")] = True,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="which graph, where there are several [what runs best]")
    ] = None,
    provider: Provider = "auto",
    threads: Annotated[int, typer.Option(min=0, help="ONNX Runtime threads; 0: all cores")] = 0,
) -> None:
    """Read everything in a model folder as a node does, run it for some tokens, and print what it is."""
    from nodes.engine.devices import Provider as EngineProvider
    from nodes.engine.embedding_folder import is_embedding_folder
    from nodes.model_tools.inspect_folder import load_facts, read_facts, run_model

    with _reported():
        place = _one_of("--provider", provider, get_args(EngineProvider))
        if is_embedding_folder(folder):
            _check_embedding(folder, variant, place, threads, is_loaded=load)
            return
        facts = read_facts(folder, variant, place)
        model = load_facts(facts)
        _print_facts(facts, model.fingerprint)
        if not load:
            _row("KV per slot", f"{_size(facts.kv_row_bytes * facts.capacity)} at {facts.capacity} tokens")
            return
        run = run_model(facts, provider=place, threads=threads)
        _row("KV per slot", f"{_size(run.kv_slot_bytes)} at {run.capacity} tokens")
        _row("loaded in", f"{run.load_time_s:.1f} s")
        _row("speed", f"{run.tokens_per_s:.1f} tokens/s alone, first token after {run.first_token_s:.2f} s")
        _row("it says", repr(run.text[:TEXT_CHARS_SHOWN]))


def _check_embedding(
    path: Path, variant: str | None, provider: EngineProvider, threads: int, *, is_loaded: bool
) -> None:
    from nodes.model_tools.inspect_embedding import load_embedding_facts, read_embedding_facts, run_embedding_model

    facts = read_embedding_facts(path, variant, provider)
    folder = facts.folder
    model = load_embedding_facts(facts)
    _row("name", folder.path.resolve().name)
    _row("format", f"embedding, {folder.graph_name}")
    _row("precision", str(folder.precision))
    _row("size", _size(facts.weight_bytes))
    _row("context", f"{folder.context_length} tokens")
    _row("vocabulary", f"{model.vocabulary_size} tokens")
    _row("pooling", facts.pooling)
    _row("fingerprint", model.fingerprint)
    if not is_loaded:
        return
    run = run_embedding_model(facts, model, provider=provider, threads=threads)
    _row("dimensions", str(run.dimensions))
    _row("batches", "yes" if run.is_batched else "no: each input is computed alone")
    _row("loaded in", f"{run.load_time_s:.1f} s")
    _row("speed", f"two short texts in {run.seconds * 1000:.1f} ms")
    _row("it says", f"they are alike by {run.similarity:.3f}")


def _print_facts(facts: FolderFacts, fingerprint: str) -> None:
    folder = facts.folder
    _row("name", folder.path.resolve().name)
    _row("format", f"{facts.layout} ({facts.kv} KV), {folder.graph_name}")
    _row("precision", str(folder.precision))
    _row("size", _size(facts.weight_bytes))
    window = f", looks back {folder.sliding_window}" if folder.sliding_window else ""
    _row("context", f"{folder.context_length} tokens{window}")
    _row("vocabulary", f"{folder.vocabulary_size} tokens, ends with {', '.join(map(str, sorted(folder.eos_ids)))}")
    _row("template", facts.template)
    _row("fingerprint", fingerprint)


def _row(name: str, value: str) -> None:
    print(f"{name:12} {value}")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


@models_app.command(
    "pull",
    epilog="HF_ENDPOINT names another hub or a mirror, HF_TOKEN the account. Running the command again goes on where a "
    "download broke, and checks a complete folder against its manifest.json without the network. Exit code 1: the "
    "network or the hub failed, try again later.",
)
def models_pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME")],
    revision: Annotated[
        str | None,
        typer.Option(metavar="REV", help="branch, tag or commit [what the folder is pinned to, else the newest]"),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="which graph, such as q4, fp16, model_q4.onnx [what runs best on a CPU]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="folder to fill [models/NAME]")] = None,
) -> None:
    """Download what a node needs of a repository on a model hub, and nothing else."""
    from nodes.model_tools.pull import pull

    with _reported():
        folder = out or DEFAULT_FOLDER / (repo.rpartition("/")[2] or repo)
        pulled = pull(repo, revision=revision, variant=variant, out=folder, say=_say)
        files = len(pulled.manifest.files)
        if pulled.downloaded_files:
            size = _size(pulled.downloaded_bytes)
            print(f"{folder}: {pulled.downloaded_files} of {files} files downloaded ({size}), hashes right")
        else:
            print(f"{folder}: complete, all {files} files as in its manifest; nothing downloaded")
        _next_steps(folder)


@models_app.command(
    "build",
    epilog="The first build makes an environment of its own with torch, transformers and the builder (several GB), "
    "because the builder's package would overwrite the runtime that nodes use. Later builds use it again.",
)
def models_build(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="config.json, tokenizer.json, *.safetensors")],
    precision: Annotated[str, typer.Option(metavar="int4|fp16|fp32")] = "int4",
    block_size: Annotated[
        int,
        typer.Option(metavar="N", help="weights that share a scale, of int4: 128 is faster, 32 is exact in batches"),
    ] = 32,
    target: Annotated[
        str | None, typer.Option("--for", metavar="cpu|cuda", help="device to build for [cuda for fp16, else cpu]")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="folder to make [models/NAME-PRECISION]")] = None,
    environment: Annotated[
        Path | None, typer.Option("--env", metavar="DIR", help="builder's environment [in the user's cache]")
    ] = None,
) -> None:
    """Turn a Hugging Face model folder into one that nodes serve, by the onnxruntime-genai builder."""
    from nodes.model_tools.build import BUILD_BLOCK_SIZES, BUILD_PRECISIONS, BUILD_TARGETS, build
    from nodes.model_tools.builder_environment import default_environment

    with _reported():
        folder = build(
            source,
            out=out or DEFAULT_FOLDER / f"{source.resolve().name}-{precision}",
            precision=_one_of("--precision", precision, BUILD_PRECISIONS),
            block_size=_one_of("--block-size", block_size, BUILD_BLOCK_SIZES),
            target=None if target is None else _one_of("--for", target, BUILD_TARGETS),
            environment=environment or default_environment(),
            say=_say,
        )
        print(f"{folder}: built and checked")
        _next_steps(folder)


@models_app.command(
    "random",
    epilog="Example: ai-cluster models random llama:200m --precision int4 --block-size 128 --out models/bench",
)
def models_random(
    shape: Annotated[
        str, typer.Argument(metavar="SHAPE", help="llama:tiny, :200m, :1b, :7b; embeddings: bert:tiny, :22m")
    ],
    precision: Annotated[
        str, typer.Option(metavar="fp32|fp16|int4|int4-fp16", help="int4-fp16: the rest in halves, for GPUs")
    ] = "fp32",
    block_size: Annotated[int, typer.Option(metavar="32|128", help="weights that share a scale, of int4")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same bytes")] = 7,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="folder to make [models/SHAPE-PRECISION]")] = None,
) -> None:
    """Make a model of a given shape with random weights, for benchmarks and trials without a download: it answers noise
    at a real model's speed. bert: an embedding model."""
    from nodes.model_tools.errors import ModelToolError
    from nodes.model_tools.llama_onnx import PRECISIONS
    from nodes.model_tools.quantise import BLOCK_SIZES
    from nodes.model_tools.random_encoder import ENCODER_SIZES, write_random_encoder
    from nodes.model_tools.random_llama import SIZES, write_random_llama

    with _reported():
        shapes = [*(f"llama:{size}" for size in SIZES), *(f"bert:{size}" for size in ENCODER_SIZES)]
        kind, _, size = _one_of("SHAPE", shape, shapes).partition(":")
        precision = _one_of("--precision", precision, PRECISIONS)
        _one_of("--block-size", block_size, BLOCK_SIZES)
        if kind == "bert" and precision != "fp32":
            raise ModelToolError(f"{shape} is made in fp32 alone; leave --precision {precision} out")
        folder = out or DEFAULT_FOLDER / f"{shape.replace(':', '-')}-{precision}"
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ModelToolError(f"{folder} is there already; give another folder with --out, or remove it")
        if kind == "bert":
            _make_random(folder, shape, lambda scratch, _: write_random_encoder(scratch, ENCODER_SIZES[size], seed))
            print(f"{folder}: {_size(_folder_bytes(folder))}")
        else:

            def write(scratch: Path, progress: Progress) -> None:
                write_random_llama(scratch, size, seed, precision=precision, block_size=block_size, progress=progress)

            _make_random(folder, f"{shape} in {precision}", write)
            parameters = SIZES[size].parameter_count() / 1e6
            print(f"{folder}: {parameters:,.1f} million parameters, {_size(_folder_bytes(folder))}")
        _next_steps(folder)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _make_random(folder: Path, what: str, write: Callable[[Path, Progress], object]) -> None:
    """The folder appears whole or not at all; it must not exist or be empty. Raises ModelToolError."""
    from rich import progress as bars
    from rich.console import Console

    from nodes.model_tools.errors import ModelToolError

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TimeRemainingColumn(),
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch,
            bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown,
        ):
            task = shown.add_task(what, total=None)
            write(Path(scratch) / "model", lambda written, total: shown.update(task, completed=written, total=total))
            if folder.exists():
                folder.rmdir()
            (Path(scratch) / "model").rename(folder)
    except MemoryError as exc:
        raise ModelToolError(f"{what} needs more memory than is free; make a smaller one") from exc
    except OSError as exc:
        raise ModelToolError(f"{exc.filename or folder}: {exc.strerror}; give a writable folder with --out") from exc


def _one_of(name: str, value: object, allowed: Sequence[Choice]) -> Choice:
    from nodes.model_tools.errors import ModelToolError

    for candidate in allowed:
        if candidate == value:
            return candidate
    raise ModelToolError(f"{name} {value} is none of {', '.join(map(str, allowed))}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _next_steps(folder: Path) -> None:
    print(f"check it: ai-cluster models check {folder}")
    print(f"serve it: ai-cluster serve --model {folder}")
