"""What an engine tells of itself: its state, and its figures at one instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nodes.engine.estimate import FirstTokenEstimate

State = Literal["loading", "ready", "stuck", "failed"]
LOADING: State = "loading"
READY: State = "ready"
STUCK: State = "stuck"  # a step has not returned for far too long; ready again once it does
FAILED: State = "failed"  # steps broke one after the other; for good


@dataclass(frozen=True, slots=True)
class KvRows:
    """Rows of the KV cache, one for each token. used: by requests in slots; cached: kept for prompts to come."""

    capacity: int
    used: int
    cached: int


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """One engine at one instant. Rates in tokens per second over the time spent on them, 0.0 while unmeasured.

    active, queued, free_slots: active + free_slots is slots; a sequence is queued only while no slot is free.
    queued_tokens: prompt tokens not prefilled yet. decode_rate: of the whole batch. tokens_per_s: generated over the
    last 10 s. step_seconds_total, session_seconds_total: time in ticks, and the part of it inside the session.
    median_step_s: of the last ticks, to tell a hang from slowness. first_token: what a request that comes now has to
    expect; first_token_error: median of |estimated - actual| / actual of the last ones. answer_tokens: running mean of
    what answers had, a guess before the first. cache: prompts and their tokens
    looked up in the prefix cache, and found there. step_faults_total: steps that broke.
    """

    state: State
    slots: int
    active: int
    queued: int
    free_slots: int
    queued_tokens: int
    prefill_rate: float
    decode_rate: float
    tokens_per_s: float
    step_count: int
    median_step_s: float
    step_seconds_total: float
    session_seconds_total: float
    tokens_generated_total: int
    prompt_tokens_total: int
    kv_bytes: int
    model_memory_bytes: int
    load_time_s: float
    first_token: FirstTokenEstimate
    first_token_error: float
    answer_tokens: float
    cache_queries_total: int
    cache_hits_total: int
    cache_query_tokens_total: int
    cache_hit_tokens_total: int
    step_faults_total: int
