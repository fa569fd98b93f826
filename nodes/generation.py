"""One generation, from any side: what is asked, what comes back, what can go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import trio

from nodes.engine.prefix_digest import BYTES_MAX, text_blocks
from observability.trace_context import TraceContext

PRIORITY_DEFAULT = 10
FINISH_STOP = "stop"
FINISH_LENGTH = "length"
# Of English text and usual vocabularies, for prompts of ids whose text nobody knows.
BYTES_PER_TOKEN = 4
# An id and the blank after it take two bytes at least, so no more of them have names.
PROMPT_IDS_NAMED_MAX = BYTES_MAX // 2


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like. kind and text: as nodes.engine.sampling.GrammarSpec has them."""

    kind: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens, in the words of nodes.engine.sampling.SamplingParams. temperature 0 is greedy.

    None leaves temperature and top_p to the model folder, and the seed to the entry node (GenerateRequest.noise_seed).
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None  # None: what is left of the context
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None  # how many of the likeliest tokens to tell beside each chosen one
    choice: int = 0  # which of several answers to one prompt
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What to generate. messages: OpenAI chat messages with text content; each has role and content, and may have name,
    tool_call_id, and tool_calls as JSON text. tools: what the model may call, OpenAI's list of them as JSON text; empty
    where there are none. prompt: a text, or token ids, for the model as it is; then there are no messages.
    deadline_s: seconds left, counted from when it is opened. noise_seed: of the sampling where the client gave no seed;
    an answer that goes on elsewhere draws the same noise. generated_ids: what another node has generated of the answer;
    it goes on at the next token. fingerprint: of the model that these ids are of; empty where there are none.
    fairness_id: whose request it is, an API key's id. priority: its share of a busy engine in proportion to others'.
    trace: of the span it is opened under; None where there is no trace."""

    request_id: str
    model: str
    messages: tuple[Mapping[str, str], ...]
    sampling: Sampling = field(default_factory=Sampling)
    deadline_s: float = 600.0
    hops: int = 0  # how many nodes have forwarded it; one is the limit
    entry_node: str = ""
    noise_seed: int = 0
    generated_ids: tuple[int, ...] = ()
    fingerprint: str = ""
    fairness_id: str = ""
    priority: int = PRIORITY_DEFAULT
    tools: str = ""
    prompt: str | tuple[int, ...] | None = None
    trace: TraceContext | None = None

    def text_bytes(self) -> int:
        """Size of the prompt's text, for estimates made without a tokenizer."""
        if isinstance(self.prompt, tuple):
            return BYTES_PER_TOKEN * len(self.prompt)
        texts = [self.tools, self.prompt or ""]
        for message in self.messages:
            texts += (message["content"], message.get("tool_calls", ""))
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)

    def identity(self) -> int:
        """A hash of who asks what, in this process alone: equal where a client sends the same request again."""
        messages = tuple(tuple(message.items()) for message in self.messages)
        return hash((self.fairness_id, self.model, messages, self.tools, self.prompt, self.sampling))

    def text_blocks(self) -> tuple[int, ...]:
        """Names of the prompt's beginnings, as nodes.engine.prefix_digest gives them."""
        if isinstance(self.prompt, tuple):
            return text_blocks([{"prompt_ids": " ".join(map(str, self.prompt[:PROMPT_IDS_NAMED_MAX]))}])
        if self.prompt is not None:
            return text_blocks([{"prompt": self.prompt}])
        return text_blocks([{"tools": self.tools}, *self.messages] if self.tools else self.messages)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one generation. queued_s: how long it waited for a slot at the node that ended it; None where
    that node does not tell. It says nothing of the tokens, so usages that differ in it alone are equal."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queued_s: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural logarithm of one token's probability. top: (token, logprob) of the likeliest, the likeliest first."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateEvent:
    """Some tokens and the text they complete; the last event alone has finish_reason and usage.

    text may be empty while a character or a possible stop string is incomplete. logprobs: one for each token, where
    they were asked for."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    def merged_with(self, later: GenerateEvent) -> GenerateEvent:
        """One event that says what both say. later: the one that came next."""
        return GenerateEvent(
            self.text + later.text,
            self.token_ids + later.token_ids,
            later.finish_reason,
            later.usage,
            self.logprobs + later.logprobs,
        )


class GenerationError(Exception):
    """Root of what opening or reading a generation raises."""


class RequestInvalid(GenerationError):
    """The client's fault: answered 4xx. param: the field at fault, code: OpenAI's machine-readable word for it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class GenerationFailed(GenerationError):
    """Our fault: the engine or the node that executed broke after the stream had begun, or no node could serve it."""


class GenerationMoved(GenerationError):
    """The node that executes gives the generation up, because it drains; another one can go on with it."""


class DeadlineExceeded(GenerationError):
    """The request's deadline passed before the generation ended."""


class Generator(Protocol):
    """Something that generates: this node's engine, or a peer.

    The stream returned ends after the event with a finish_reason; a read may raise GenerationError or PeerUnavailable.
    Closing it cancels."""

    async def open(self, request: GenerateRequest) -> trio.abc.ReceiveChannel[GenerateEvent]:
        """May wait for a connection, never for a token.

        Raises RequestInvalid, NoCapacity, ModelUnknown, PeerUnavailable."""
        ...
