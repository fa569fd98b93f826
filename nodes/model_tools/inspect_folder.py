"""What is in a model folder, and whether a node can serve it: read, then loaded and run for some tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from nodes.engine.chat_template import ChatTemplateError
from nodes.engine.devices import Provider
from nodes.engine.engine import Engine, load_engine
from nodes.engine.errors import EngineError
from nodes.engine.graph import KvKind, describe_graph
from nodes.engine.memory import CAPACITY_DEFAULT_MAX
from nodes.engine.model_loader import LoadedModel, ModelFolder, ModelFolderInvalid, load_model, read_model_folder
from nodes.engine.model_variants import find_variants
from nodes.engine.sampling import SamplingParams
from nodes.model_tools.errors import ModelToolError

TEMPLATE_FILE = "chat_template.jinja"
CHECK_PROMPT = "Hello! Who are you?"
CHECK_TOKENS = 24  # a second on a slow machine, and enough to see whether the model makes words
CHECK_TIMEOUT_S = 300.0
LIST_DEPTH_MAX = 3  # models/OWNER/NAME
LIST_FOLDERS_MAX = 2_000
CONFIG_FILES = ("genai_config.json", "config.json")


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """What reading tells. Sizes in bytes, lengths in tokens. layout: who writes such folders. kv: how the graph keeps
    keys and values. kv_row_bytes: of one token. template: the file it is in. variants: the graphs to choose from."""

    folder: ModelFolder
    layout: str
    kv: KvKind
    weight_bytes: int
    kv_row_bytes: int
    template: str
    variants: tuple[str, ...]

    @property
    def capacity(self) -> int:
        """What a node gives a slot unless it is told otherwise, memory permitting."""
        window = self.folder.sliding_window or 0
        return min(max(CAPACITY_DEFAULT_MAX, window), self.folder.context_length)


@dataclass(frozen=True, slots=True)
class Run:
    """What a short greedy run on the loaded model gave. kv_slot_bytes: of one slot at its capacity."""

    capacity: int
    kv_slot_bytes: int
    load_time_s: float
    first_token_s: float
    tokens: int
    tokens_per_s: float
    text: str


def read_facts(path: Path, variant: str | None = None, provider: Provider = "auto") -> FolderFacts:
    """All but tokenizer and weights. Raises ModelFolderInvalid."""
    folder = read_model_folder(path, variant, provider)
    graph = describe_graph(folder)
    try:
        weight_bytes = sum(file.stat().st_size for file in folder.weight_files())
    except OSError as exc:
        raise ModelFolderInvalid(path, f"{exc.filename} cannot be read ({exc.strerror})", "make it readable") from exc
    return FolderFacts(
        folder=folder,
        layout="genai" if folder.config_file == CONFIG_FILES[0] else "optimum",
        kv=graph.kind,
        weight_bytes=weight_bytes,
        kv_row_bytes=graph.kv_bytes_per_row,
        template=TEMPLATE_FILE if (path / TEMPLATE_FILE).is_file() else "tokenizer_config.json",
        variants=tuple(sorted(find_variants(path))),
    )


def prompt_of(model: LoadedModel) -> list[int]:
    """Token ids of a plain question, through template and tokenizer. Raises ModelToolError."""
    try:
        text = model.chat_template.render([{"role": "user", "content": CHECK_PROMPT}])
    except ChatTemplateError as exc:
        raise ModelToolError(f"{exc}; put the model's own template into {TEMPLATE_FILE}") from exc
    return model.tokenizer.encode(text)


def load_facts(facts: FolderFacts) -> LoadedModel:
    """Tokenizer, template and fingerprint, which reads every byte; the template is tried. Raises ModelFolderInvalid,
    ModelToolError."""
    model = load_model(facts.folder)
    prompt_of(model)
    return model


def run_model(facts: FolderFacts, *, provider: Provider, threads: int) -> Run:
    """Load the graph as a node does, with one slot, and let it answer. Raises ModelFolderInvalid, ModelToolError."""
    engine = load_engine(facts.folder, slots=1, queue_limit=1, threads=threads, provider=provider)
    answer = trio.run(_answer, engine)
    if isinstance(answer, Run):
        return answer
    path = facts.folder.path
    if isinstance(answer, trio.TooSlowError):
        raise ModelToolError(
            f"{path}: {CHECK_TOKENS} tokens took more than {CHECK_TIMEOUT_S:g} s; this machine is too slow for it, so "
            "choose a smaller model or variant"
        ) from answer
    raise ModelToolError(f"{path}: it loads and does not run: {answer}; build or pull it again") from answer


async def _answer(engine: Engine) -> Run | EngineError | trio.TooSlowError:
    """A failure is returned: raised through the nursery, it would be in a group."""
    prompt_ids = prompt_of(engine.model)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        try:
            with trio.fail_after(CHECK_TIMEOUT_S):
                return await _generate(engine, prompt_ids)
        except (EngineError, trio.TooSlowError) as exc:
            return exc
        finally:
            nursery.cancel_scope.cancel()
    raise AssertionError("the nursery returns")


async def _generate(engine: Engine, prompt_ids: list[int]) -> Run:
    params = SamplingParams(temperature=0.0, max_tokens=CHECK_TOKENS, ignore_eos=True)
    started = time.monotonic()
    first_token_s, text, tokens = 0.0, "", 0
    async for event in engine.submit(prompt_ids, params, engine.now() + CHECK_TIMEOUT_S):
        if not tokens:
            first_token_s = time.monotonic() - started
        text += event.text
        tokens = event.completion_tokens
    statistics = engine.statistics()
    return Run(
        capacity=engine.context_length,
        kv_slot_bytes=statistics.kv_bytes // statistics.slots,
        load_time_s=statistics.load_time_s,
        first_token_s=first_token_s,
        tokens=tokens,
        # Not by the clock of this reader: events that wait for it come as one.
        tokens_per_s=statistics.decode_rate,
        text=text,
    )


def find_folders(top: Path) -> Iterator[Path]:
    """Folders at or below top that look like a model's, in order. Hidden ones and those inside a model are left out."""
    for seen, (directory, names, files) in enumerate(os.walk(top)):
        if seen >= LIST_FOLDERS_MAX:
            raise ModelToolError(f"{top} has more than {LIST_FOLDERS_MAX} folders; give the one that holds the models")
        path = Path(directory)
        is_model = CONFIG_FILES[0] in files or (CONFIG_FILES[1] in files and bool(find_variants(path)))
        if is_model:
            yield path
        deep = len(path.relative_to(top).parts) >= LIST_DEPTH_MAX
        names[:] = [] if is_model or deep else sorted(name for name in names if not name.startswith("."))
