"""Which dashboards there are."""

from __future__ import annotations

from observability.grafana.engine import ENGINE
from observability.grafana.keys import KEYS
from observability.grafana.logs import LOGS
from observability.grafana.mesh import MESH
from observability.grafana.overview import OVERVIEW
from observability.grafana.requests import REQUESTS

DASHBOARDS = (OVERVIEW, REQUESTS, ENGINE, MESH, KEYS, LOGS)
