"""The models of one node and their engines: loaded one after the other, watched, and told of to the mesh."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio

from mesh.view import EMBEDDING, GENERATION, ModelInfo, ModelLoad, Readiness
from nodes.config import ConfigInvalid, NodeConfig
from nodes.engine.embedding_engine import EmbeddingEngine, load_embedding_engine
from nodes.engine.embedding_folder import EmbeddingFolder
from nodes.engine.engine import Engine, load_engine
from nodes.engine.engine_statistics import FAILED, STUCK, EngineStatistics
from nodes.engine.model_folder import ModelFolderInvalid
from nodes.engine.model_kinds import AnyFolder

logger = logging.getLogger(__name__)

MIB = 1024 * 1024


class NodeModels:
    """generation, embedding: the loaded engines by the names of their models; they grow while load() runs.

    readiness: of the engines. Names are those of the folders, whether loaded yet or not.
    """

    def __init__(self, config: NodeConfig, folders: list[tuple[str, AnyFolder]]) -> None:
        self.generation: dict[str, Engine] = {}
        self.embedding: dict[str, EmbeddingEngine] = {}
        self.readiness = Readiness.LOADING
        self._config = config
        self._folders = folders

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self._folders]

    async def load(self, engines: trio.Nursery, loaded: Callable[[str, EngineStatistics], None]) -> None:
        """Load one model after the other in a worker thread and run its engine in `engines`; loaded: told of each.

        Raises ConfigInvalid for a model that cannot be loaded."""
        for name, folder in self._folders:
            logger.info("loading a model", extra={"model": name})
            try:
                engine = await trio.to_thread.run_sync(self._load_engine, folder, abandon_on_cancel=True)
            except ModelFolderInvalid as exc:
                raise ConfigInvalid(str(exc)) from exc
            await engines.start(engine.run)
            if isinstance(engine, EmbeddingEngine):
                self.embedding[name] = engine
            else:
                self.generation[name] = engine
            loaded(name, engine.statistics())

    def ready(self) -> None:
        """All that was to be loaded is, and what else the node waited for has come."""
        self.readiness = Readiness.READY

    def check(self) -> None:
        """Set readiness by the engines: with one that has failed, or is stuck in a step, a node takes no requests, in
        the second case for a while."""
        states = {statistics.state for statistics in self.statistics().values()}
        if self.readiness is Readiness.READY and states & {FAILED, STUCK}:
            self.readiness = Readiness.FAILED
            if FAILED in states:
                logger.error("an engine has failed; this node takes no more requests until it is restarted")
        elif self.readiness is Readiness.FAILED and not states & {FAILED, STUCK}:
            self.readiness = Readiness.READY

    def statistics(self) -> dict[str, EngineStatistics]:
        """Of every engine that is loaded, by the name of its model."""
        engines = self.generation | self.embedding
        return {name: engine.statistics() for name, engine in engines.items()}

    def active_requests(self) -> int:
        return sum(engine.active + engine.queued for engine in self.statistics().values())

    def cached_conversations(self) -> dict[str, list[tuple[int, ...]]]:
        """By model: what its prefix cache holds, as names of text blocks."""
        return {name: engine.cached_conversations() for name, engine in self.generation.items()}

    def infos(self) -> tuple[ModelInfo, ...]:
        """What this node serves. What still loads is told of too: it is refused for now, not unknown."""
        models = []
        for name, folder in self._folders:
            engine = self.generation.get(name) or self.embedding.get(name)
            models.append(
                ModelInfo(
                    name=name,
                    fingerprint=engine.fingerprint if engine else "",
                    context_length=engine.context_length if engine else folder.context_length,
                    slots=engine.statistics().slots if engine else 0,
                    queue_limit=self._config.queue,
                    kind=EMBEDDING if isinstance(folder, EmbeddingFolder) else GENERATION,
                )
            )
        return tuple(models)

    def _load_engine(self, folder: AnyFolder) -> Engine | EmbeddingEngine:
        """Raises ModelFolderInvalid."""
        config = self._config
        options: dict[str, Any] = {
            "queue_limit": config.queue,
            "threads": config.threads,
            "spinning": config.spinning,
            "provider": config.provider,
            "memory_limit_bytes": None if config.memory_limit_mib is None else config.memory_limit_mib * MIB,
            "device_index": config.device,
        }
        if isinstance(folder, EmbeddingFolder):
            return load_embedding_engine(folder, **options)
        return load_engine(folder, slots=config.slots, capacity=config.capacity, **options)


def model_load(engine: EngineStatistics) -> ModelLoad:
    """What the mesh is told of an engine's load."""
    return ModelLoad(
        active=engine.active,
        queued=engine.queued,
        free_slots=engine.free_slots,
        prefill_rate=engine.prefill_rate,
        decode_rate=engine.decode_rate,
        step_count=engine.step_count,
        queued_tokens=engine.queued_tokens,
        step_s=engine.median_step_s,
        wait_s=engine.first_token.wait_s,
        prompt_token_s=engine.first_token.prompt_token_s,
        answer_tokens=engine.answer_tokens,
    )
