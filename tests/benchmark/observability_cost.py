"""`python -m tests.benchmark.observability_cost`: CPU that metrics, logs and tracing take together. One line of JSON.

Two nodes in this process on one engine: one as it is served, with metrics, JSON log files and a tracer, whose requests
come unsampled, with a traceparent; one with objects that count nothing, no logging and no tracer. Requests come over
HTTP from a process of their own and go through the production server, application, router, dispatch and engine. The
model's own work is a sleep and fixed logits, as on a GPU: with a model on the CPU the same cost would be a smaller
share. CPU is that of the process, all its threads, the log writer's included, which is waited for. Both take turns in
each round, in random order; figures are medians of the rounds' differences. Exit status 1 where one of these does not
hold:

  token_share    CPU of one streamed token more, as a share of what it costs without: at most 0.05
  request_ms     CPU of one short request more: at most 0.2 ms
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import trio

from mesh.errors import PeerUnavailable
from mesh.router import Router
from mesh.view import (
    Address,
    ClusterView,
    MemberStatus,
    MemberView,
    ModelInfo,
    ModelLoad,
    NodeLoad,
    NodeProfile,
    Readiness,
)
from nodes.api.admin_access import AdminAccess
from nodes.api.app import build_app
from nodes.api.services import ApiMetrics, Services
from nodes.dispatch import Dispatch
from nodes.engine.engine import Engine
from nodes.event_feed import EventFeed
from nodes.http_server import HttpServer, connections_max
from nodes.local import LocalGenerator, Observer
from nodes.member_views import MemberViews
from nodes.sockets import bind_http
from observability.log_writer import WriterThread
from observability.logs import configure_logging
from observability.metrics import ExecutorMetrics, Exposition, Metrics
from observability.span_export import open_pipeline, pipeline_tracer
from observability.tracing import NO_TRACING, Tracer
from tests.cluster.figures import finish, law, progress
from tests.unit.fake_access import FakeAccess
from tests.unit.fake_session import VOCABULARY, FakeSession, toy_model
from tests.unit.scripted_api import CountingMetrics

MODEL = "demo"
SLOTS = 8
STEP_S = 0.002  # of the model, in which a reader has the token before
DRAINED_S = 0.005  # a line that was taken from the queue is written
TRACED = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"}
NS_PER_US, NS_PER_MS = 1_000, 1_000_000
SHARE_MAX = 0.05
REQUEST_MS_MAX = 0.2


@dataclass(frozen=True, slots=True)
class Options:
    rounds: int = 60
    tokens: int = 100
    requests: int = 64
    seed: int = 7


class SleepingSession(FakeSession):
    """Costs no CPU but the engine's own."""

    def __init__(self) -> None:
        super().__init__(slots=SLOTS)
        logits = np.random.default_rng(1).standard_normal((SLOTS, VOCABULARY)).astype(np.float32)
        logits[:, :16] = -20.0
        self._fixed = logits

    def decode(self, token_ids: Any, lengths: Any) -> Any:
        time.sleep(STEP_S)
        return self._fixed[: len(token_ids)].copy()

    def prefill(self, slot: int, token_ids: Any, start: int) -> Any:
        return self._fixed[slot].copy()


class NoMetrics(CountingMetrics):
    """Counts nothing."""

    def http_request(
        self, method: str, path: str, status: int, seconds: float, exemplar: Mapping[str, str] | None = None
    ) -> None:
        pass

    def api_key_request(self, key_id: str, status: str) -> None:
        pass

    def rate_limited(self, key_id: str) -> None:
        pass

    def streaming_finished(self, model: str, status: str, seconds: float) -> None:
        pass


