"""How one request for an answer ended: counted once, logged, and told to whoever reserved tokens for it."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from mesh.errors import NoCapacity
from nodes.access.gate import LimitReached, Unauthorized
from nodes.api.accounting import Exchange
from nodes.api.errors import api_error
from nodes.api.services import ApiMetrics
from nodes.dispatched_stream import DispatchedStream
from nodes.generation import GenerateEvent, RequestInvalid, Usage

# Nodes named on a request's log line; a request that moved more often tells how often.
PATH_NODES_MAX = 16


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
        self._streams: Sequence[DispatchedStream] = ()
        self._entry = ""
        exchange.on_end = self._count

    def note_request(self, model: str, is_stream: bool) -> None:
        self.model, self.is_stream = model, is_stream
        self._exchange.log_fields |= {"model": model, "key_id": self.key_id}

    def note_streams(self, streams: Sequence[DispatchedStream], entry: str) -> None:
        """Whose way is told on the log line, however the request ends. entry: the node that was asked."""
        self._streams, self._entry = streams, entry

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
        } | ({} if usage.queued_s is None else {"queue_ms": round(usage.queued_s * 1000, 3)})

    def _count(self, is_complete: bool) -> None:
        status = "cancelled" if self.status == "success" and not is_complete else self.status
        self._exchange.log_fields |= {"outcome": status} | _way(self._streams, self._entry)
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
        max((usage.queued_s for usage in usages if usage.queued_s is not None), default=None),
    )


def usage_object(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _way(streams: Sequence[DispatchedStream], entry: str) -> dict[str, object]:
    """Log fields: the nodes that were given the request, in order, and what the client waited for its first token."""
    if not streams:
        return {}
    nodes = [node_id for stream in streams for node_id in stream.path]
    path = nodes if len(streams) == 1 else list(dict.fromkeys(nodes))
    left_out = len(path) - PATH_NODES_MAX
    waits_s = [stream.first_token_s for stream in streams if stream.first_token_s is not None]
    fields: dict[str, object] = {
        "path": ",".join(path[:PATH_NODES_MAX]) + (f",+{left_out}" if left_out > 0 else ""),
        "hops": sum(node_id != entry for node_id in nodes),
        "failovers": sum(stream.failovers for stream in streams),
    }
    return fields | ({"time_to_first_token_ms": round(min(waits_s) * 1000, 3)} if waits_s else {})


def _failure_status(error: Exception) -> str:
    """The `status` label: rejected for what no capacity or the client's own request prevented, error for our fault."""
    is_rejected = isinstance(error, NoCapacity | RequestInvalid | Unauthorized) or api_error(error).status < 500
    return "rejected" if is_rejected else "error"
