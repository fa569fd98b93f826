"""The HTTP application over a scripted Dispatch, and a client of it: what tests of the API stand on."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import httpx
import numpy as np
import trio

from mesh.errors import PeerUnavailable
from mesh.view import (
    GENERATION,
    Address,
    ClusterView,
    MemberStatus,
    MemberView,
    ModelInfo,
    NodeLoad,
    NodeProfile,
    Readiness,
)
from nodes.api.admin_access import AdminAccess
from nodes.api.app import build_app
from nodes.api.services import Services
from nodes.attempts import Move
from nodes.embedding import EmbedRequest
from nodes.embedding_dispatch import Embedded
from nodes.event_feed import EventFeed
from nodes.generation import GenerateEvent, GenerateRequest, Usage
from nodes.member_views import MemberViews
from observability.metrics import Exposition
from observability.tracing import NO_TRACING, Tracer
from tests.unit.fake_access import FakeAccess

Step = GenerateEvent | Exception | Move | float

ANSWER = (GenerateEvent("Hel", (1,)), GenerateEvent("lo", (2,)), GenerateEvent("!", (3,), "stop", Usage(5, 3, 0)))
BODY = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


class ScriptedStream(trio.abc.ReceiveChannel[GenerateEvent]):
    """Plays events, errors and pauses (floats, seconds); remembers that it was closed."""

    def __init__(self, script: Sequence[Step]) -> None:
        self.node_id = "b"
        self.moves: list[Move] = []
        self.path: list[str] = ["b"]
        self.failovers = 0
        self.first_token_s: float | None = None
        self.is_closed = False
        self._opened_at = trio.current_time()
        self._script = list(script)
        self._resume_at = 0.0

    async def receive(self) -> GenerateEvent:
        while self._script:
            if isinstance(self._script[0], float):
                # Remembered, so that a read cut short by a timeout resumes the pause instead of restarting it.
                self._resume_at = trio.current_time() + self._script.pop(0)
            await trio.sleep_until(self._resume_at)
            step = self._script.pop(0)
            if isinstance(step, Move):
                self.node_id = step.target
                self.moves.append(step)
                continue
            if isinstance(step, Exception):
                raise step
            if isinstance(step, GenerateEvent):
                if self.first_token_s is None:
                    self.first_token_s = trio.current_time() - self._opened_at
                return step
        raise trio.EndOfChannel

    async def aclose(self) -> None:
        self.is_closed = True


class ScriptedDispatch:
    """Plays the same script for every request, or one of `scripts` for each, in order."""

    def __init__(
        self, *script: Step, refusal: Exception | None = None, scripts: Sequence[Sequence[Step]] | None = None
    ) -> None:
        self.requests: list[GenerateRequest] = []
        self.streams: list[ScriptedStream] = []
        self._script = script
        self._scripts = scripts
        self._refusal = refusal

    @property
    def stream(self) -> ScriptedStream:
        return self.streams[0]

    async def open(self, request: GenerateRequest) -> ScriptedStream:
        self.requests.append(request)
        if self._refusal is not None:
            raise self._refusal
        self.streams.append(ScriptedStream(self._scripts[len(self.streams)] if self._scripts else self._script))
        return self.streams[-1]


class ScriptedEmbeddings:
    """Gives vectors that tell the input's place: row i is (i + 1, 0.5, -0.25, 0...); or raises."""

    def __init__(self, dimensions: int = 4, refusal: Exception | None = None) -> None:
        self.requests: list[EmbedRequest] = []
        self._dimensions = dimensions
        self._refusal = refusal

    async def embed(self, request: EmbedRequest) -> Embedded:
        self.requests.append(request)
        await trio.lowlevel.checkpoint()
        if self._refusal is not None:
            raise self._refusal
        vectors = np.zeros((len(request.inputs), request.dimensions or self._dimensions), np.float32)
        vectors[:, :3] = [(index + 1, 0.5, -0.25) for index in range(len(request.inputs))]
        return Embedded(vectors, 3 * len(request.inputs), ("b",))


