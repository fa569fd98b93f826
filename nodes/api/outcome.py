"""How one request for an answer ended: counted once, logged, and told to whoever reserved tokens for it."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from mesh.errors import NoCapacity
from nodes.access.gate import LimitReached, Unauthorized
from nodes.api.accounting import Exchange
from nodes.api.errors import api_error
from nodes.api.services import ApiMetrics
from nodes.generation import GenerateEvent, RequestInvalid, Usage


class Outcome:
    """Counts when the response is over, whatever ended it."""

    def __init__(self, metrics: ApiMetrics, exchange: Exchange) -> None:
        self._metrics = metrics
        self._exchange = exchange
        self._started = trio.current_time()
        self.key_id = "invalid"
        self.model = "unknown"
        self.is_stream = False
        self.status = "cancelled"  # until an end is reached
        exchange.on_end = self._count

    def note_request(self, model: str, is_stream: bool) -> None:
        self.model, self.is_stream = model, is_stream
        self._exchange.log_fields |= {"model": model, "key_id": self.key_id}

    def failed(self, error: Exception) -> None:
        self.status = _failure_status(error)
        if isinstance(error, LimitReached):
            self._metrics.rate_limited(self.key_id)

    def succeeded(self, usage: Usage, executed_by: Sequence[str], finish_reasons: Sequence[str | None]) -> None:
        self.status = "success"
        self._exchange.log_fields |= {
            "executed_by": ",".join(executed_by),
            "finish_reason": ",".join(dict.fromkeys(str(reason) for reason in finish_reasons)),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }

    def _count(self, is_complete: bool) -> None:
        status = "cancelled" if self.status == "success" and not is_complete else self.status
        self._metrics.api_key_request(self.key_id, status)
        if self.is_stream:
            self._metrics.streaming_finished(self.model, status, trio.current_time() - self._started)


def total_usage(last_events: Sequence[GenerateEvent], choices_per_prompt: int) -> Usage:
    """Of all answers to a request: each prompt counts once, however many answers it has."""
    usages = [event.usage or Usage(0, 0) for event in last_events]
    prompts = usages[::choices_per_prompt]
    return Usage(
        sum(usage.prompt_tokens for usage in prompts),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in prompts),
    )


def usage_object(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _failure_status(error: Exception) -> str:
    """The `status` label: rejected for what no capacity or the client's own request prevented, error for our fault."""
    is_rejected = isinstance(error, NoCapacity | RequestInvalid | Unauthorized) or api_error(error).status < 500
    return "rejected" if is_rejected else "error"
