"""Where the command line reaches a node, and what is said where nobody answers there as expected."""

from __future__ import annotations

import http.client
import socket
import ssl
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from nodes.config import is_loopback

# The base of the OpenAI API, as clients are given it; commands name paths of their own.
API_BASE = "/v1"
PROBE_TIMEOUT_S = 2.0
CA_FIX = "with --ca-file or AI_CLUSTER_CA_FILE"
# Of OpenSSL's verification (x509_vfy.h).
_NOT_YET_VALID, _EXPIRED, _OTHER_HOST, _OTHER_ADDRESS = 9, 10, 62, 64


class NodeAnswered(Exception):
    """The node refused, or could not be reached. The message is one line for the terminal."""

    exit_code = 1  # of the command that asked


class NodeUnreachable(NodeAnswered):
    """Nobody answers there as a node does."""


class NodeNotAsked(NodeAnswered):
    """What was given to reach one is wrong."""

    exit_code = 2


@dataclass(frozen=True)
class NodeAddress:
    """url: scheme, host and port, without /v1. ca_file: PEM certificates of those whose signature is trusted, instead
    of those that the system trusts."""

    url: str
    ca_file: Path | None = None

    @cached_property
    def tls(self) -> ssl.SSLContext | None:
        """None for plain HTTP. Raises NodeNotAsked for a file that holds no certificates."""
        if not self.url.startswith("https://"):
            return None
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as exc:  # an SSLError is one
            reason = "it holds no PEM certificates" if isinstance(exc, ssl.SSLError) else exc.strerror
            raise NodeNotAsked(
                f"the file of trusted certificates {self.ca_file}: {reason}; give a PEM file {CA_FIX}"
            ) from exc

    @property
    def is_loopback(self) -> bool:
        return is_loopback(urlsplit(self.url).hostname or "")

    def __str__(self) -> str:
        return self.url


def parse_url(text: str, ca_file: Path | None = None) -> NodeAddress:
    """As people write it: with or without a slash or /v1 at its end. Raises NodeNotAsked for what is no URL, and for a
    file that holds no certificates."""
    url = text.strip().rstrip("/").removesuffix(API_BASE).rstrip("/")
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        is_url = False
    if not is_url or not url.isascii() or not url.isprintable() or " " in url:
        raise NodeNotAsked(f"{text!r} is no URL; try --url http://127.0.0.1:8080")
    node = NodeAddress(url, ca_file)
    _ = node.tls
    return node


def describe_fault(node: NodeAddress, url: str, fault: Exception) -> str:
    """What is wrong where a request to `url` had no answer, and the fix."""
    if isinstance(fault, ssl.SSLCertVerificationError):
        return f"{node.url} shows a certificate that is not valid here: {_describe_certificate(fault)}"
    is_unlike = isinstance(fault, http.client.HTTPException | ConnectionError | ssl.SSLError)
    if is_unlike and not isinstance(fault, ConnectionRefusedError):
        if node.tls is None and _speaks_tls(node.url):
            return f"{node.url} speaks HTTPS, not plain HTTP; try --url https{node.url.removeprefix('http')}"
        if node.tls is not None and _speaks_http(node.url):
            return f"{node.url} speaks plain HTTP, not HTTPS; try --url http{node.url.removeprefix('https')}"
    if isinstance(fault, ssl.SSLError):
        return f"no TLS with {node.url}: {fault.reason or fault}; is it an AI Cluster node?"
    if isinstance(fault, http.client.HTTPException) and not isinstance(fault, ConnectionError):
        return f"{url} answered something that is no HTTP; is it an AI Cluster node?"
    return f"no node answers at {url}: {fault}; is one running? (ai-cluster up)"


def _describe_certificate(fault: ssl.SSLCertVerificationError) -> str:
    said = fault.verify_message
    if fault.verify_code in (_EXPIRED, _NOT_YET_VALID):
        return f"{said}; renew it at the node, or set this machine's clock"
    if fault.verify_code in (_OTHER_HOST, _OTHER_ADDRESS):
        return f"{said}; give the name that is in the certificate with --url"
    return f"it is not trusted ({said}); give the certificate of who signed it, or itself if nobody did, {CA_FIX}"


def _speaks_tls(url: str) -> bool:
    """Whether a handshake begins. Nothing is sent within it, so nobody has to be trusted."""
    parts = urlsplit(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80), PROBE_TIMEOUT_S) as plain:
            context.wrap_socket(plain).close()
    except (OSError, ValueError):
        return False
    return True


def _speaks_http(url: str) -> bool:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 443, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", "/health/live")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True
