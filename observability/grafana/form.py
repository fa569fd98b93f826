"""What a dashboard is to us, and how Grafana 11 wants it written. Knows no metric.

Grafana's JSON is built by hand, not with its SDK, so that writing the files needs nothing installed; the tests hold
them against the SDK's types.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

# Of Grafana 11; later versions migrate it when they load it.
SCHEMA_VERSION = 39
GRID_COLUMNS = 24
ROW_HEIGHT = 1
# Data sources are variables, so that the files work where they are called something else.
PROMETHEUS = {"type": "prometheus", "uid": "${datasource}"}
LOKI = {"type": "loki", "uid": "${loki}"}
TAG = "ai-cluster"

Json = dict[str, Any]
Kind = Literal["timeseries", "stat", "bargauge", "table", "logs"]
Variable = Literal["datasource", "loki", "instance", "node", "model", "key", "log_node", "log_level"]


@dataclass(frozen=True, slots=True)
class Query:
    """legend: Grafana's {{label}} template; empty: the labels as they are."""

    expression: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """unit: Grafana's name of it. width: of 24 columns. warn, alarm: values from which it is yellow and red.
    maximum: of the axis."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 8
    is_stacked: bool = False
    warn: float | None = None
    alarm: float | None = None
    maximum: float | None = None
    decimals: int | None = None
    asks_loki: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]


def as_text(dashboard: Dashboard) -> str:
    return json.dumps(as_json(dashboard), indent=2) + "\n"


def as_json(dashboard: Dashboard) -> Json:
    panels: list[Json] = []
    top = 0
    for row in dashboard.rows:
        position = {"x": 0, "y": top, "w": GRID_COLUMNS, "h": ROW_HEIGHT}
        identity: Json = {"id": len(panels) + 1, "type": "row", "title": row.title}
        panels.append(identity | {"collapsed": False, "gridPos": position, "panels": []})
        top += ROW_HEIGHT
        left = line_height = 0
        for panel in row.panels:
            if left + panel.width > GRID_COLUMNS:
                left, top, line_height = 0, top + line_height, 0
            position = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            panels.append({"id": len(panels) + 1, "gridPos": position} | _panel(panel))
            left += panel.width
            line_height = max(line_height, panel.height)
        top += line_height
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "annotations": {"list": []},
        "templating": {"list": [_VARIABLES[name] for name in dashboard.variables]},
        "links": [_LINKS],
        "panels": panels,
    }


def _panel(panel: Panel) -> Json:
    source = LOKI if panel.asks_loki else PROMETHEUS
    written: Json = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": source,
        "targets": [_target(panel, query, index, source) for index, query in enumerate(panel.queries)],
        "options": _OPTIONS[panel.kind],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
    }
    if panel.kind == "table":
        written["transformations"] = [{"id": "merge", "options": {}}]
    return written


def _target(panel: Panel, query: Query, index: int, source: Json) -> Json:
    target: Json = {"refId": chr(ord("A") + index), "datasource": source, "expr": query.expression}
    if panel.kind != "logs":
        target["legendFormat"] = query.legend or "__auto"
    if source is PROMETHEUS:
        is_now = panel.kind in ("stat", "table", "bargauge")
        target |= {"instant": is_now, "range": not is_now, "exemplar": False, "editorMode": "code"}
        target["format"] = "table" if panel.kind == "table" else "time_series"
    return target


def _defaults(panel: Panel) -> Json:
    defaults: Json = {"unit": panel.unit, "color": {"mode": "palette-classic"}}
    steps: list[Json] = [{"color": "green", "value": None}]
    if panel.warn is not None:
        steps.append({"color": "yellow", "value": panel.warn})
    if panel.alarm is not None:
        steps.append({"color": "red", "value": panel.alarm})
    defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    if panel.kind in ("stat", "bargauge"):
        defaults["color"] = {"mode": "thresholds"}
    if panel.kind == "timeseries":
        defaults["min"] = 0
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 20 if panel.is_stacked else 5,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "off" if panel.warn is None and panel.alarm is None else "dashed"},
        }
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.decimals is not None:
        defaults["decimals"] = panel.decimals
    return defaults


_REDUCED = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[Kind, Json] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": _REDUCED,
        "graphMode": "none",
        "colorMode": "value",
        "justifyMode": "auto",
        "textMode": "auto",
        "orientation": "auto",
    },
    "bargauge": {
        "reduceOptions": _REDUCED,
        "displayMode": "basic",
        "orientation": "horizontal",
        "showUnfilled": True,
        "valueMode": "color",
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
    "logs": {
        "showTime": True,
        "showLabels": False,
        "wrapLogMessage": True,
        "prettifyLogMessage": True,
        "enableLogDetails": True,
        "dedupStrategy": "none",
        "sortOrder": "Descending",
    },
}

_LINKS: Json = {
    "type": "dashboards",
    "title": "AI Cluster",
    "tags": [TAG],
    "asDropdown": True,
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
    "icon": "external link",
    "tooltip": "",
    "url": "",
}


def _source_variable(name: str, label: str, kind: str) -> Json:
    return {
        "type": "datasource",
        "name": name,
        "label": label,
        "query": kind,
        "regex": "",
        "hide": 0,
        "refresh": 1,
        "multi": False,
        "includeAll": False,
        "current": {},
        "options": [],
    }


def _label_variable(name: str, label: str, metric: str, value: str, source: Json = PROMETHEUS) -> Json:
    """All values that a label had within the time range, all of them chosen at first."""
    query: Json = {"query": f"label_values({metric}, {value})", "refId": f"variable-{name}"}
    if source is LOKI:
        query = {"label": value, "stream": metric, "type": 1, "refId": f"variable-{name}"}
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": source,
        "query": query,
        "regex": "",
        "hide": 0,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        # A stream selector of Loki has to name something that is not empty.
        "allValue": ".+" if source is LOKI else ".*",
        "current": {"text": ["All"], "value": ["$__all"], "selected": True},
        "options": [],
    }


_VARIABLES: dict[Variable, Json] = {
    "datasource": _source_variable("datasource", "Prometheus", "prometheus"),
    "loki": _source_variable("loki", "Loki", "loki"),
    "instance": _label_variable("instance", "Instance", "ai_cluster_node_info", "instance"),
    "node": _label_variable("node", "Node", "ai_cluster_cluster_active_requests", "node_id"),
    "model": _label_variable("model", "Model", "ai_cluster_inference_started_total", "model"),
    "key": _label_variable("key", "Key", "ai_cluster_api_key_requests_total", "key_id"),
    "log_node": _label_variable("log_node", "Node", '{job="ai-cluster"}', "node_id", LOKI),
    "log_level": _label_variable("log_level", "Level", '{job="ai-cluster"}', "level", LOKI),
}
