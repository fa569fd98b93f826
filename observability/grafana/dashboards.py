"""Which dashboards there are."""

from __future__ import annotations

import re

from observability.grafana.engine import ENGINE
from observability.grafana.keys import KEYS
from observability.grafana.logs import LOGS
from observability.grafana.mesh import MESH
from observability.grafana.overview import OVERVIEW
from observability.grafana.requests import REQUESTS

DASHBOARDS = (OVERVIEW, REQUESTS, ENGINE, MESH, KEYS, LOGS)

# What Grafana puts in place of its variables where all is chosen.
_RATE_INTERVAL = "5m"
_ALL = ".*"


def promql(rate_interval: str = _RATE_INTERVAL) -> dict[str, list[str]]:
    """Expressions asked of Prometheus with all chosen, by "dashboard: panel"; for tests against one that runs."""
    found: dict[str, list[str]] = {}
    for dashboard in DASHBOARDS:
        for panel in (panel for row in dashboard.rows for panel in row.panels if not panel.asks_loki):
            asked = [query.expression.replace("$__rate_interval", rate_interval) for query in panel.queries]
            found[f"{dashboard.title}: {panel.title}"] = [re.sub(r"\$[a-z]+", _ALL, text) for text in asked]
    return found
