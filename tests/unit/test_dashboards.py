"""Grafana's dashboards: as the script writes them, as Grafana knows them, and of metrics that there are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, prometheus, units
from grafana_foundation_sdk.models import dashboard as grafana

from observability.grafana.__main__ import FOLDER, files
from observability.grafana.dashboards import DASHBOARDS, promql
from observability.grafana.form import LOKI, PROMETHEUS, Dashboard, Panel, as_json

ROOT = Path(__file__).parents[2]
PROVISIONING = FOLDER.parent / "provisioning"
PROMTOOL_TIMEOUT_S = 60
# What Prometheus itself puts on series, and the recipe of histograms.
LABELS_OF_SCRAPES = {"instance", "job", "node_id", "le"}
SUFFIXES_OF_HISTOGRAMS = ("_bucket", "_sum", "_count")
ROW = re.compile(r"^\| `(?P<name>[a-z_:]+)` \| (?P<type>counter|gauge|histogram) \| (?P<labels>[^|]*) \|", re.MULTILINE)
METRIC = re.compile(r"\b(?P<name>(?:ai_cluster|process|python)_[a-z0-9_]+)(?:\{(?P<selector>[^}]*)\})?")
FUNCTIONS_BY = re.compile(r"\b(?:sum|max|min|avg) by \((?P<labels>[^)]*)\) \((?:rate\()?(?P<metric>[a-z_0-9]+)")
# Fields with a closed set of values, by the end of their path; the SDK reads any value without a word.
CHOICES: dict[str, type[Enum]] = {
    ".color.mode": grafana.FieldColorModeId,
    ".thresholds.mode": grafana.ThresholdsMode,
    ".graphTooltip": grafana.DashboardCursorSync,
    ".hide": grafana.VariableHide,
    ".refresh": grafana.VariableRefresh,
    ".list.sort": grafana.VariableSort,
    ".templating.list.type": grafana.VariableType,
    ".links.type": grafana.DashboardLinkType,
    ".targets.editorMode": prometheus.QueryEditorMode,
    ".targets.format": prometheus.PromQueryFormat,
    ".drawStyle": common.GraphDrawStyle,
    ".showPoints": common.VisibilityMode,
    ".stacking.mode": common.StackingMode,
    ".thresholdsStyle.mode": common.GraphThresholdsStyleMode,
    ".legend.displayMode": common.LegendDisplayMode,
    ".legend.placement": common.LegendPlacement,
    ".tooltip.mode": common.TooltipDisplayMode,
    ".tooltip.sort": common.SortOrder,
    ".options.graphMode": common.BigValueGraphMode,
    ".options.colorMode": common.BigValueColorMode,
    ".options.justifyMode": common.BigValueJustifyMode,
    ".options.textMode": common.BigValueTextMode,
    ".options.orientation": common.VizOrientation,
    ".options.displayMode": common.BarGaugeDisplayMode,
    ".options.valueMode": common.BarGaugeValueMode,
    ".options.cellHeight": common.TableCellHeight,
    ".options.dedupStrategy": common.LogsDedupStrategy,
    ".options.sortOrder": common.LogsSortOrder,
}

by_uid = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)


def panels(dashboard: Dashboard) -> list[Panel]:
    return [panel for row in dashboard.rows for panel in row.panels]


def page_labels() -> dict[str, set[str]]:
    """docs/metrics.md: metric → its labels."""
    rows = ROW.finditer((ROOT / "docs" / "metrics.md").read_text())
    return {row["name"]: set(re.findall(r"`([a-z_]+)`", row["labels"])) for row in rows}


def base_name(series: str) -> str:
    names = page_labels()
    for suffix in SUFFIXES_OF_HISTOGRAMS:
        if series not in names and series.removesuffix(suffix) in names:
            return series.removesuffix(suffix)
    return series


def missing(written: Any, understood: Any, path: str = "") -> Iterator[str]:
    """Where `understood` lacks or changes something of `written`; it may say more."""
    if isinstance(written, dict) and isinstance(understood, dict):
        for name, value in written.items():
            if name not in understood and value is not None:
                yield f"{path}.{name}"
            elif value is not None:
                yield from missing(value, understood[name], f"{path}.{name}")
    elif isinstance(written, list) and isinstance(understood, list) and len(written) == len(understood):
        for index, (one, other) in enumerate(zip(written, understood, strict=True)):
            yield from missing(one, other, f"{path}[{index}]")
    elif written != understood:
        yield f"{path}: {written!r} is read as {understood!r}"


def leaves(written: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value); places in lists are left out."""
    if isinstance(written, dict):
        for name, value in written.items():
            yield from leaves(value, f"{path}.{name}")
    elif isinstance(written, list):
        for value in written:
            yield from leaves(value, path)
    else:
        yield path, written


def test_the_committed_files_are_what_the_script_writes() -> None:
    assert files() == {path.name: path.read_text() for path in FOLDER.iterdir()}, "run python -m observability.grafana"


def test_the_guide_s_dashboard_is_there_with_its_panels() -> None:
    (overview,) = [dashboard for dashboard in DASHBOARDS if dashboard.title == "AI Cluster Overview"]
    assert {"Requests per Second", "Tokens Generated"} <= {panel.title for panel in panels(overview)}


