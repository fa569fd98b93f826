"""What clients are sent, as types: the API's description is made of them, and tests hold every answer against them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorObject(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    error: ErrorObject


class PromptTokensDetails(Answer):
    cached_tokens: int = Field(description="Prompt tokens whose keys and values were there already")


class UsageObject(Answer):
    """Of all answers to a request; each prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="Null where the token is a part of a character")


class TokenLogprobObject(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprobObject]
    refusal: None


class FunctionCall(Answer):
    name: str
    arguments: str = Field(description="JSON, which is cut short where finish_reason is length")


class ToolCall(Answer):
    id: str
    type: Literal["function"]
    function: FunctionCall


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class _AnswerHead(Answer):
    id: str
    created: int = Field(description="Seconds since 1970")
    model: str
    system_fingerprint: str | None = Field(
        description="Equal where weights, tokenizer and chat template are; null while unknown"
    )


class ChatCompletion(_AnswerHead):
    object: Literal["chat.completion"]
    service_tier: Literal["default"] | None = None
    choices: list[ChatChoice]
    usage: UsageObject


class FunctionCallDelta(Answer):
    name: str | None = None
    arguments: str


class ToolCallDelta(Answer):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(_AnswerHead):
    object: Literal["chat.completion.chunk"]
    service_tier: Literal["default"] | None = None
    choices: list[ChatChunkChoice]
    usage: UsageObject | None = None


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="In characters of the answer")


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(_AnswerHead):
    """An answer, and each chunk of a streamed one."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: UsageObject | None = None


class EmbeddingObject(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="As text with encoding_format base64")


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Answer):
    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


class ModelObject(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int = Field(description="Tokens of prompt and answer, or of an input, that every node takes")
    kind: Literal["generation", "embedding", "unknown"] = Field(description="What it is asked for")


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelObject]


class Health(Answer):
    status: Literal["loading", "ready", "draining", "failed"]
    node_id: str
    version: str
    models: list[str]
    active_requests: int


class ClusterStatus(Answer):
    """The mesh as the node asked sees it."""

    node_id: str
    cluster_name: str
    version: str
    nodes: dict[str, int]
    nodes_expected: int
    view_hash: int
    views_disagreeing: list[str] = Field(description="Live nodes that told of other members than this one sees")
    warnings: list[str]
    members: list[dict[str, Any]]


class ClusterViews(Answer):
    """By observer, by member: alive, suspect, dead, left. silent: observers that gave no answer. disputed: members of
    which not all observers believe the same."""

    node_id: str
    views: dict[str, dict[str, str]]
    silent: list[str]
    disputed: list[str]


class LimitLeft(Answer):
    """Over all nodes together."""

    limit: int
    remaining: int


class KeyObject(Answer):
    """An API key without its secret. Limits are null where there is none, models empty where it may use all."""

    id: str
    name: str
    enabled: bool
    created_at: str
    expires_at: str | None
    models: list[str]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrency: int | None
    priority: int
    family: str = Field(description="The id of the first of a row of rotated keys; limits and usage are the family's")
    remaining: dict[str, LimitLeft]


class KeyList(Answer):
    keys: list[KeyObject]
    revoked: int


class EditedKey(Answer):
    key: KeyObject
    also_revoked: list[str] = Field(description="Ids of those that were revoked with it")
    others: list[KeyObject] = Field(description="Keys of its name or family that this did not change, and that work")
    unserved_models: list[str] = Field(description="Of the models it may use, those that no live node serves now")
    untold: dict[str, str] = Field(description="Members that could not be told yet, and why; they learn it when back")
    token: str | None = Field(None, description="Of a new key: shown this once")


class KeyUsage(Answer):
    day: str
    key: str
    name: str | None
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


class UsageTotal(Answer):
    requests: int
    prompt_tokens: int
    completion_tokens: int


class UsageAnswer(Answer):
    usage: list[KeyUsage]
    total: UsageTotal


class ClusterEvent(Answer):
    """One event of /cluster/events, as its data tells it."""

    id: str
    at: float = Field(description="Seconds since 1970, on the clock of the node asked")
    kind: str
    node_id: str
    reason: str
    count: int = Field(description="How often within ten seconds")


class ScrapeTarget(Answer):
    targets: list[str] = Field(description="HOST:PORT")
    labels: dict[str, str]


class ScrapeTargets(RootModel[list[ScrapeTarget]]):
    """As Prometheus's http_sd_configs reads them."""
