"""deploy/: what containers, systemd and Kubernetes are told, checked by their own readers where there are such."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

from nodes.config import NodeConfig, load_config
from tests.compose_file import FOLDER, ROOT, compose, dockerfile, health_command, image_environment, node_services

VARIABLES = {"CLUSTER_KEY": "x", "GRAFANA_PASSWORD": "x"}
SYSTEMD = ROOT / "deploy" / "systemd"
KUBERNETES = ROOT / "deploy" / "kubernetes"
KUBERNETES_VERSION = "1.31"
TOOL_TIMEOUT_S = 120
# systemd's own measure, 0 (locked up) to 10 (open).
EXPOSURE_MAX = 2.0
# Packages that are tools of this repository and are not installed with it.
NOT_INSTALLED = {"observability.grafana"}


def require(tool: str, package: str) -> None:
    if shutil.which(tool) is None:
        message = f"{tool} not found: install {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)


def test_an_installed_node_has_every_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for top in ("mesh", "nodes", "observability")
        for file in (ROOT / top).rglob("__init__.py")
    }
    assert listed == found - NOT_INSTALLED


# Containers.


@pytest.fixture
def filled() -> dict[str, Any]:
    return compose(VARIABLES)


def test_the_compose_specification_s_reader_takes_the_file(filled: dict[str, Any]) -> None:
    PyCompose.from_json(json.dumps(filled)).validate()


def test_the_compose_specification_s_reader_refuses_an_unknown_key(filled: dict[str, Any]) -> None:
    filled["services"]["node-1"]["portz"] = []
    with pytest.raises(ValueError, match="portz"):
        PyCompose.from_json(json.dumps(filled))


def test_starting_without_a_password_of_grafana_is_refused() -> None:
    with pytest.raises(KeyError, match="GRAFANA_PASSWORD"):
        compose({})


def test_the_example_of_variables_names_all_that_are_used() -> None:
    example = dict(line.split("=", 1) for line in (FOLDER / ".env.example").read_text().splitlines() if line[0] != "#")
    text = (FOLDER / "compose.yaml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text)) | set(re.findall(r"^    environment: (\w+)$", text, re.MULTILINE))
    assert example.keys() == used


def test_every_mounted_file_exists_and_every_volume_is_declared_and_used(filled: dict[str, Any]) -> None:
    used = set()
    for service in filled["services"].values():
        for mount in service["volumes"]:
            source, target, *options = mount.split(":")
            assert target.startswith("/")
            if source.startswith("."):
                assert (FOLDER / source).exists(), source
                assert options == ["ro"]
            else:
                used.add(source)
    assert used == filled["volumes"].keys()


def test_every_name_that_a_container_calls_is_a_service(filled: dict[str, Any]) -> None:
    ports = {"grafana": 3000, "loki": 3100, "prometheus": 9090} | dict.fromkeys(node_services(filled), 8080)
    urls = [str(value) for service in filled["services"].values() for value in service.get("environment", {}).values()]
    called = [match for url in urls for match in re.findall(r"http://([\w-]+):(\d+)", url)]
    jobs = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    called += [
        tuple(target.split(":")) for job in jobs for group in job["static_configs"] for target in group["targets"]
    ]
    assert called
    for name, port in called:
        assert ports.get("prometheus" if name == "localhost" else name) == int(port), name


def test_grafana_s_data_sources_get_their_addresses_from_its_environment(filled: dict[str, Any]) -> None:
    sources = (ROOT / "observability/grafana/provisioning/datasources/ai-cluster.yml").read_text()
    grafana = filled["services"]["grafana"]
    assert set(re.findall(r"url: \$\{(\w+)\}", sources)) <= grafana["environment"].keys()
    provider = yaml.safe_load((ROOT / "observability/grafana/provisioning/dashboards/ai-cluster.yml").read_text())
    path = provider["providers"][0]["options"]["path"]
    assert f"../../observability/grafana/dashboards:{path}:ro" in grafana["volumes"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == path
    assert (ROOT / "observability/grafana/dashboards" / home.name).exists()


def test_alloy_finds_the_logs_and_loki(filled: dict[str, Any]) -> None:
    alloy = (ROOT / "observability/logging/config.alloy").read_text()
    (pattern,) = re.findall(r'__path__" = "([^"]+)"', alloy)
    for name, service in node_services(filled).items():
        assert Path(service["environment"]["AI_CLUSTER_LOG_DIR"], "combined.log").match(pattern), name
        assert "logs:/var/log/ai-cluster" in service["volumes"]
    assert set(re.findall(r'sys\.env\("(\w+)"\)', alloy)) <= filled["services"]["alloy"]["environment"].keys()


def test_every_node_knows_all_and_each_is_reached_under_its_service_s_name(filled: dict[str, Any]) -> None:
    nodes = node_services(filled)
    assert len(nodes) == 3
    addresses = set()
    for name, service in nodes.items():
        environment = service["environment"]
        config = load_config(None, {**image_environment(), **environment}, {})
        assert config.name == name
        assert str(config.advertise) == f"{name}:{config.mesh.port}"
        assert config.nodes_expected == len(nodes)
        assert f"{name}:/var/lib/ai-cluster" in service["volumes"]
        assert service["stop_grace_period"] == f"{config.drain_s + 10:g}s"
        addresses.add(tuple(map(str, config.join)))
    assert addresses == {tuple(f"{name}:7946" for name in nodes)}


def test_the_image_runs_as_nobody_special_and_asks_for_readiness() -> None:
    instructions = [instruction for instruction, _ in dockerfile()]
    users = [arguments for instruction, arguments in dockerfile() if instruction == "USER"]
    assert users == ["10001:10001"]
    assert instructions.index("USER") < instructions.index("ENTRYPOINT")
    assert any("/health/ready" in part for part in health_command())
    config = load_config(None, image_environment(), {})
    assert (config.http.port, config.mesh.port) == (8080, 7946)


def test_the_image_copies_only_what_the_build_context_has() -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    copied = {
        source
        for instruction, arguments in dockerfile()
        if instruction == "COPY" and not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


def test_the_versions_of_the_image_are_those_of_the_lock(tmp_path: Path) -> None:
    (script,) = [
        arguments for instruction, arguments in dockerfile() if "constraints.txt" in arguments and "sed" in arguments
    ]
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    subprocess.run(script, shell=True, cwd=tmp_path, check=True)  # noqa: S602  the Dockerfile's own line
    constraints = (tmp_path / "constraints.txt").read_text().splitlines()
    locked = re.findall(r"^[A-Za-z0-9][^ ]*==[^ ]+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert [line.split(" ")[0] for line in constraints] == locked
    assert not any("\\" in line or "--hash" in line for line in constraints)


# systemd.


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """An instance of the unit, whose program is one that is installed here."""
    text = (SYSTEMD / "ai-cluster@.service").read_text().replace("/opt/ai-cluster/bin/ai-cluster", "/bin/true")
    file = tmp_path / "ai-cluster@node-1.service"
    file.write_text(text)
    return file


def test_systemd_finds_no_fault_in_the_unit(unit: Path) -> None:
    require("systemd-analyze", "systemd")
    done = run("systemd-analyze", "verify", "--man=no", str(unit))
    assert done.returncode == 0
    assert unit.name not in done.stderr, done.stderr


def test_systemd_finds_a_key_that_it_does_not_know(unit: Path) -> None:
    require("systemd-analyze", "systemd")
    unit.write_text(unit.read_text().replace("RestartSec=", "RestartSecs="))
    assert "RestartSecs" in run("systemd-analyze", "verify", "--man=no", str(unit)).stderr


def test_systemd_holds_the_unit_for_locked_up(unit: Path) -> None:
    require("systemd-analyze", "systemd")
    done = run("systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX * 10:g}", str(unit))
    assert done.returncode == 0, done.stdout[-500:]


def test_the_unit_s_variables_and_the_example_are_a_node_s_configuration() -> None:
    text = (SYSTEMD / "ai-cluster@.service").read_text()
    environment = dict(re.findall(r"^Environment=(\w+)=(\S+)$", text, re.MULTILINE))
    config = load_config(SYSTEMD / "node.toml.example", {**environment, "AI_CLUSTER_NAME": "node-1"}, {})
    assert config.mesh in config.join
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert int(stop_s) >= config.drain_s + 5


# Kubernetes.


def documents(name: str = "ai-cluster.yaml") -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((KUBERNETES / name).read_text()) if document]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for document in documents() if document["kind"] == kind]


@pytest.mark.parametrize(
    "document", documents(), ids=lambda document: f"{document['kind']} {document['metadata']['name']}"
)
def test_kubernetes_schema_takes_every_object(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def test_kubernetes_schema_refuses_an_unknown_field() -> None:
    (stateful_set,) = of_kind("StatefulSet")
    stateful_set["spec"]["replica"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(stateful_set, KUBERNETES_VERSION, strict=True)


def test_the_pods_are_nodes_that_know_each_other_and_have_time_to_drain() -> None:
    (stateful_set,) = of_kind("StatefulSet")
    spec = stateful_set["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value", "node-1") for entry in container["env"]}
    environment["AI_CLUSTER_ADVERTISE"] = environment["AI_CLUSTER_ADVERTISE"].replace("$(POD_IP)", "10.0.0.1")
    environment.pop("POD_IP")
    config = load_config(None, {**image_environment(), **environment}, {})
    name = stateful_set["metadata"]["name"]
    assert [str(address) for address in config.join] == [
        f"{name}-{index}.{spec['serviceName']}:7946" for index in range(spec["replicas"])
    ]
    assert config.nodes_expected == spec["replicas"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= config.drain_s + 5
    probe = container["readinessProbe"]
    assert probe["periodSeconds"] * probe.get("failureThreshold", 3) <= config.drain_notice_s
    (headless,) = [service for service in of_kind("Service") if service["metadata"]["name"] == spec["serviceName"]]
    assert headless["spec"]["clusterIP"] == "None"
    assert headless["spec"]["publishNotReadyAddresses"] is True


def test_the_secret_is_mounted_where_the_node_reads_it() -> None:
    (stateful_set,) = of_kind("StatefulSet")
    pod = stateful_set["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (secret,) = [volume for volume in pod["volumes"] if "secret" in volume]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == secret["name"]]
    (kustomization,) = documents("kustomization.yaml")
    (generated,) = kustomization["secretGenerator"]
    assert generated["name"] == secret["secret"]["secretName"]
    (file,) = [entry["value"] for entry in container["env"] if entry["name"] == "AI_CLUSTER_CLUSTER_KEY_FILE"]
    assert file == f"{mount['mountPath']}/{generated['files'][0]}"
    assert kustomization["resources"] == ["ai-cluster.yaml"]


def test_selectors_find_the_pods_and_the_monitor_the_headless_service() -> None:
    (stateful_set,) = of_kind("StatefulSet")
    labels = stateful_set["spec"]["template"]["metadata"]["labels"].items()
    selectors = [service["spec"]["selector"] for service in of_kind("Service")]
    selectors += [one["spec"]["selector"]["matchLabels"] for one in [stateful_set, *of_kind("PodDisruptionBudget")]]
    assert all(selector.items() <= labels for selector in selectors)
    (monitor,) = documents("servicemonitor.yaml")
    found = [
        service
        for service in of_kind("Service")
        if monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ]
    (watched,) = found  # one, or everything is scraped twice
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in watched["spec"]["ports"]}


def test_every_variable_of_the_files_is_a_configuration_key() -> None:
    for file in (FOLDER / "compose.yaml", SYSTEMD / "ai-cluster@.service", KUBERNETES / "ai-cluster.yaml"):
        keys = {name.lower() for name in re.findall(r"\bAI_CLUSTER_([A-Z_]+)", file.read_text())}
        assert keys <= NodeConfig.model_fields.keys(), file
