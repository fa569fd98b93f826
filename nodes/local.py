"""The Generator whose tokens this node's own engines make: messages to a prompt, the engine's events to the mesh's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal, Protocol, cast, get_args

import trio

from mesh.errors import ModelUnknown, NoCapacity
from nodes.engine.chat_template import ChatTemplateError
from nodes.engine.engine import Engine
from nodes.engine.errors import (
    DeadlinePassed,
    EngineError,
    EngineFault,
    EngineOverflow,
    EngineStopped,
    PromptTooLong,
    QueueFull,
    TokenUnknown,
)
from nodes.engine.grammar import GrammarInvalid, GrammarMatcher, GrammarUnavailable
from nodes.engine.model_loader import LoadedModel
from nodes.engine.sampling import GrammarKind, GrammarSpec, SamplingParams, TokenLogprobs
from nodes.engine.sequence import EngineEvent
from nodes.engine.stream import EngineStream
from nodes.engine.tokenizer import ENCODE_INLINE_BYTES_MAX, Tokenizer
from nodes.generation import (
    PRIORITY_DEFAULT,
    DeadlineExceeded,
    GenerateEvent,
    GenerateRequest,
    GenerationError,
    GenerationFailed,
    Grammar,
    RequestInvalid,
    TokenLogprob,
    Usage,
)
from nodes.generation_spans import GenerationSpans, trace_refusal
from observability.tracing import NO_TRACING, Tracer, log_fields

MODEL_NAME_CHARS_SHOWN = 100  # clients choose the name, and error messages quote it

Status = Literal["success", "error", "cancelled", "rejected"]


class Observer(Protocol):
    """Told of every generation that a local engine is asked for: started once, then finished exactly once.

    A request that is invalid, or for a model not served here, is not told of. seconds: since open() was called.
    labels: what tells the request from others, for exemplars.
    """

    def started(self, model: str) -> None: ...

    def first_token(self, model: str, seconds: float, queued_s: float | None, labels: Mapping[str, str]) -> None:
        """queued_s: how much of it the request waited for a slot; None where it needed none."""
        ...

    def next_tokens(self, model: str, seconds: float, count: int) -> None:
        """seconds: since the event before; count: the tokens that came with this one."""
        ...

    def finished(
        self,
        model: str,
        status: Status,
        seconds: float,
        prompt_tokens: int,
        completion_tokens: int,
        labels: Mapping[str, str],
        finish_reason: str | None,
    ) -> None:
        """success: it gave its last event, which has the finish_reason. error: our fault, or it was too late.
        cancelled: closed before the end. rejected: it found no capacity, so no prompt token was processed."""
        ...


class LocalGenerator:
    """Generates on the engines of this node. engines: by model name; it may gain and lose entries at any time. tracer:
    of the phases of generations that are sampled."""

    def __init__(
        self, engines: Mapping[str, Engine], *, observer: Observer | None = None, tracer: Tracer = NO_TRACING
    ) -> None:
        self._engines = engines
        self._observer = observer
        self._tracer = tracer

    async def open(self, request: GenerateRequest) -> LocalStream:
        """Raises ModelUnknown, RequestInvalid, NoCapacity, and GenerationFailed when the engine does not run or cannot
        go on with the ids given."""
        started = trio.current_time()
        engine = self._engines.get(request.model)
        if engine is None:
            raise ModelUnknown(f"this node has no model named {request.model[:MODEL_NAME_CHARS_SHOWN]!r}")
        if request.fingerprint not in ("", engine.fingerprint):
            raise GenerationFailed("the model of this node differs from the one that began the answer")
        deadline = engine.now() + request.deadline_s
        if not request.generated_ids:  # else whoever began the answer took them
            _check_bias(request, engine.vocabulary_size)
        if request.text_bytes() > ENCODE_INLINE_BYTES_MAX:
            prompt_ids = await trio.to_thread.run_sync(_prompt_ids, engine, request)
        else:
            prompt_ids = _prompt_ids(engine, request)
            await trio.lowlevel.checkpoint()
        params = _params(engine.model, request)
        matcher = None
        if params.grammar is not None:
            matcher = await trio.to_thread.run_sync(_compile, engine, params.grammar)
        record = _Record(self._observer, request, started)
        try:
            stream = engine.submit(
                prompt_ids,
                params,
                deadline,
                generated_ids=request.generated_ids,
                fairness_id=request.fairness_id,
                weight=max(1, request.priority) / PRIORITY_DEFAULT,
                text_blocks=request.text_blocks(),
                matcher=matcher,
            )
        except PromptTooLong as exc:
            raise _too_long(exc, request) from exc
        except TokenUnknown as exc:
            if isinstance(request.prompt, tuple) and not request.generated_ids:
                raise RequestInvalid(str(exc), param="prompt") from exc
            raise GenerationFailed(str(exc)) from exc
        except QueueFull as exc:
            record.begin()
            record.end("rejected")
            trace_refusal(self._tracer, request.trace, request.model, type(exc).__name__)
            raise NoCapacity(str(exc), exc.retry_after_s) from exc
        except (EngineFault, EngineStopped) as exc:
            record.begin()
            record.end("error")
            trace_refusal(self._tracer, request.trace, request.model, type(exc).__name__)
            raise GenerationFailed(str(exc)) from exc
        record.begin()
        if request.trace is not None and request.trace.is_sampled:
            record.spans = GenerationSpans(self._tracer, request, stream, engine.now())
        return LocalStream(stream, record, engine.model.tokenizer)


def _check_bias(request: GenerateRequest, vocabulary_size: int) -> None:
    """Raises RequestInvalid for a token id that the model does not have: it is meant for another tokenizer."""
    for token_id, _ in request.sampling.logit_bias:
        if not 0 <= token_id < vocabulary_size:
            raise RequestInvalid(f"logit_bias: {TokenUnknown(token_id, vocabulary_size)}", param="logit_bias")


def _params(model: LoadedModel, request: GenerateRequest) -> SamplingParams:
    sampling = request.sampling
    return SamplingParams(
        temperature=model.temperature if sampling.temperature is None else sampling.temperature,
        top_p=model.top_p if sampling.top_p is None else sampling.top_p,
        is_seeded=sampling.seed is not None,
        seed=request.noise_seed if sampling.seed is None else sampling.seed,
        max_tokens=sampling.max_tokens,
        stop=sampling.stop,
        ignore_eos=sampling.ignore_eos,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=sampling.logit_bias,
        choice=sampling.choice,
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs,
        grammar=_grammar(sampling.grammar),
    )


def _grammar(grammar: Grammar | None) -> GrammarSpec | None:
    """Raises RequestInvalid for a kind that this version does not know."""
    if grammar is None:
        return None
    if grammar.kind not in get_args(GrammarKind):
        raise RequestInvalid(f"grammars of kind {grammar.kind!r} are not known here", param="response_format")
    return GrammarSpec(cast(GrammarKind, grammar.kind), grammar.text)


def _compile(engine: Engine, spec: GrammarSpec) -> GrammarMatcher:
    """Raises RequestInvalid."""
    try:
        return engine.compile_grammar(spec)
    except (GrammarInvalid, GrammarUnavailable) as exc:
        raise RequestInvalid(str(exc), param="response_format") from exc


def _prompt_ids(engine: Engine, request: GenerateRequest) -> list[int]:
    """Raises RequestInvalid when the model's template does not take the messages, or they are far too long."""
    if isinstance(request.prompt, tuple):
        prompt_ids = list(request.prompt)
    else:
        is_raw = request.prompt is not None
        text = request.prompt if request.prompt is not None else _render(engine.model, request)
        try:
            prompt_ids = engine.model.tokenizer.encode(text, engine.context_length - 1, adds_special_tokens=is_raw)
        except PromptTooLong as exc:
            raise _too_long(exc, request) from exc
    if not prompt_ids:
        message = "the messages give an empty prompt" if request.prompt is None else "the prompt is empty"
        raise RequestInvalid(message, param=_prompt_param(request))
    return prompt_ids


