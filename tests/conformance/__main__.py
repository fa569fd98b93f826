"""`make conformance`: real clients at pinned versions against a mesh of three real nodes, and our own description of
the API against what the nodes answer. Exit status 1 where a client's tests failed, ran none, or its environment could
not be made; nothing is skipped for want of a tool.

  python -m tests.conformance [NAME…] [--list]   of the names listed, or all
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.conformance import environments
from tests.conformance.api_description.run import check_api_description
from tests.conformance.environments import HERE, InstallFailed
from tests.conformance.stage import EMBEDDING_MODEL, MODEL, Stage, control

SUITE_TIMEOUT_S = 240.0
STAGE_VARIABLE = "AI_CLUSTER_CONFORMANCE"
# No client asks anybody but the mesh: not for prices of models, not to send traces.
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "AI_SDK_LOG_WARNINGS": "false",
    "NO_PROXY": "127.0.0.1,localhost",
    "PYTHONDONTWRITEBYTECODE": "1",
}


@dataclass(frozen=True, slots=True)
class Suite:
    """prepare: makes the environment; command: runs the tests in it."""

    name: str
    prepare: Callable[[], object]
    command: Callable[[], tuple[list[str], Path]]


def python_suite(name: str) -> Suite:
    def command() -> tuple[list[str], Path]:
        python = environments.python_environment(name)
        return [str(python), "-m", "pytest", "-c", str(HERE / "pytest.ini"), str(HERE / name)], HERE

    return Suite(name, lambda: environments.python_environment(name), command)


def node_suite(name: str) -> Suite:
    def command() -> tuple[list[str], Path]:
        folder = environments.npm_environment(name)
        node = str(environments.node_runtime() / "node")
        return [node, "--test", "--test-concurrency=1", "--test-reporter=spec", f"{name}.test.mjs"], folder

    return Suite(name, lambda: environments.npm_environment(name), command)


SUITES = (
    python_suite("openai_python"),
    node_suite("openai_node"),
    node_suite("ai_sdk"),
    python_suite("langchain_python"),
    node_suite("langchain_node"),
    python_suite("litellm_python"),
)
DESCRIPTION = "api_description"


def main() -> int:
    names = [*(suite.name for suite in SUITES), DESCRIPTION]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(names))
    chosen = parser.parse_args().names or names
    if unknown := set(chosen) - set(names):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    started = time.monotonic()
    try:
        prepare(chosen)
    except InstallFailed as exc:
        print(exc, file=sys.stderr)
        return 1
    print(f"environments ready after {time.monotonic() - started:.0f} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="ai-cluster-conformance-") as folder:
        failed = run_suites(Path(folder), [suite for suite in SUITES if suite.name in chosen])
        if DESCRIPTION in chosen and not check_api_description(Path(folder) / DESCRIPTION):
            failed.append(DESCRIPTION)
    print(f"conformance: {len(chosen) - len(failed)} of {len(chosen)} suites hold, {time.monotonic() - started:.0f} s")
    for name in failed:
        print(f"FAILED: {name}")
    return 1 if failed else 0


def prepare(chosen: list[str]) -> None:
    """Raises InstallFailed."""
    if any(suite.name in chosen for suite in SUITES if (HERE / suite.name / "package.json").exists()):
        environments.node_runtime()
    makers: list[Callable[[], object]] = [suite.prepare for suite in SUITES if suite.name in chosen]
    if DESCRIPTION in chosen:
        makers.append(lambda: environments.python_environment(DESCRIPTION))
    with ThreadPoolExecutor(max_workers=2) as pool:
        for made in [pool.submit(maker) for maker in makers]:
            made.result()


def run_suites(folder: Path, suites: list[Suite]) -> list[str]:
    """The names of those that failed."""
    if not suites:
        return []
    stage = Stage(folder / "mesh")
    failed = []
    try:
        stage.start()
        with control(stage) as control_url:
            told = folder / "stage.json"
            facts = {
                "model": MODEL,
                "urls": [f"{node.url}/v1" for node in stage.mesh.nodes],
                "key": stage.create_key_by_cli("conformance"),
                "control": control_url,
                "embedding_model": EMBEDDING_MODEL,
            }
            told.write_text(json.dumps(facts))
            for suite in suites:
                started = time.monotonic()
                is_well = run_suite(suite, told)
                stage.heal({})
                print(
                    f"{suite.name}: {'holds' if is_well else 'FAILED'}, {time.monotonic() - started:.0f} s", flush=True
                )
                if not is_well:
                    failed.append(suite.name)
    finally:
        stage.close()
    return failed


def run_suite(suite: Suite, told: Path) -> bool:
    command, cwd = suite.command()
    environment = os.environ | QUIET | {STAGE_VARIABLE: str(told)}
    print(f"\n== {suite.name}", flush=True)
    try:
        return subprocess.run(command, cwd=cwd, env=environment, timeout=SUITE_TIMEOUT_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{suite.name} did not end within {SUITE_TIMEOUT_S:g} s")
        return False


if __name__ == "__main__":
    sys.exit(main())
