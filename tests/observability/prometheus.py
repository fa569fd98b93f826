"""A real Prometheus for tests: Debian's, with the shipped configuration and rules, on a port of the kernel's choice."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.mesh import wait_for

SHIPPED = Path(__file__).parents[2] / "observability" / "prometheus"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
# What minutes are in the shipped files.
INTERVAL = "1s"
HOLD_MAX_S = 5


def require_prometheus() -> None:
    """Skip where prometheus and promtool are not installed; where CI runs, that is a failure."""
    missing = [tool for tool in ("prometheus", "promtool") if shutil.which(tool) is None]
    if not missing:
        return
    message = f"{' and '.join(missing)} not found: apt-get install prometheus"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def fast_configuration(folder: Path, addresses: Mapping[str, str]) -> Path:
    """The shipped files in `folder`, with other addresses and every second what is every 15 there. addresses: shipped →
    real; every shipped one has to be in it."""
    text = (SHIPPED / "prometheus.yml").read_text()
    for shipped in set(re.findall(r"(?:localhost|127\.0\.0\.1):\d+", text)) - addresses.keys():
        raise AssertionError(f"the shipped configuration names {shipped}, which the test does not place")
    for shipped, real in addresses.items():
        text = text.replace(shipped, real).replace(shipped.replace(".", r"\."), real.replace(".", r"\."))
    text = re.sub(r"(scrape_interval|evaluation_interval|refresh_interval): 15s", rf"\1: {INTERVAL}", text)
    (folder / "prometheus.yml").write_text(text)
    for name in ("recording.yml", "alerts.yml"):
        rules = yaml.safe_load((SHIPPED / name).read_text())
        for group in rules["groups"]:
            group["interval"] = INTERVAL
            for rule in group["rules"]:
                if "for" in rule:
                    rule["for"] = f"{HOLD_MAX_S}s"
        (folder / name).write_text(yaml.safe_dump(rules))
    return folder / "prometheus.yml"


class Prometheus:
    """prefix: what runs a command elsewhere, such as in a network namespace; queries then run there as well."""

    def __init__(self, folder: Path, prefix: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.url = ""
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, configuration: Path, listen: str = "127.0.0.1:0") -> Prometheus:
        log = self.folder / "prometheus.log"
        command = [*self._prefix, "prometheus", f"--config.file={configuration}", f"--web.listen-address={listen}"]
        command += [f"--storage.tsdb.path={self.folder / 'tsdb'}", "--enable-feature=exemplar-storage"]
        with open(log, "ab") as stderr:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)
        found: list[str] = []

        def listens() -> bool:
            found[:] = re.findall(r'msg="Listening on" address=(\S+)', log.read_text())
            return bool(found)

        wait_for(listens, "prometheus listens", START_TIMEOUT_S, self._check_alive)
        self.url = f"http://{found[0]}"
        wait_for(self._is_ready, "prometheus is ready", START_TIMEOUT_S, self._check_alive)
        return self

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(STOP_TIMEOUT_S)

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of each series; raises AssertionError for a query that Prometheus refuses."""
        answer = self._get("/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        assert answer["status"] == "success", answer
        data = answer["data"]
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(row["metric"], float(row["value"][1])) for row in data["result"]]

    def value(self, expression: str) -> float:
        """The one value; 0.0 where there is none."""
        rows = self.query(expression)
        assert len(rows) <= 1, rows
        return rows[0][1] if rows else 0.0

    def exemplars(self, expression: str) -> list[dict[str, str]]:
        path = "/api/v1/query_exemplars?" + urllib.parse.urlencode({"query": expression, "start": "0", "end": "9e9"})
        return [row["labels"] for series in self._get(path)["data"] for row in series["exemplars"]]

    def targets(self) -> dict[str, set[str]]:
        """job → addresses."""
        found: dict[str, set[str]] = {}
        for target in self._get("/api/v1/targets?state=active")["data"]["activeTargets"]:
            found.setdefault(target["labels"]["job"], set()).add(target["labels"]["instance"])
        return found

    def firing(self) -> set[str]:
        return {labels["alertname"] for labels, _ in self.query('ALERTS{alertstate="firing"}')}

    def _get(self, path: str) -> Any:
        if self._prefix:
            program = "import sys, urllib.request; sys.stdout.buffer.write(urllib.request.urlopen(sys.argv[1]).read())"
            command = [*self._prefix, "python3", "-c", program, self.url + path]
            return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}") from None

    def _is_ready(self) -> bool:
        try:
            return bool(self._get("/api/v1/status/runtimeinfo"))
        except (OSError, AssertionError, subprocess.CalledProcessError):
            return False

    def _check_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise AssertionError(f"prometheus ended: {(self.folder / 'prometheus.log').read_text()[-2000:]}")