def _render(model: LoadedModel, request: GenerateRequest) -> str:
    """Raises RequestInvalid."""
    try:
        tools = json.loads(request.tools) if request.tools else []
        messages = [
            dict(message) | {"tool_calls": json.loads(message["tool_calls"])} if "tool_calls" in message else message
            for message in request.messages
        ]
    except (ValueError, RecursionError) as exc:
        raise RequestInvalid(f"tools or calls of tools are no JSON: {type(exc).__name__}", param="tools") from exc
    try:
        return model.chat_template.render(messages, tools)
    except ChatTemplateError as exc:
        raise RequestInvalid(str(exc), param="messages") from exc


def _too_long(error: PromptTooLong, request: GenerateRequest) -> RequestInvalid:
    return RequestInvalid(str(error), param=_prompt_param(request), code="context_length_exceeded")


def _prompt_param(request: GenerateRequest) -> str:
    return "messages" if request.prompt is None else "prompt"


class _Record:
    """Tells the observer of one request, whatever happens to it: once that it started, once how it ended."""

    def __init__(self, observer: Observer | None, request: GenerateRequest, started: float) -> None:
        self._observer = observer
        self._model = request.model
        self._labels = {"request_id": request.request_id, **log_fields(request.trace)}
        self._started = started
        self.spans: GenerationSpans | None = None
        # Of an answer begun elsewhere these are counted there, and so is the prompt.
        self._resumed_tokens = len(request.generated_ids)
        self._last_event_at: float | None = None
        self._finish_reason: str | None = None
        self._has_begun = False
        self._has_ended = False
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def begin(self) -> None:
        if self._observer is not None:
            self._observer.started(self._model)

    def note(self, event: EngineEvent, queued_s: float | None) -> None:
        self.prompt_tokens = 0 if self._resumed_tokens else event.prompt_tokens
        self.completion_tokens = event.completion_tokens - self._resumed_tokens
        self._finish_reason = event.finish_reason
        is_first, self._has_begun = not self._has_begun, True
        if is_first and self.spans is not None:
            self.spans.first_event(event)
        if self._observer is None:
            return
        now = trio.current_time()
        if self._last_event_at is None:
            self._observer.first_token(self._model, now - self._started, queued_s, self._labels)
        elif event.token_ids:
            self._observer.next_tokens(self._model, now - self._last_event_at, len(event.token_ids))
        self._last_event_at = now

    def end(self, status: Status, error: str = "") -> None:
        """error: its type, for the trace. The first call counts."""
        if self.spans is not None and not self._has_ended:
            self.spans.end(self.completion_tokens, self._finish_reason, error)
        if self._observer is not None and not self._has_ended:
            seconds = trio.current_time() - self._started
            self._observer.finished(
                self._model,
                status,
                seconds,
                self.prompt_tokens,
                self.completion_tokens,
                self._labels,
                self._finish_reason,
            )
        self._has_ended = True


