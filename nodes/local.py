"""Generations of this node's own engines: the Generator that turns messages into tokens and events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Protocol

import trio

from mesh.errors import ModelUnknown, NoCapacity
from nodes.engine.chat_template import ChatTemplateError
from nodes.engine.engine import (
    DeadlinePassed,
    Engine,
    EngineError,
    EngineStream,
    PromptTooLong,
    QueueFull,
)
from nodes.engine.sequence import SamplingParams
from nodes.engine.tokenizer import ENCODE_INLINE_CHARS_MAX
from nodes.generation import (
    DeadlineExceeded,
    GenerateEvent,
    GenerateRequest,
    GenerationError,
    GenerationFailed,
    RequestInvalid,
    Usage,
)


class Observer(Protocol):
    """Told of every generation executed here, each exactly once; observability.metrics.ExecutorMetrics is the real one.

    status: success, error (our fault), cancelled (the reader left), rejected (never begun)."""

    def started(self, model: str) -> None: ...
    def first_token(self, model: str, seconds: float) -> None: ...
    def finished(self, model: str, status: str, seconds: float, prompt_tokens: int, completion_tokens: int) -> None: ...


class LocalGenerator:
    """engines: by model name; may grow while models load."""

    def __init__(self, engines: Mapping[str, Engine], observer: Observer) -> None:
        self._engines = engines
        self._observer = observer

    async def open(self, request: GenerateRequest) -> trio.abc.ReceiveChannel[GenerateEvent]:
        """Render, encode and queue. Raises ModelUnknown, RequestInvalid, NoCapacity, GenerationFailed."""
        engine = self._engines.get(request.model)
        if engine is None:
            raise ModelUnknown(f"this node has no model named {request.model[:100]!r}")
        started = time.monotonic()
        self._observer.started(request.model)
        try:
            return await self._open(engine, request, started)
        except BaseException as exc:
            status = "cancelled"
            if isinstance(exc, Exception):
                status = "rejected" if isinstance(exc, RequestInvalid | NoCapacity) else "error"
            self._observer.finished(request.model, status, time.monotonic() - started, 0, 0)
            raise

    async def _open(self, engine: Engine, request: GenerateRequest, started: float) -> LocalStream:
        if request.text_bytes() > ENCODE_INLINE_CHARS_MAX:
            prompt = await trio.to_thread.run_sync(_encode, engine, request)
        else:
            await trio.lowlevel.checkpoint()
            prompt = _encode(engine, request)
        sampling = request.sampling
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            max_tokens=sampling.max_tokens or engine.context_length,
            stop=sampling.stop,
            ignore_eos=sampling.ignore_eos,
        )
        try:
            stream = engine.submit(prompt, params, request.deadline_s)
        except PromptTooLong as exc:
            raise RequestInvalid(str(exc), param="messages", code="context_length_exceeded") from exc
        except QueueFull as exc:
            raise NoCapacity(str(exc), exc.retry_after_s) from exc
        except EngineError as exc:
            raise GenerationFailed(str(exc)) from exc
        return LocalStream(stream, request.model, self._observer, started, len(prompt))


class LocalStream(trio.abc.ReceiveChannel[GenerateEvent]):
    """The events of one generation, and its report to the observer when it is over, whatever ended it."""

    def __init__(
        self, stream: EngineStream, model: str, observer: Observer, started: float, prompt_tokens: int
    ) -> None:
        self._stream = stream
        self._model = model
        self._observer = observer
        self._started = started
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._has_begun = False
        self._is_reported = False

    async def receive(self) -> GenerateEvent:
        try:
            event = await self._stream.receive()
        except EngineError as exc:
            self._report("error")
            raise _as_generation_error(exc) from exc
        if not self._has_begun:
            self._has_begun = True
            self._observer.first_token(self._model, time.monotonic() - self._started)
        self._completion_tokens += len(event.token_ids)
        if event.finish_reason is None:
            return GenerateEvent(event.text, event.token_ids)
        self._completion_tokens = event.completion_tokens
        self._report("success")
        usage = Usage(event.prompt_tokens, event.completion_tokens)
        return GenerateEvent(event.text, event.token_ids, event.finish_reason, usage)

    async def aclose(self) -> None:
        self._stream.close()
        self._report("cancelled")
        await trio.lowlevel.checkpoint()

    def _report(self, status: str) -> None:
        if not self._is_reported:
            self._is_reported = True
            seconds = time.monotonic() - self._started
            self._observer.finished(self._model, status, seconds, self._prompt_tokens, self._completion_tokens)


def _encode(engine: Engine, request: GenerateRequest) -> tuple[int, ...]:
    """Raises RequestInvalid where the model's template refuses the messages, or makes nothing of them."""
    try:
        prompt = engine.folder.tokenizer.encode(engine.folder.template.render(request.messages))
    except ChatTemplateError as exc:
        raise RequestInvalid(str(exc), param="messages") from exc
    if not prompt:
        raise RequestInvalid("the messages make an empty prompt", param="messages")
    return prompt


def _as_generation_error(error: EngineError) -> GenerationError:
    return DeadlineExceeded(str(error)) if isinstance(error, DeadlinePassed) else GenerationFailed(str(error))
