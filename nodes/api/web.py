"""The status page at /, and the files it is made of: read once, served from memory, nothing from another host."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from quart import Quart, Response, request
from werkzeug.exceptions import NotFound

FOLDER = Path(__file__).parents[1] / "web"
PAGE = "index.html"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # No inline script or style, no other host, no frame; and no text of a model or a node can become markup.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # so that a page and its files are of one version
}


@dataclass(frozen=True, slots=True)
class WebFile:
    content: bytes
    content_type: str
    etag: str


def read_files(folder: Path = FOLDER) -> dict[str, WebFile]:
    """By name; files of other kinds are left out."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in CONTENT_TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            files[path.name] = WebFile(content, CONTENT_TYPES[path.suffix], etag)
    return files


def register(app: Quart) -> None:
    files = read_files()

    @app.get("/")
    async def status_page() -> Response:
        return _answer(files[PAGE])

    @app.get("/web/<name>")
    async def web_file(name: str) -> Response:
        if name not in files:
            raise NotFound
        return _answer(files[name])


def _answer(file: WebFile) -> Response:
    headers = HEADERS | {"etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(b"", 304, headers)
    return Response(file.content, 200, headers, content_type=file.content_type)
