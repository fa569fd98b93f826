"""How the command line reaches a node: what it takes for a URL, whom it trusts, what it says where nobody answers."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from nodes import cli
from nodes.client import get_json
from nodes.node_address import NodeAnswered, parse_url
from tests.unit.certificates import write_certificate


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "demo"}] if self.path == "/v1/models" else []}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that does not like the certificate


@contextmanager
def serving(files: tuple[Path, Path] | None = None) -> Iterator[int]:
    """The port; files: certificate and key, for HTTPS."""
    with Server(("127.0.0.1", 0), Handler) as server:
        if files is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*files)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def list_models(url: str, *options: str, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli.app, ["models", "list", "--url", url, *options], env=environment)


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
        ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080"),
        (" https://node.example/v1/ ", "https://node.example"),
        ("https://gate.example/cluster/v1", "https://gate.example/cluster"),
    ],
)
def test_a_url_may_end_as_the_base_of_the_api_does(written: str, url: str) -> None:
    assert parse_url(written).url == url


@pytest.mark.parametrize("written", ["", "localhost:8080", "ftp://a", "http://", "http://a:port", "http://a b"])
def test_what_is_no_url_is_refused(written: str) -> None:
    with pytest.raises(NodeAnswered, match="is no URL"):
        parse_url(written)


@pytest.mark.parametrize(
    "command", [["models", "list"], ["status"], ["top"], ["chat", "hi"], ["members"], ["keys", "list"]]
)
def test_a_command_that_is_given_no_url_asks_nothing_and_says_so_by_its_exit_code(command: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*command, "--url", "localhost:8080"])
    assert (result.exit_code, result.stderr) == (
        2,
        "ai-cluster: 'localhost:8080' is no URL; try --url http://127.0.0.1:8080\n",
    )


def test_a_command_takes_the_base_url_of_the_api() -> None:
    with serving() as port:
        result = list_models(f"http://127.0.0.1:{port}/v1")
    assert (result.exit_code, result.stdout) == (0, "demo\n")


def test_a_certificate_that_is_not_trusted_is_named_with_the_fix_and_taken_with_the_file(tmp_path: Path) -> None:
    files = write_certificate(tmp_path)
    with serving(files) as port:
        url = f"https://127.0.0.1:{port}"
        refused = list_models(url)
        taken = list_models(url, "--ca-file", str(files[0]))
        by_variable = list_models(url, environment={"AI_CLUSTER_CA_FILE": str(files[0])})
    assert refused.exit_code == 1
    assert "no node answers" not in refused.stderr
    assert "not trusted" in refused.stderr
    assert "--ca-file or AI_CLUSTER_CA_FILE" in refused.stderr
    assert (taken.exit_code, taken.stdout) == (0, "demo\n")
    assert (by_variable.exit_code, by_variable.stdout) == (0, "demo\n")


def test_a_certificate_of_another_name_or_time_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    files, old_files = write_certificate(tmp_path), write_certificate(tmp_path / "old", days=0)
    with serving(files) as port:
        result = list_models(f"https://localhost:{port}", "--ca-file", str(files[0]))
    assert "Hostname mismatch" in result.stderr
    assert "the name that is in the certificate" in result.stderr
    with serving(old_files) as port:
        result = list_models(f"https://127.0.0.1:{port}", "--ca-file", str(old_files[0]))
    assert "expired" in result.stderr
    assert "renew it" in result.stderr


def test_a_file_of_trusted_certificates_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "none.pem").write_text("nothing")
    for name, reason in (("none.pem", "no PEM certificates"), ("absent.pem", "No such file")):
        result = list_models("https://127.0.0.1:1", "--ca-file", str(tmp_path / name))
        assert result.exit_code == 2
        assert f"{name}: " in result.stderr
        assert reason in result.stderr


def test_the_wrong_scheme_is_named_either_way(tmp_path: Path) -> None:
    with serving(write_certificate(tmp_path)) as port:
        plain_to_tls = list_models(f"http://127.0.0.1:{port}")
    assert f"speaks HTTPS, not plain HTTP; try --url https://127.0.0.1:{port}" in plain_to_tls.stderr
    with serving() as port:
        tls_to_plain = list_models(f"https://127.0.0.1:{port}")
    assert f"speaks plain HTTP, not HTTPS; try --url http://127.0.0.1:{port}" in tls_to_plain.stderr
    assert (plain_to_tls.exit_code, tls_to_plain.exit_code) == (1, 1)


def test_what_speaks_no_http_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_once() -> None:
            for _ in range(2):  # the request, and the look whether it speaks TLS
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer_once)
        thread.start()
        result = list_models(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert result.exit_code == 1
    assert result.stderr.endswith("answered something that is no HTTP; is it an AI Cluster node?\n")


def test_operators_are_told_that_no_node_answers_before_that_a_token_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AI_CLUSTER_ADMIN_TOKEN", raising=False)
    for command in (["members"], ["keys", "list"]):
        options = ["--url", "http://127.0.0.1:1", "--data-dir", str(tmp_path)]
        result = CliRunner().invoke(cli.app, [*command, *options])
        assert result.exit_code == 1
        assert "no node answers at http://127.0.0.1:1" in result.stderr
        with serving() as port:
            result = CliRunner().invoke(cli.app, [*command, *options[2:], "--url", f"http://127.0.0.1:{port}"])
        assert result.exit_code == 2
        assert "no admin token" in result.stderr


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8080", True),
        ("http://[::1]:8080", True),
        ("https://localhost:8080", True),
        ("http://10.0.0.1:8080", False),
        ("http://localhost.example:8080", False),
    ],
)
def test_whether_a_node_is_on_this_machines_loopback(url: str, expected: bool) -> None:
    assert parse_url(url).is_loopback is expected


def test_a_node_on_loopback_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"answer": 42}')

        def log_message(self, *_: object) -> None:
            """No line a request."""

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert get_json(parse_url(f"http://127.0.0.1:{server.server_port}"), "/") == {"answer": 42}
        thread.join()
