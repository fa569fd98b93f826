"""The dashboard of the monitoring guide: the whole mesh on one page."""

from __future__ import annotations

from observability.grafana.form import Dashboard, Panel, Query, Row
from observability.grafana.queries import (
    CPU_SHARE,
    ERRORS,
    MODEL,
    PROCESS_NAME,
    highest,
    per_process,
    quantile,
    rates,
    ratio,
    stat,
)

OVERVIEW = Dashboard(
    "ai-cluster-overview",
    "AI Cluster Overview",
    "The whole mesh on one page: is it well, what does it do, who does it.",
    ("datasource", "model", "instance"),
    (
        Row(
            "Cluster",
            (
                stat(
                    "Healthy nodes",
                    "Members that the node with the most hopeful view holds to be healthy.",
                    "short",
                    'max(ai_cluster_cluster_nodes_total{status="healthy"})',
                ),
                stat(
                    "Expected nodes",
                    "Nodes there should be: as configured, else the members known and not left.",
                    "short",
                    "max(ai_cluster_cluster_nodes_expected)",
                ),
                stat(
                    "Degraded or offline",
                    "Members that some node holds to be degraded or offline; 0 is well.",
                    "short",
                    'sum(max by (status) (ai_cluster_cluster_nodes_total{status=~"degraded|offline"}))',
                    warn=1,
                    alarm=2,
                ),
                stat(
                    "Different views",
                    "How many different sets of members the scraped nodes see; more than 1 for long is a partition.",
                    "short",
                    'count(count_values("view", ai_cluster_cluster_view_hash))',
                    alarm=2,
                ),
                stat(
                    "Running",
                    "Generations that run now in the whole cluster.",
                    "short",
                    "sum(max by (node_id) (ai_cluster_cluster_active_requests))",
                ),
                stat(
                    "Waiting",
                    "Requests that wait for a slot now in the whole cluster.",
                    "short",
                    "sum(max by (node_id) (ai_cluster_cluster_queue_depth))",
                    warn=10,
                    alarm=100,
                ),
            ),
        ),
        Row(
            "Traffic",
            (
                Panel(
                    "Requests per Second",
                    "HTTP requests answered, by route; scrapes and health checks included.",
                    "reqps",
                    (Query(rates("ai_cluster_http_requests_total", "path"), "{{path}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Tokens Generated",
                    "Prompt tokens read and tokens generated per second, counted when each generation ends.",
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
                Panel(
                    "P95 latency",
                    "Time that 95 of 100 generations stay below, from start to end; the objective is 5 s.",
                    "s",
                    (Query(quantile(0.95, "ai_cluster_inference_duration_seconds", "model", MODEL), "{{model}}"),),
                    warn=5,
                    alarm=10,
                ),
                Panel(
                    "P95 time to first token",
                    "Time that 95 of 100 generations stay below, from start to first token, waiting included.",
                    "s",
                    (Query(quantile(0.95, "ai_cluster_time_to_first_token_seconds", "model", MODEL), "{{model}}"),),
                ),
                Panel(
                    "Tokens per second by node",
                    "Tokens that each node generated per second over its last 10 s, as its peers know it.",
                    "suffix: tok/s",
                    (Query(highest("ai_cluster_cluster_tokens_per_second", "node_id"), "{{node_id}}"),),
                    is_stacked=True,
                ),
            ),
        ),
        Row(
            "Nodes",
            (
                Panel(
                    "Nodes by status",
                    "Members that are healthy, degraded and offline, by the highest count among the observers.",
                    "short",
                    (Query(highest("ai_cluster_cluster_nodes_total", "status"), "{{status}}"),),
                ),
                Panel(
                    "Active requests by node",
                    "Generations that each node executes, as its peers know it.",
                    "short",
                    (Query(highest("ai_cluster_cluster_active_requests", "node_id"), "{{node_id}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Free slots by node",
                    "Slots that each node could fill at once, as its peers know it.",
                    "short",
                    (Query(highest("ai_cluster_cluster_free_slots", "node_id"), "{{node_id}}"),),
                ),
                Panel(
                    "CPU use",
                    "CPU time of each process over the cores it may use; the objective is below 80 %.",
                    "percentunit",
                    (Query(CPU_SHARE, PROCESS_NAME),),
                    warn=0.8,
                    alarm=0.95,
                    maximum=1,
                ),
                Panel(
                    "Resident memory",
                    "Memory of each process; flat over days is well.",
                    "bytes",
                    (per_process("process_resident_memory_bytes"),),
                ),
                Panel(
                    "Versions",
                    "Which node runs which version.",
                    "short",
                    (Query("max by (node_id, version) (ai_cluster_node_info)"),),
                    "table",
                ),
            ),
        ),
    ),
)
