"""A model hub on loopback that speaks what huggingface-hub asks of one: listing, resolving, redirects, ranges.

Large files are stored apart, as Git LFS stores them: `resolve` redirects to another path, where ranges are served.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_BYTES_MIN = 2_000


@dataclass
class FakeRepository:
    """One repository. files: content by path, of each commit. token: who may read it, None everybody.

    cut: by path, how many bytes of one answer are sent before the connection breaks; one answer per entry."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    token: str | None = None
    is_gated: bool = False
    cut: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class FakeHub:
    """repositories: by owner/name. requests: method, path and range of all that came. broken: status for everything."""

    repositories: dict[str, FakeRepository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    broken: int | None = None
    url: str = ""

    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path, _ in self.requests if "/resolve/" in path and method == "GET"]


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(HubHandler):
        fake = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.fake.requests.append((self.command, path, self.headers.get("range")))
        if self.fake.broken is not None:
            self._refuse(self.fake.broken)
        elif path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self._list(repo, revision or "main")
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            commit, _, name = rest.partition("/")
            self._resolve(repo, commit, name)
        elif path.startswith("/storage/"):
            _, _, owner, repo, commit, name = path.split("/", 5)
            self._send_file(self.fake.repositories[f"{owner}/{repo}"], commit, name)
        else:
            self._refuse(404)

    do_HEAD = do_GET  # noqa: N815

    def _repository(self, repo: str) -> FakeRepository | None:
        """None after a refusal was sent."""
        found = self.fake.repositories.get(repo)
        allowed = found is not None and found.token in (None, (self.headers.get("authorization") or "")[7:])
        if found is None or not allowed:
            self._refuse(401, "RepoNotFound")
            return None
        return found

    def _list(self, repo: str, revision: str) -> None:
        found = self._repository(repo)
        if found is None:
            return
        commit = found.branches.get(revision, revision)
        if commit not in found.commits:
            self._refuse(404, "RevisionNotFound")
            return
        siblings: list[dict[str, Any]] = []
        for name, content in found.commits[commit].items():
            sibling = {"rfilename": name, "size": len(content), "blobId": git_digest(content)}
            if len(content) >= LFS_BYTES_MIN:
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        body = {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        self._send(json.dumps(body).encode(), {"content-type": "application/json"})

    def _resolve(self, repo: str, commit: str, name: str) -> None:
        found = self._repository(repo)
        if found is None:
            return
        if found.is_gated:
            self._refuse(403, "GatedRepo")
            return
        content = found.commits[commit].get(name)
        if content is None:
            self._refuse(404, "EntryNotFound")
        elif len(content) >= LFS_BYTES_MIN:
            headers = {
                "location": f"/storage/{repo}/{commit}/{name}",
                "x-repo-commit": commit,
                "x-linked-size": str(len(content)),
                "x-linked-etag": f'"{hashlib.sha256(content).hexdigest()}"',
            }
            self._send(b"", headers, status=302)
        else:
            self._send_file(found, commit, name)

    def _send_file(self, found: FakeRepository, commit: str, name: str) -> None:
        content = found.commits[commit][name]
        headers = {"x-repo-commit": commit, "etag": f'"{git_digest(content)}"', "accept-ranges": "bytes"}
        status, begin = 200, 0
        if asked := self.headers.get("range"):
            begin = int(asked.removeprefix("bytes=").split("-")[0])
            headers["content-range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            status = 206
        cuts = found.cut.get(name)
        self._send(content[begin:], headers, status=status, cut=cuts.pop(0) if cuts else None)

    def _refuse(self, status: int, code: str = "") -> None:
        self._send(b"{}", {"x-error-code": code} if code else {}, status=status)

    def _send(self, body: bytes, headers: dict[str, str], status: int = 200, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Quiet."""
