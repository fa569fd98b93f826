"""The dashboard of API keys and their limits."""

from __future__ import annotations

from observability.grafana.form import Dashboard, Panel, Query, Row
from observability.grafana.queries import KEY, highest, rates, stat, total_rate

KEYS = Dashboard(
    "ai-cluster-keys",
    "AI Cluster Keys and Limits",
    "Who asks, how much of each limit is used, and who is refused. Keys are told by their public ids.",
    ("datasource", "key"),
    (
        Row(
            "Requests",
            (
                Panel(
                    "Requests by key",
                    "Generations asked for per second, by public key id.",
                    "reqps",
                    (Query(rates("ai_cluster_api_key_requests_total", "key_id", KEY), "{{key_id}}"),),
                    width=12,
                    is_stacked=True,
                ),
                Panel(
                    "Requests by outcome",
                    "Generations asked for per second, by how they ended, of the keys chosen.",
                    "reqps",
                    (Query(rates("ai_cluster_api_key_requests_total", "status", KEY), "{{status}}"),),
                    width=12,
                    is_stacked=True,
                ),
            ),
        ),
        Row(
            "Limits",
            (
                stat(
                    "Keys near a limit",
                    "Keys that have used four fifths of a limit or more.",
                    "short",
                    "max(ai_cluster_cluster_api_keys_near_limit)",
                    warn=1,
                    width=8,
                ),
                stat(
                    "Refused at a limit",
                    "Requests refused per second at the limits of the keys chosen.",
                    "reqps",
                    total_rate("ai_cluster_api_key_rate_limit_hits_total", KEY),
                    warn=1,
                    alarm=10,
                    width=8,
                ),
                stat(
                    "Known to each node",
                    "Counters of peers' usage that the node with most of them holds, one a node and key.",
                    "short",
                    "max(ai_cluster_usage_rows)",
                    width=8,
                ),
                Panel(
                    "Used of each limit",
                    "Share of each limit that is used, tokens reserved for running requests included.",
                    "percentunit",
                    (
                        Query(
                            f"{highest('ai_cluster_cluster_api_key_limit_used', 'key_id, kind', KEY)}"
                            f" / {highest('ai_cluster_cluster_api_key_limit', 'key_id, kind', KEY)}",
                            "{{key_id}} {{kind}}",
                        ),
                    ),
                    width=12,
                    warn=0.8,
                    alarm=1,
                ),
                Panel(
                    "Limit hits by key",
                    "Requests refused per second at a key's limit.",
                    "reqps",
                    (Query(rates("ai_cluster_api_key_rate_limit_hits_total", "key_id", KEY), "{{key_id}}"),),
                    width=12,
                ),
                Panel(
                    "Limits",
                    "Limits of the keys chosen, and how much of them is used now.",
                    "short",
                    (
                        Query(highest("ai_cluster_cluster_api_key_limit", "key_id, kind", KEY)),
                        Query(highest("ai_cluster_cluster_api_key_limit_used", "key_id, kind", KEY)),
                    ),
                    "table",
                    24,
                ),
            ),
        ),
    ),
)
