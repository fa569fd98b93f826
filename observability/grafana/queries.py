"""PromQL that several dashboards share. Only metrics of docs/metrics.md; a test holds the panels against it.

What `ai_cluster_cluster_*` tells is one observer's view of all nodes, so the highest over observers is taken before
any sum. All else is counted by one process, and summed. Series of a process are told apart by `instance`, and by
`node_id` too where one node's /metrics/cluster is scraped for all.
"""

from __future__ import annotations

from observability.grafana.form import Panel, Query

RATE = "$__rate_interval"
MODEL = 'model=~"$model"'
MODEL_NODE = f'{MODEL}, node_id=~"$node"'
PROCESS = 'instance=~"$instance"'
MODEL_PROCESS = f"{MODEL}, {PROCESS}"
KEY = 'key_id=~"$key"'
PROCESS_NAME = "{{instance}} {{node_id}}"
QUANTILES = (0.5, 0.95, 0.99)


def rates(metric: str, by: str, selector: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{selector}}}[{RATE}]))"


def total_rate(metric: str, selector: str = "") -> str:
    return f"sum(rate({metric}{{{selector}}}[{RATE}]))"


def ratio(part: str, whole: str) -> str:
    """Nothing where the whole is 0: there is no ratio of nothing."""
    return f"{part} / ({whole} > 0)"


def quantile(share: float, histogram: str, by: str = "", selector: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share:g}, {rates(histogram + '_bucket', labels, selector)})"


def quantiles(histogram: str, selector: str = "") -> tuple[Query, ...]:
    return tuple(Query(quantile(share, histogram, "", selector), f"p{share * 100:g}") for share in QUANTILES)


def highest(metric: str, by: str, selector: str = "") -> str:
    return f"max by ({by}) ({metric}{{{selector}}})"


def per_process(metric: str, legend: str = PROCESS_NAME) -> Query:
    return Query(f"sum by (instance, node_id) ({metric}{{{PROCESS}}})", legend)


def stat(title: str, description: str, unit: str, expression: str, **fields: float) -> Panel:
    warn, alarm, width = fields.get("warn"), fields.get("alarm"), int(fields.get("width", 4))
    return Panel(title, description, unit, (Query(expression),), "stat", width, 4, warn=warn, alarm=alarm)


ERRORS = (
    f'(sum by (model) (rate(ai_cluster_inference_requests_total{{{MODEL}, status="error"}}[{RATE}]))'
    f" or 0 * {rates('ai_cluster_inference_requests_total', 'model', MODEL)})"
)
CPU_SHARE = (
    f"sum by (instance, node_id) (rate(process_cpu_seconds_total{{{PROCESS}}}[{RATE}]))"
    f" / sum by (instance, node_id) (ai_cluster_cpus{{{PROCESS}}})"
)