@by_uid
def test_every_panel_has_a_unit_that_grafana_knows_and_a_sentence_of_description(dashboard: Dashboard) -> None:
    known = {value for name, value in vars(units).items() if name[0].isupper()}
    for panel in panels(dashboard):
        assert panel.unit in known or re.fullmatch(r"suffix: \S+", panel.unit), panel.title
        assert re.fullmatch(r"[A-Z0-9].{20,200}\.", panel.description), panel.title
    titles = [panel.title for panel in panels(dashboard)]
    assert len(titles) == len(set(titles))


@by_uid
def test_grafana_s_own_types_understand_every_field(dashboard: Dashboard) -> None:
    """What they do not know they leave out, and what they know otherwise they change."""
    written = as_json(dashboard)
    understood = json.loads(JSONEncoder().encode(grafana.Dashboard.from_json(json.loads(json.dumps(written)))))
    assert list(missing(written, understood)) == []


def test_a_field_that_grafana_does_not_know_is_found() -> None:
    written = as_json(DASHBOARDS[0])
    written["panels"][1]["fieldConfig"]["defaults"]["units"] = "s"
    understood = json.loads(JSONEncoder().encode(grafana.Dashboard.from_json(json.loads(json.dumps(written)))))
    assert list(missing(written, understood)) == [".panels[1].fieldConfig.defaults.units"]


def test_every_field_with_a_set_of_values_has_one_of_them() -> None:
    met = set()
    for path, value in (leaf for dashboard in DASHBOARDS for leaf in leaves(as_json(dashboard))):
        for end, choices in CHOICES.items():
            # A dashboard's own refresh is an interval.
            if path.endswith(end) and path != ".refresh":
                assert value in {choice.value for choice in choices}, f"{path}: {value!r}"
                met.add(end)
        if path.endswith(("Mode", "mode", "Style", "placement")):
            assert any(path.endswith(end) for end in CHOICES), f"{path} is a choice that no set is known for"
    assert met == CHOICES.keys()


@by_uid
def test_what_grafana_requires_is_there(dashboard: Dashboard) -> None:
    written = as_json(dashboard)
    assert re.fullmatch(r"[a-z0-9-]{8,40}", written["uid"])
    assert {"title", "schemaVersion", "panels", "templating", "annotations", "time"} <= written.keys()
    ids = [panel["id"] for panel in written["panels"]]
    assert len(ids) == len(set(ids))
    cells: set[tuple[int, int]] = set()
    for panel in written["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] <= place["x"] + place["w"] <= 24
        area = {
            (column, line)
            for column in range(place["x"], place["x"] + place["w"])
            for line in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & area, f"{panel['title']} covers another panel"
        cells |= area
        if panel["type"] != "row":
            assert panel["datasource"] in (PROMETHEUS, LOKI)
            refs = [target["refId"] for target in panel["targets"]]
            assert refs
            assert len(refs) == len(set(refs))


@by_uid
def test_every_variable_that_is_used_is_declared_and_every_declared_one_is_used(dashboard: Dashboard) -> None:
    written = as_json(dashboard)
    used = set(re.findall(r"\$\{?([a-z][a-z_]*)\}?", json.dumps(written["panels"])))
    assert used == {variable["name"] for variable in written["templating"]["list"]}


def test_prometheus_parses_every_expression(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        message = "promtool not found: apt-get install prometheus"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    expressions = [expression for asked in promql().values() for expression in asked]
    rules = [{"record": f"panel_{index}", "expr": expression} for index, expression in enumerate(expressions)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    command = ["promtool", "check", "rules", "--lint=none", str(tmp_path / "panels.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROMTOOL_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout


@by_uid
def test_panels_use_only_metrics_and_labels_of_the_metrics_page(dashboard: Dashboard) -> None:
    labels = page_labels()
    expressions = [query.expression for panel in panels(dashboard) if not panel.asks_loki for query in panel.queries]
    variables = [str(variable["query"]) for variable in as_json(dashboard)["templating"]["list"]]
    for text in expressions + [query for query in variables if "label_values(ai_cluster" in query]:
        found = list(METRIC.finditer(text))
        assert found, text
        for match in found:
            name = base_name(match["name"])
            assert name in labels, f"{name} is not on docs/metrics.md: {text}"
            named = set(re.findall(r"([a-z_]+)(?:=~|=|!=)\"", match["selector"] or ""))
            assert named <= labels[name] | LABELS_OF_SCRAPES, text
        for match in FUNCTIONS_BY.finditer(text):
            wanted = {label.strip() for label in match["labels"].split(",")}
            assert wanted <= labels[base_name(match["metric"])] | LABELS_OF_SCRAPES, text


def test_the_data_sources_and_dashboards_are_provisioned_by_the_files() -> None:
    (sources,) = (PROVISIONING / "datasources").glob("*.yml")
    declared = yaml.safe_load(sources.read_text())
    assert declared["apiVersion"] == 1
    provisioned = {(source["name"], source["uid"], source["type"]) for source in declared["datasources"]}
    variables = [variable for dashboard in DASHBOARDS for variable in as_json(dashboard)["templating"]["list"]]
    chosen = [variable for variable in variables if variable["type"] == "datasource"]
    assert {(one["current"]["text"], one["current"]["value"], one["query"]) for one in chosen} == provisioned
    (providers,) = (PROVISIONING / "dashboards").glob("*.yml")
    (provider,) = yaml.safe_load(providers.read_text())["providers"]
    assert provider["type"] == "file"
    assert provider["options"]["path"].startswith("/")
