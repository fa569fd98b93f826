"""`python -m tests.benchmark.slice`: what a request costs, direct and through another node. Prints one JSON line.

Two nodes as real processes on loopback: an entry without models, and one that serves the built-in model. Runs are
interleaved and medians quoted; the client shares the machine, so absolute figures are lower bounds.

  ttft_ms, tokens_per_s      one stream at a time; direct: asked of the node that executes, forwarded: of the entry
  tokens_per_s_16            16 streams at once, all together
  health_requests_per_s      GET /health over 8 kept-alive connections
  entry_cpu_us_per_token     CPU time of the entry process per token it streamed, at 1 and at 16 streams
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.cluster.mesh import Mesh, NodeProcess

STREAM_TOKENS = 256
CONCURRENT = 16
HEALTH_CONNECTIONS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved repetitions of each measurement")
    parser.add_argument("--health-requests", type=int, default=2000, help="requests of the /health measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mesh = Mesh(Path(folder))
        try:
            server = mesh.add(name="server")
            entry = mesh.add("--no-model", name="entry")
            mesh.wait_until_agreed()
            print(json.dumps(measure(server, entry, options.rounds, options.health_requests)))
        finally:
            mesh.close()


def measure(server: NodeProcess, entry: NodeProcess, rounds: int, health_requests: int) -> dict[str, object]:
    """Every figure, rounded."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for node in (server, entry):
        stream(node)  # warm: connections, caches, the engine's measured rates
    for _ in range(rounds):
        for where, node in (("direct", server), ("forwarded", entry)):
            cpu = cpu_seconds(entry)
            ttft, seconds, tokens = stream(node)
            note(f"ttft_ms_{where}", ttft * 1e3)
            note(f"tokens_per_s_{where}", (tokens - 1) / (seconds - ttft))
            if where == "forwarded":
                note("entry_cpu_us_per_token_1", (cpu_seconds(entry) - cpu) / tokens * 1e6)
            progress(where)
    for _ in range(max(3, rounds // 2)):
        for where, node in (("direct", server), ("forwarded", entry)):
            cpu, started = cpu_seconds(entry), time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(CONCURRENT) as pool:
                tokens = sum(pool.map(lambda _, node=node: stream(node)[2], range(CONCURRENT)))
            note(f"tokens_per_s_16_{where}", tokens / (time.perf_counter() - started))
            if where == "forwarded":
                note("entry_cpu_us_per_token_16", (cpu_seconds(entry) - cpu) / tokens * 1e6)
            progress(f"{where} x {CONCURRENT}")
    note("health_requests_per_s", health_rate(entry, health_requests))
    return {name: round(statistics.median(values), 2) for name, values in found.items()} | {"cores": os.cpu_count()}


def stream(node: NodeProcess) -> tuple[float, float, int]:
    """(seconds to the first token's chunk, seconds in all, tokens) of one streamed answer of STREAM_TOKENS tokens."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "How do I add a node?"}],
        "stream": True,
        "temperature": 0,
        "max_tokens": STREAM_TOKENS,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(node.http, timeout=120)
    started = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    first = 0.0
    tokens = 0
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if not first and event["choices"] and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - started
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    connection.close()
    if not tokens:
        raise SystemExit(f"{node.name} answered {response.status} without a complete stream")
    return first, time.perf_counter() - started, tokens


def health_rate(node: NodeProcess, requests: int) -> float:
    def ask(count: int) -> None:
        connection = http.client.HTTPConnection(node.http, timeout=30)
        for _ in range(count):
            connection.request("GET", "/health")
            connection.getresponse().read()
        connection.close()

    share = requests // HEALTH_CONNECTIONS
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(HEALTH_CONNECTIONS) as pool:
        list(pool.map(ask, [share] * HEALTH_CONNECTIONS))
    return share * HEALTH_CONNECTIONS / (time.perf_counter() - started)


def cpu_seconds(node: NodeProcess) -> float:
    times = psutil.Process(node.pid).cpu_times()
    return times.user + times.system


def progress(what: str) -> None:
    print(f"measured: {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
