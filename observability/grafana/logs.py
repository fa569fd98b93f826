"""The dashboard of log lines, asked of Loki."""

from __future__ import annotations

from observability.grafana.form import Dashboard, Panel, Query, Row

_STREAM = '{job="ai-cluster", node_id=~"$log_node", level=~"$log_level"}'
LOGS = Dashboard(
    "ai-cluster-logs",
    "AI Cluster Logs",
    "The nodes' JSON lines, where Alloy ships them to Loki. Fields are of docs/logging.md.",
    ("loki", "log_node", "log_level"),
    (
        Row(
            "Lines",
            (
                Panel(
                    "Lines by level",
                    "Log lines per second, by level.",
                    "suffix: lines/s",
                    (Query(f"sum by (level) (rate({_STREAM}[$__auto]))", "{{level}}"),),
                    width=12,
                    is_stacked=True,
                    asks_loki=True,
                ),
                Panel(
                    "Generations that moved",
                    "Requests per second that went on at another node after their first token, by model.",
                    "reqps",
                    (
                        Query(
                            'sum by (model) (rate({job="ai-cluster", node_id=~"$log_node"} |= `"message":"request"`'
                            " | json | failovers > 0 [$__auto]))",
                            "{{model}}",
                        ),
                    ),
                    width=12,
                    asks_loki=True,
                ),
                Panel(
                    "Warnings and errors",
                    "Lines of level warning and above, newest first; stack traces are in error_stack_trace.",
                    "short",
                    (Query('{job="ai-cluster", node_id=~"$log_node", level=~"warning|error|critical"} | json'),),
                    "logs",
                    24,
                    12,
                    asks_loki=True,
                ),
                Panel(
                    "Requests",
                    "The one line of each request: who asked, what served it, how long it took, how it ended.",
                    "short",
                    (Query('{job="ai-cluster", node_id=~"$log_node"} |= `"message":"request"` | json'),),
                    "logs",
                    24,
                    12,
                    asks_loki=True,
                ),
            ),
        ),
    ),
)
