"""The mesh that clients are run against: three real nodes and an API key, and what may be done to them meanwhile.

node-1 has no model, so that every request to it is forwarded, and whoever generates can be killed without its client.
What a client's tests may ask for is asked over HTTP on loopback, since they run in processes of their own:

  POST /keys           an API key with the settings in the body → {"key"}
  POST /kill-executor  SIGKILL to the node that generates now → {"node", "url"}
  POST /revive         start what was killed, and answer before it is ready → {}
  POST /heal           the same, and wait until all see all healthy → {}
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.cluster.mesh import Mesh, NodeProcess, wait_for

MODEL = "demo"
EMBEDDING_MODEL = "encoder"
ENCODER_MODULE = "nodes.model_tools.random_encoder"
BUILT_IN = Path(__file__).parents[2] / "nodes" / "models" / "demo"
EXECUTOR_TIMEOUT_S = 20.0
CLI_TIMEOUT_S = 60.0


class Stage:
    """A mesh of which nodes may be killed and started again, by one caller at a time."""

    def __init__(self, folder: Path, *options: str) -> None:
        """options: of every node."""
        self.mesh = Mesh(folder)
        self._options = options
        self._killed: list[NodeProcess] = []
        self._reviving: list[threading.Thread] = []
        self._lock = threading.Lock()

    def start(self) -> None:
        models = self._models()
        self.mesh.add("--no-model", *self._options)
        self.mesh.add(*models, *self._options)
        self.mesh.add(*models, *self._options)
        self.mesh.wait_until_agreed()

    def _models(self) -> tuple[str, ...]:
        """An embedding model beside the built-in one, as soon as this version can make one."""
        if importlib.util.find_spec(ENCODER_MODULE) is None:
            return ()
        encoders: Any = importlib.import_module(ENCODER_MODULE)
        folder = self.mesh.folder / EMBEDDING_MODEL
        folder.parent.mkdir(parents=True, exist_ok=True)
        encoders.write_random_encoder(folder, encoders.EncoderShape(context=128))
        return ("--model", f"{BUILT_IN}={MODEL}", "--model", f"{folder}={EMBEDDING_MODEL}")

    def close(self) -> None:
        for thread in self._reviving:
            thread.join()
        self.mesh.close()

    @property
    def entry(self) -> NodeProcess:
        return self.mesh.nodes[0]

    def create_key_by_cli(self, name: str) -> str:
        """As an operator does it; the key is alone on the last line."""
        command = [sys.executable, "-m", "nodes", "keys", "create", "--name", name]
        command += ["--url", self.entry.url, "--data-dir", str(self.entry.folder / "data")]
        made = subprocess.run(
            command, capture_output=True, text=True, timeout=CLI_TIMEOUT_S, check=False, env=os.environ
        )
        assert made.returncode == 0, made.stderr
        return made.stdout.splitlines()[-1]

    def admin_token(self) -> str:
        return (self.entry.folder / "data" / "admin-token").read_text().strip()

    # What tests may ask for.

    def create_key(self, settings: dict[str, Any]) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.admin_token()}", "content-type": "application/json"}
        request = urllib.request.Request(f"{self.entry.url}/admin/keys", json.dumps(settings).encode(), headers)
        with urllib.request.urlopen(request, timeout=CLI_TIMEOUT_S) as response:
            return {"key": json.load(response)["token"]}

    def kill_executor(self, _: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            found: list[NodeProcess] = []

            def look() -> bool:
                running = [node for node in self.mesh.nodes[1:] if node not in self._killed]
                found[:] = [n for n in running if n.metric("ai_cluster_engine_slots", state="active")]
                return bool(found)

            wait_for(look, "some node generates", EXECUTOR_TIMEOUT_S)
            found[0].kill()
            self._killed.append(found[0])
            return {"node": found[0].name, "url": f"{found[0].url}/v1"}

    def revive(self, _: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            killed, self._killed = self._killed, []
            for node in killed:
                thread = threading.Thread(target=node.start, args=(self.entry.mesh,))
                thread.start()
                self._reviving.append(thread)
        return {}

    def heal(self, _: dict[str, Any]) -> dict[str, Any]:
        self.revive({})
        for thread in self._reviving:
            thread.join()
        self._reviving = []
        self.mesh.wait_until_agreed()
        return {}


@contextmanager
def control(stage: Stage) -> Iterator[str]:
    """What tests may ask of the stage, at the URL given."""
    actions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "/keys": stage.create_key,
        "/kill-executor": stage.kill_executor,
        "/revive": stage.revive,
        "/heal": stage.heal,
    }

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            try:
                status, answer = 200, actions[self.path](json.loads(body or b"{}"))
            except Exception as exc:
                status, answer = 500, {"error": repr(exc)}  # the test that asked shows it
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name it has above)
            """Nothing: what matters is in the answers."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
