"""The shipped configuration, recording rules and alerts, checked by promtool; and that each of them has its cases."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.metrics_page import page_rows
from tests.observability.prometheus import SHIPPED, require_prometheus

CASES = SHIPPED / "tests"
# What the monitoring guide had, and why it could not stay: each fails its alert's cases.
GUIDE_ALERTS = {
    "HighErrorRate": 'rate(ai_cluster_inference_requests_total{status="error"}[5m])'
    " / rate(ai_cluster_inference_requests_total[5m]) > 0.05",
    "HighLatency": "histogram_quantile(0.95, rate(ai_cluster_inference_duration_seconds_bucket[5m])) > 10",
    "NodesDown": 'ai_cluster_cluster_nodes_total{status="healthy"} < 2',
    "RateLimitHigh": "rate(ai_cluster_api_key_rate_limit_hits_total[5m]) > 10",
}
TIMEOUT_S = 120


@pytest.fixture(autouse=True)
def tools() -> None:
    require_prometheus()


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((SHIPPED / name).read_text())["groups"] for rule in group["rules"]]


def cases() -> list[dict[str, Any]]:
    return [case for path in sorted(CASES.glob("*.yml")) for case in yaml.safe_load(path.read_text())["tests"]]


def test_promtool_finds_no_fault_in_the_configuration_and_the_rules() -> None:
    for arguments in (
        ("check", "config", str(SHIPPED / "prometheus.yml")),
        ("check", "rules", "--lint-fatal", str(SHIPPED / "recording.yml"), str(SHIPPED / "alerts.yml")),
    ):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(CASES.glob("*.yml")), ids=lambda path: path.stem)
def test_promtool_runs_the_cases(path: Path) -> None:
    done = promtool("test", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_must_not() -> None:
    kinds: dict[str, set[bool]] = defaultdict(set)
    for case in cases():
        for expected in case.get("alert_rule_test", ()):
            kinds[expected["alertname"]].add(bool(expected["exp_alerts"]))
    assert kinds == {rule["alert"]: {True, False} for rule in rules("alerts.yml")}


def test_every_recording_rule_has_a_case() -> None:
    asked = {expected["expr"] for case in cases() for expected in case.get("promql_expr_test", ())}
    assert asked == {f"round({rule['record']}, 0.001)" for rule in rules("recording.yml")}


@pytest.mark.parametrize("alert", GUIDE_ALERTS)
def test_the_cases_tell_the_guides_expressions_from_ours(alert: str, tmp_path: Path) -> None:
    files = {name: yaml.safe_load((SHIPPED / name).read_text()) for name in ("recording.yml", "alerts.yml")}
    found = [rule for group in files["alerts.yml"]["groups"] for rule in group["rules"] if rule.get("alert") == alert]
    found[0]["expr"] = GUIDE_ALERTS[alert]
    for name, content in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
    shipped = yaml.safe_load((CASES / "alerts_test.yml").read_text())
    shipped["tests"] = [case for case in shipped["tests"] if case["alert_rule_test"][0]["alertname"] == alert]
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "alerts_test.yml").write_text(yaml.safe_dump(shipped))
    done = promtool("test", "rules", str(tmp_path / "tests" / "alerts_test.yml"))
    assert done.returncode != 0
    assert alert in done.stdout + done.stderr


def test_rules_read_metrics_that_nodes_export() -> None:
    """A name that nobody exports gives an alert that never fires."""
    known = set(page_rows()) | {f"{name}_{part}" for name in page_rows() for part in ("bucket", "sum", "count")}
    known |= {rule["record"] for rule in rules("recording.yml")}
    known |= {"up", "prometheus_sd_http_failures_total"}
    known.add("ai_cluster_tls_certificate_expiry_timestamp_seconds")  # exported where TLS is configured
    read = {name for rule in rules("recording.yml") + rules("alerts.yml") for name in metric_names(rule["expr"])}
    assert read - known == set()


def metric_names(expression: str) -> set[str]:
    """As promtool has them, from the expression in its own layout."""
    import re

    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', "", expression)
    bare = re.sub(r"\b(?:by|on|ignoring|without) \([^)]*\)", "", bare)
    words = set(re.findall(r"[a-zA-Z_][\w:]*", bare))
    return {word for word in words if "_" in word or ":" in word} - {
        "histogram_quantile",
        "count_values",
        "max_over_time",
    }