class LocalStream(trio.abc.ReceiveChannel[GenerateEvent]):
    """The events of one generation on a local engine. Closing it cancels and frees the slot within one step.

    completion_tokens in its usage are the tokens of the answer; the end-of-sequence token is not one of them.
    """

    def __init__(self, stream: EngineStream, record: _Record, tokenizer: Tokenizer) -> None:
        self._stream = stream
        self._record = record
        self._tokenizer = tokenizer

    async def receive(self) -> GenerateEvent:
        """Raises DeadlineExceeded, GenerationFailed, NoCapacity when another asker got its place in the queue, and
        trio.EndOfChannel after the last event."""
        try:
            event = await self._stream.receive()
        except EngineError as exc:
            self._record.end(_status_of(exc), type(exc).__name__)
            raise _generation_error(exc) from exc
        self._record.note(event, self._stream.queued_s)
        logprobs = tuple(map(self._logprob, event.logprobs)) if event.logprobs else ()
        if event.finish_reason is None:
            return GenerateEvent(event.text, event.token_ids, logprobs=logprobs)
        self._record.end("success")
        usage = Usage(event.prompt_tokens, event.completion_tokens, event.cached_tokens, self._stream.queued_s)
        return GenerateEvent(event.text, event.token_ids, event.finish_reason, usage, logprobs)

    def _logprob(self, row: TokenLogprobs) -> TokenLogprob:
        return TokenLogprob(
            self._token(row.token_id), row.logprob, tuple((self._token(other), value) for other, value in row.top)
        )

    def _token(self, token_id: int) -> str:
        """Its text; of a special token, which has none, the name."""
        return self._tokenizer.decode([token_id]) or self._tokenizer.token(token_id) or ""

    async def aclose(self) -> None:
        self._record.end("cancelled")
        await self._stream.aclose()


def _status_of(error: EngineError) -> Status:
    """A reader that left its events unread has as good as gone; the rest is our fault, or for want of room."""
    if isinstance(error, EngineOverflow):
        return "cancelled"
    return "rejected" if isinstance(error, QueueFull) else "error"


def _generation_error(error: EngineError) -> GenerationError | NoCapacity:
    if isinstance(error, DeadlinePassed):
        return DeadlineExceeded(str(error))
    if isinstance(error, QueueFull):
        return NoCapacity(str(error), error.retry_after_s)
    return GenerationFailed(str(error))