class Subject:
    """One node's application. headers: what its clients send beside what they must."""

    def __init__(
        self,
        engine: Engine,
        metrics: ApiMetrics,
        observer: Observer | None,
        tracer: Tracer,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.headers = {"content-type": "application/json", **headers}
        self._engine = engine
        self.dispatch = Dispatch(
            view=self._view,
            router=Router(random.Random(1)),
            local=LocalGenerator({MODEL: engine}, observer=observer, tracer=tracer),
            remote=_no_peer,
            peer_failed=lambda node_id: None,
            rng=random.Random(2),
            tracer=tracer,
        )
        access = FakeAccess()
        self._socket = bind_http(Address("127.0.0.1", 0))
        app = build_app(
            Services(
                node_id="a",
                version="0.1",
                cluster_name="benchmark",
                gate=access.gate,
                dispatch=self.dispatch,
                embeddings=None,  # type: ignore[arg-type]
                view=self._view,
                metrics=metrics,
                render_metrics=_no_page,
                render_cluster_metrics=_no_page,
                deadline_s=600.0,
                body_bytes_max=100_000,
                nodes_expected=None,
                admin_access=AdminAccess("the admin token"),
                operations=None,  # type: ignore[arg-type]
                key_admin=access.admin,
                events=EventFeed(self._view),
                member_views=MemberViews(self._view, _no_answer),
                tracer=tracer,
            )
        )
        self.server = HttpServer(app, self._socket, connections_max(64), None)

    @property
    def address(self) -> str:
        host, port = self._socket.getsockname()
        return f"{host}:{port}"

    def _view(self) -> ClusterView:
        engine = self._engine.statistics()
        load = ModelLoad(engine.active, engine.queued, engine.free_slots, engine.prefill_rate, engine.decode_rate)
        models = (ModelInfo(MODEL, self._engine.fingerprint, self._engine.context_length, SLOTS, 512),)
        member = MemberView(
            "a",
            Address("127.0.0.1", 7946),
            MemberStatus.ALIVE,
            1,
            1,
            NodeLoad(Readiness.READY, models=MappingProxyType({MODEL: load})),
            NodeProfile("127.0.0.1:8080", "0.1", models),
            0.0,
            is_self=True,
        )
        return ClusterView("a", trio.current_time(), MappingProxyType({"a": member}))


def _no_peer(member: MemberView) -> Any:
    raise AssertionError("there is one node")


async def _no_page(*headers: str) -> Exposition:
    raise AssertionError("nobody asks for it")


async def _no_answer(member: MemberView, question: bytes) -> bytes:
    raise PeerUnavailable("there is one node")


QUESTION = [{"role": "user", "content": "What is measured here?"}]


class Measurement:
    """Switches between the two and takes their CPU."""

    def __init__(
        self,
        options: Options,
        writer: WriterThread[logging.LogRecord],
        clients: trio.Process,
        on: Subject,
        off: Subject,
    ) -> None:
        self._writer = writer
        self._clients = clients
        self._subjects = {"on": on, "off": off}
        shape = {"model": MODEL, "messages": QUESTION, "temperature": 0, "ignore_eos": True}
        self._stream = shape | {"stream": True, "max_tokens": options.tokens}
        self._short = shape | {"max_tokens": 1}
        self._options = options

    async def cpu_ns(self, name: str) -> tuple[float, float]:
        """Of one streamed token, and of one short request."""
        logging.disable(logging.NOTSET if name == "on" else logging.CRITICAL)
        subject = self._subjects[name]
        streamed = await self._cpu_ns(subject, self._stream, SLOTS)
        short = await self._cpu_ns(subject, self._short, self._options.requests)
        return streamed / (SLOTS * self._options.tokens), short / self._options.requests

    async def _cpu_ns(self, subject: Subject, body: Mapping[str, Any], count: int) -> float:
        order = {"address": subject.address, "body": json.dumps(body), "headers": subject.headers}
        line = json.dumps(order | {"count": count, "at_once": SLOTS}).encode() + b"\n"
        assert self._clients.stdin is not None
        assert self._clients.stdout is not None
        started = time.process_time_ns()
        await self._clients.stdin.send_all(line)
        assert await self._clients.stdout.receive_some() == b"done\n", "the clients failed"
        while not self._writer._queue.empty():
            await trio.sleep(DRAINED_S)
        await trio.sleep(DRAINED_S)
        return time.process_time_ns() - started


@asynccontextmanager
async def _running(engine: Engine, *subjects: Subject) -> AsyncIterator[trio.Process]:
    """The process of the clients."""
    command = [sys.executable, "-m", "tests.benchmark.loopback_client"]
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        for subject in subjects:
            await nursery.start(subject.server.run)
        clients = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            yield clients
        finally:
            clients.kill()
            with trio.CancelScope(shield=True):
                await clients.wait()
            nursery.cancel_scope.cancel()


async def run(options: Options) -> dict[str, Any]:
    rng = random.Random(options.seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        writer = stack.enter_context(configure_logging(folder, "a", console="none"))
        pipeline = open_pipeline("http://127.0.0.1:9/v1/traces", {})
        stack.callback(pipeline.close)
        stack.callback(logging.disable, logging.NOTSET)
        tracer = pipeline_tracer(pipeline, sample_ratio=1.0, service_name="s", node_id="a", version="0.1")
        metrics = Metrics("a", "0.1")
        metrics.model_loaded(MODEL, 1.0, 1)
        engine = Engine(toy_model(), SleepingSession(), queue_limit=512)
        on = Subject(engine, metrics, ExecutorMetrics(metrics), tracer, TRACED)
        off = Subject(engine, NoMetrics(), None, NO_TRACING)
        samples: dict[str, list[tuple[float, float]]] = {"on": [], "off": []}
        async with _running(engine, on, off) as clients:
            measurement = Measurement(options, writer, clients, on, off)
            for index in range(-max(1, options.rounds // 10), options.rounds):  # the first warm up
                if not index:
                    progress("measuring")
                for name in rng.sample(["on", "off"], 2):
                    found = await measurement.cpu_ns(name)
                    if index >= 0:
                        samples[name].append(found)
        assert "trace_id" in (folder / "combined.log").read_text(), "it logged"
        assert pipeline.statistics().dropped_export == 0, "nothing was sampled"
    pairs = list(zip(samples["on"], samples["off"], strict=True))
    share = statistics.median((with_all[0] - without[0]) / without[0] for with_all, without in pairs)
    request_ns = statistics.median(with_all[1] - without[1] for with_all, without in pairs)
    return {
        "rounds": options.rounds,
        "seed": options.seed,
        "token_us": {name: _median_us([token for token, _ in found]) for name, found in samples.items()},
        "request_us": {name: _median_us([request for _, request in found]) for name, found in samples.items()},
        "laws": {
            "token_share": law(share, at_most=SHARE_MAX),
            "request_ms": law(request_ns / NS_PER_MS, at_most=REQUEST_MS_MAX),
        },
    }


def _median_us(values_ns: list[float]) -> float:
    return round(statistics.median(values_ns) / NS_PER_US, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Options()
    parser.add_argument("--rounds", type=int, default=defaults.rounds)
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="of each streamed answer")
    parser.add_argument("--requests", type=int, default=defaults.requests, help="short ones, in a batch")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    finish(trio.run(run, Options(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
