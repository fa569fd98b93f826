"""The dashboard of requests and their latency, at the entry and at the executor."""

from __future__ import annotations

from observability.grafana.form import Dashboard, Panel, Query, Row
from observability.grafana.queries import ERRORS, MODEL, MODEL_NODE, quantile, quantiles, rates, ratio

REQUESTS = Dashboard(
    "ai-cluster-requests",
    "AI Cluster Requests and Latency",
    "What clients ask for and how long they wait, from the entry to the last token.",
    ("datasource", "model", "node"),
    (
        Row(
            "At the entry",
            (
                Panel(
                    "HTTP requests by status",
                    "Requests answered per second, by status code; 499 are clients that left before an answer.",
                    "reqps",
                    (Query(rates("ai_cluster_http_requests_total", "status"), "{{status}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "HTTP P95 by route",
                    "Time that 95 of 100 requests of a route stay below; a stream lasts as long as it is read.",
                    "s",
                    (Query(quantile(0.95, "ai_cluster_http_request_duration_seconds", "path"), "{{path}}"),),
                ),
                Panel(
                    "Open connections and streams",
                    "HTTP connections, idle ones included, and generations open at all entries.",
                    "short",
                    (
                        Query("sum(ai_cluster_http_connections_open)", "connections"),
                        Query("sum(ai_cluster_streams_open)", "streams"),
                    ),
                ),
                Panel(
                    "Streamed requests by outcome",
                    "Streams ended per second, by how they ended.",
                    "reqps",
                    (Query(rates("ai_cluster_streaming_requests_total", "status", MODEL), "{{status}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Stream duration",
                    "From the request to the end of the stream.",
                    "s",
                    quantiles("ai_cluster_streaming_duration_seconds", MODEL),
                ),
                Panel(
                    "Connections closed by us",
                    "HTTP connections closed against their client's will per second, by why.",
                    "cps",
                    (Query(rates("ai_cluster_http_connections_closed_total", "reason"), "{{reason}}"),),
                ),
            ),
        ),
        Row(
            "At the executor",
            (
                Panel(
                    "Generations by outcome",
                    "Generations ended per second, by how they ended.",
                    "reqps",
                    (Query(rates("ai_cluster_inference_requests_total", "status", MODEL), "{{status}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Time to first token",
                    "From a generation's start to its first token, waiting for a slot included.",
                    "s",
                    quantiles("ai_cluster_time_to_first_token_seconds", MODEL_NODE),
                ),
                Panel(
                    "Time between tokens",
                    "Between two tokens of a generation; tokens that came together share the time.",
                    "s",
                    quantiles("ai_cluster_inter_token_latency_seconds", MODEL_NODE),
                ),
                Panel(
                    "Time in the queue",
                    "How much of the time to the first token a generation waited for a slot.",
                    "s",
                    quantiles("ai_cluster_queue_time_seconds", MODEL_NODE),
                ),
                Panel(
                    "Duration of generations",
                    "From a generation's start to its end; the objective for p95 is 5 s.",
                    "s",
                    quantiles("ai_cluster_inference_duration_seconds", MODEL_NODE),
                    warn=5,
                    alarm=10,
                ),
                Panel(
                    "Average duration by node",
                    "Mean from start to end, by the node that executed: a slow node stands out.",
                    "s",
                    (
                        Query(
                            ratio(
                                rates("ai_cluster_inference_duration_seconds_sum", "node_id", MODEL_NODE),
                                rates("ai_cluster_inference_duration_seconds_count", "node_id", MODEL_NODE),
                            ),
                            "{{node_id}}",
                        ),
                    ),
                ),
                Panel(
                    "Finish reasons",
                    "Generations that ended well per second, by why: stop, or length where they reached a limit.",
                    "reqps",
                    (Query(rates("ai_cluster_inference_finish_reasons_total", "reason", MODEL), "{{reason}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Tokens by model and type",
                    "Prompt tokens read and tokens generated per second.",
                    "suffix: tok/s",
                    (Query(rates("ai_cluster_tokens_generated_total", "model, type", MODEL), "{{model}} {{type}}"),),
                ),
                Panel(
                    "Error rate",
                    "Share of generations that failed by our fault; the objective is below 1 %.",
                    "percentunit",
                    (Query(ratio(ERRORS, rates("ai_cluster_inference_requests_total", "model", MODEL)), "{{model}}"),),
                    warn=0.01,
                    alarm=0.05,
                ),
            ),
        ),
    ),
)