class CountingMetrics:
    def __init__(self) -> None:
        self.http: list[tuple[str, str, int]] = []
        self.keys: list[tuple[str, str]] = []
        self.streams: list[tuple[str, str]] = []
        self.limited: list[str] = []
        self.exemplars: list[dict[str, str]] = []

    def rate_limited(self, key_id: str) -> None:
        self.limited.append(key_id)

    def http_request(
        self, method: str, path: str, status: int, seconds: float, exemplar: Mapping[str, str] | None = None
    ) -> None:
        self.http.append((method, path, status))
        self.exemplars.append(dict(exemplar or {}))

    def api_key_request(self, key_id: str, status: str) -> None:
        self.keys.append((key_id, status))

    def streaming_finished(self, model: str, status: str, seconds: float) -> None:
        self.streams.append((model, status))


def view(
    readiness: Readiness = Readiness.READY,
    *,
    models: tuple[str, ...] = ("demo",),
    kind: str = GENERATION,
    **fingerprints: str,
) -> ClusterView:
    members = {}
    for node_id, fingerprint in (fingerprints or {"a": "f1"}).items():
        members[node_id] = MemberView(
            node_id=node_id,
            address=Address("127.0.0.1", 7946),
            status=MemberStatus.ALIVE,
            generation=1,
            version=1,
            load=NodeLoad(readiness=readiness),
            profile=NodeProfile(
                "127.0.0.1:8080", "0.1", tuple(ModelInfo(model, fingerprint, 1024, 8, kind=kind) for model in models)
            ),
            age_s=0.0,
            is_self=node_id == "a",
        )
    return ClusterView("a", 0.0, MappingProxyType(members))


class Api:
    """An application and a client of it. Use as `async with`."""

    def __init__(
        self,
        dispatch: ScriptedDispatch,
        cluster: ClusterView | None = None,
        is_open: bool = True,
        embeddings: ScriptedEmbeddings | None = None,
        cors_origins: tuple[str, ...] = (),
        tracer: Tracer = NO_TRACING,
    ) -> None:
        self.dispatch = dispatch
        self.embeddings = embeddings or ScriptedEmbeddings()
        self.metrics = CountingMetrics()
        self.access = FakeAccess(is_open=is_open)
        cluster = cluster or view()
        self.events = EventFeed(lambda: cluster, wall_clock=lambda: 1_000.0)

        async def no_peer(member: MemberView, question: bytes) -> bytes:
            raise PeerUnavailable("no peer is there")

        async def render_metrics(accept: str, accept_encoding: str) -> Exposition:
            if "gzip" in accept_encoding:
                return Exposition("text/plain", gzip.compress(b"metrics\n"), "gzip")
            return Exposition("text/plain", b"metrics\n")

        async def render_cluster_metrics(accept_encoding: str) -> Exposition:
            return Exposition("text/plain", b"cluster metrics\n")

        app = build_app(
            Services(
                node_id="a",
                version="0.1",
                cluster_name="test",
                gate=self.access.gate,
                dispatch=dispatch,  # type: ignore[arg-type]
                embeddings=self.embeddings,  # type: ignore[arg-type]
                view=lambda: cluster,
                metrics=self.metrics,
                render_metrics=render_metrics,
                render_cluster_metrics=render_cluster_metrics,
                deadline_s=600.0,
                body_bytes_max=10_000,
                nodes_expected=None,
                admin_access=AdminAccess("the admin token"),
                operations=None,  # type: ignore[arg-type]
                key_admin=self.access.admin,
                events=self.events,
                member_views=MemberViews(lambda: cluster, no_peer),
                cors_origins=cors_origins,
                tracer=tracer,
            )
        )
        self.app = app
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def chat(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=BODY | fields)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": "demo", "prompt": "once"} | fields)

    async def embed(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/embeddings", json={"model": "demo", "input": "once"} | fields)


def events(response: httpx.Response) -> list[Any]:
    """The stream's payloads; the string [DONE] and comments stay strings."""
    found: list[Any] = []
    for block in response.text.strip().split("\n\n"):
        data = block.removeprefix("data: ")
        found.append(json.loads(data) if data.startswith("{") else data)
    return found
