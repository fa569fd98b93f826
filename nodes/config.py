"""The configuration of one node: a TOML file, then AI_CLUSTER_* environment variables, then flags; each later one wins.

Each field below is a TOML key, an environment variable (AI_CLUSTER_ and the name in capitals) and, where
`ai-cluster serve --help` lists it, a flag. docs/configuration.md explains them all.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mesh.seal import DEVELOPMENT_KEY, parse_key
from mesh.view import Address
from nodes.gossip_settings import GossipSettings

ENV_PREFIX = "AI_CLUSTER_"
# Variables of this prefix that other commands read; a node does not refuse them.
ENV_OF_OTHERS = {"URL", "CA_FILE", "API_KEY"}
SECRET_KEYS = {"key", "admin_token", "tracing_headers"}  # never shown, and no flags: other users see command lines
ADMIN_TOKEN_CHARS_MIN = 16  # fewer could be guessed over HTTP
# What gossip tells of a node's models fits one section of a datagram.
MODELS_MAX = 6
MODEL_NAME_BYTES_MAX = 64
GOSSIP_PREFIX = "gossip_"  # AI_CLUSTER_GOSSIP_PROBE_INTERVAL_S is probe_interval_s of the table gossip
VALUE_CHARS_SHOWN = 100  # of a bad value in its error line
BUILTIN_MODEL = Path(__file__).parent / "models" / "demo"
BUILTIN_MODEL_NAME = "demo"
_HEADER = re.compile(r"([A-Za-z0-9!#$%&'*+.^_`|~-]{1,256})[ \t]*:[ \t]*([!-~](?:[ -~]*[!-~])?)")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]{1,253}")


# What a field of that type is in a file, and how one is written there.
_TOML_TYPES: dict[object, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false, without quotes"),
    int: ((int,), "a whole number, without quotes"),
    float: ((int, float), "a number, without quotes"),
}


class ConfigInvalid(Exception):
    """A configuration that no node can run with. The message is one line: what is wrong, where, and the fix."""


_HOST_NAME = re.compile(r"[^\s\x00-\x1f/:\[\]?#@]+")
ADDRESS_CHARS_SHOWN = 100


def parse_address(value: object, example: str = "127.0.0.1:8080") -> Address:
    """HOST:PORT, [IPV6]:PORT. Raises ValueError, which shows the example."""
    if isinstance(value, Address):
        return value
    text = str(value).strip()
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not _is_host(host) or not port.isdecimal() or int(port) > 65535:
        shown = text.rpartition("@")[2][:ADDRESS_CHARS_SHOWN]  # before it is a URL's password
        raise ValueError(f"{shown!r} is no HOST:PORT, such as {example}")
    return Address(host, int(port))


def _is_host(host: str) -> bool:
    try:
        if ":" in host:
            ipaddress.IPv6Address(host)
            return True
        host.encode("idna")  # as a lookup does
    except ValueError:
        return False
    return _HOST_NAME.fullmatch(host) is not None


def parse_mesh_address(value: object) -> Address:
    """As parse_address()."""
    return parse_address(value, "127.0.0.1:7946")


def _split(value: object) -> object:
    """Lists come as lists from TOML and flags, and comma-separated from the environment."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _check_endpoint(endpoint: str | None) -> str | None:
    """Raises ValueError."""
    if endpoint is None:
        return None
    try:
        parts = urlsplit(endpoint)
        _ = parts.port  # raises where it is none
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_url = False
    if not is_url or parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            "an endpoint is http://HOST:PORT or https://HOST:PORT, with a path or without; "
            "secrets go into tracing_headers_file"
        )
    return endpoint


def _check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError."""
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(f"{origin!r} is no origin: scheme://host[:port] in lower case, without a path, or *")
    return origins


HttpAddress = Annotated[Address, BeforeValidator(parse_address)]
MeshAddress = Annotated[Address, BeforeValidator(parse_mesh_address)]


class NodeConfig(BaseModel):
    """Everything a node can be told. Field descriptions are the help texts and the configuration page's source."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    http: HttpAddress = Field(
        Address("127.0.0.1", 8080), description="HOST:PORT where users, clients and Prometheus reach this node"
    )
    mesh: MeshAddress = Field(
        Address("127.0.0.1", 7946), description="HOST:PORT for other nodes: UDP gossip and TCP peer links"
    )
    join: Annotated[tuple[MeshAddress, ...], BeforeValidator(_split)] = Field(
        (), description="HOST:PORT of the mesh port of a running node; repeatable, any one that answers is enough"
    )
    model: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        (), description="FOLDER or FOLDER=NAME of a model to serve; repeatable; without it the built-in model"
    )
    limits_partition_hold_s: float = Field(
        600.0, ge=0, le=86_400, description="how long a node lost without leaving keeps its share of each key's limits"
    )
    no_model: bool = Field(False, description="serve no model: an entry that forwards every request")
    variant: str | None = Field(
        None, max_length=64, description="which graph of a folder with several, such as q4; default: what runs best"
    )
    slots: int | None = Field(
        None, ge=1, le=256, description="sequences decoded together, per model; default: 8, fewer if memory is short"
    )
    queue: int = Field(512, ge=0, le=100_000, description="requests that may wait for a slot on this node, per model")
    capacity: int | None = Field(
        None,
        ge=64,
        description="tokens a slot holds, prompt and answer together; default: the model's context, at most 8192, "
        "less if memory is short",
    )
    memory_limit_mib: int | None = Field(
        None, ge=1, description="memory for weights and KV of each model, MiB; default: what is available"
    )
    threads: int = Field(0, ge=0, le=1024, description="threads of ONNX Runtime; 0: all cores")
    provider: Literal["auto", "cpu", "cuda"] = Field("auto", description="where models run: auto, cpu or cuda")
    device: int = Field(0, ge=0, le=63, description="which CUDA device, counted from 0")
    spinning: bool = Field(True, description="let ONNX Runtime's threads spin while idle; off where nodes share cores")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$", description="node id; default: host name and mesh port"
    )
    advertise: MeshAddress | None = Field(
        None, description="HOST:PORT at which other nodes reach the mesh port, where it is not the bound one"
    )
    data_dir: Path = Field(Path("data"), description="folder of this node's own state; one per node")
    log_dir: Path = Field(Path("logs"), description="folder of combined.log and error.log")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level logged")
    log_console: Literal["auto", "plain", "json", "none"] = Field(
        "auto",
        description="log lines on stderr: plain for people, none, json for a collector (then no files are written); "
        "auto is plain on a terminal, else none",
    )
    stop_with_stdin: bool = Field(
        False, description="stop when standard input ends, so that a parent that dies leaves no node behind"
    )
    cluster_name: str = Field("ai-cluster", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="keeps two meshes apart")
    cluster_key_file: Path | None = Field(
        None, description="file with the cluster key, the same on every node; `ai-cluster keyring new` makes one"
    )
    key: str | None = Field(None, repr=False, description="the cluster key itself; prefer cluster_key_file")
    admin_token: str | None = Field(
        None,
        repr=False,
        min_length=ADMIN_TOKEN_CHARS_MIN,
        max_length=512,
        description="what opens /admin; default: <data_dir>/admin-token, made at the first start",
    )
    open: bool = Field(False, description="answer /v1/* to everyone, also on an HTTP address off loopback")
    deadline_s: float = Field(600.0, gt=0, le=86_400, description="longest time a request may take, seconds")
    hedge: bool = Field(
        False,
        description="open a request whose first token is later than 99 of 100 of its model on a second node as well; "
        "the first to answer is kept",
    )
    drain_s: float = Field(30.0, ge=0, le=3_600, description="how long running streams may finish at shutdown, seconds")
    drain_notice_s: float = Field(
        1.0,
        ge=0,
        le=60,
        description="how long a node that stops takes new connections and tells its clients to go elsewhere, seconds",
    )
    nodes_expected: int | None = Field(
        None, ge=1, description="nodes this cluster should have, for alerts; default: members known and not left"
    )
    body_bytes_max: int = Field(
        4 * 1024 * 1024, ge=1024, le=6 * 1024 * 1024, description="largest HTTP request body accepted, bytes"
    )

    http_connections_max: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="HTTP connections open at once; default: 3/4 of the file descriptors allowed, at most 10000",
    )

    tls_cert_file: Path | None = Field(
        None, description="PEM file of the HTTP server's certificate and its chain: HTTPS; read again when it changes"
    )
    tls_key_file: Path | None = Field(None, description="PEM file of that certificate's key, without a password")
    tls_min: Literal["1.2", "1.3"] = Field("1.2", description="oldest version of TLS that is spoken: 1.2 or 1.3")
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_split), AfterValidator(_check_origins)] = Field(
        (),
        max_length=100,
        description="origins such as https://app.example whose web pages may call /v1/*, or * for all; default: none",
    )

    tracing_endpoint: Annotated[str | None, AfterValidator(_check_endpoint)] = Field(
        None,
        max_length=2048,
        description="URL of an OTLP/HTTP collector that spans of requests are sent to, such as http://127.0.0.1:4318; "
        "without a path, v1/traces is added; default: no tracing",
    )
    tracing_sample_ratio: float = Field(
        1.0, ge=0, le=1, description="share of the requests that come without a traceparent which are traced, 0 to 1"
    )
    tracing_headers_file: Path | None = Field(
        None, description="file with the headers that the collector asks for, a NAME: VALUE in each line"
    )
    tracing_headers: str | None = Field(
        None, repr=False, max_length=65_536, description="the same lines themselves; prefer tracing_headers_file"
    )
    tracing_service_name: str = Field(
        "ai-cluster",
        min_length=1,
        max_length=128,
        description="name of the service under which the collector files the spans",
    )

    gossip: GossipSettings = Field(
        default_factory=lambda: GossipSettings(), description="table of times and numbers of the gossip protocol"
    )

    def node_id(self) -> str:
        return self.name or f"{socket.gethostname()[:50]}:{self.mesh.port}"

    def cluster_key(self) -> bytes:
        """The 32-byte cluster key; the public development key where none is configured and the mesh is on loopback."""
        configured = self.configured_key()
        if configured is not None:
            return configured
        if is_loopback(self.mesh.host):
            return DEVELOPMENT_KEY
        raise ConfigInvalid(
            f"mesh address {self.mesh} is off loopback and needs a cluster key; make one with "
            "`ai-cluster keyring new > cluster.key` and pass --cluster-key-file cluster.key on every node"
        )

    def configured_key(self) -> bytes | None:
        """The 32-byte key that a file or variable gives, or None."""
        if self.cluster_key_file is not None:
            try:
                text = self.cluster_key_file.read_text()
            except (OSError, UnicodeDecodeError) as exc:
                fix = "give the one that `ai-cluster keyring new` made for this mesh"
                if isinstance(exc, FileNotFoundError):
                    fix = "make one with: ai-cluster keyring new > cluster.key"
                raise ConfigInvalid(f"cluster_key_file {self.cluster_key_file}: {_unread(exc, fix)}") from exc
            source = f"cluster_key_file {self.cluster_key_file}"
        elif self.key is not None:
            text, source = self.key, "AI_CLUSTER_KEY"
        else:
            return None
        try:
            return parse_key(text)
        except ValueError as exc:
            raise ConfigInvalid(f"{source}: {exc}") from exc

    def collector_headers(self) -> dict[str, str]:
        """What the collector is sent with spans. Raises ConfigInvalid, which quotes no value."""
        if self.tracing_headers_file is not None:
            source = f"tracing_headers_file {self.tracing_headers_file}"
            try:
                text = self.tracing_headers_file.read_text()
            except (OSError, UnicodeDecodeError) as exc:
                raise ConfigInvalid(f"{source}: {_unread(exc, 'write a NAME: VALUE into each line of it')}") from exc
        else:
            text, source = self.tracing_headers or "", "tracing_headers"
        headers = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            found = _HEADER.fullmatch(line.strip())
            if found is None:
                raise ConfigInvalid(
                    f"{source}, line {number}: no header; write NAME: VALUE, such as authorization: ..."
                )
            headers[found[1].lower()] = found[2]
        return headers

    def models(self) -> list[tuple[str, Path]]:
        """(name, folder) of each model to serve. Raises ConfigInvalid for a name given twice."""
        if self.no_model:
            if self.model:
                raise ConfigInvalid("no_model and model contradict each other; give one of them")
            return []
        if not self.model:
            return [(BUILTIN_MODEL_NAME, BUILTIN_MODEL)]
        if len(self.model) > MODELS_MAX:
            raise ConfigInvalid(f"model is given {len(self.model)} times; a node serves at most {MODELS_MAX} models")
        found: dict[str, Path] = {}
        for entry in self.model:
            folder, _, name = entry.partition("=")
            path = Path(folder).expanduser()
            name = name or path.resolve().name
            if len(name.encode()) > MODEL_NAME_BYTES_MAX:
                raise ConfigInvalid(
                    f"model name {name[:80]!r} exceeds {MODEL_NAME_BYTES_MAX} bytes; use --model FOLDER=NAME"
                )
            if name in found:
                raise ConfigInvalid(f"model name {name!r} is given twice; name one with --model FOLDER=NAME")
            found[name] = path
        return list(found.items())


def is_loopback(host: str) -> bool:
    """True for localhost and loopback addresses. Other names are not resolved: a name may point anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_config(file: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any]) -> NodeConfig:
    """Merge the three sources. flags: only those given. Raises ConfigInvalid with one line per fault's first."""
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, entries in (
        (f"in {file}", _read_toml(file) if file else {}),
        ("in the environment", _read_environment(environment)),
        ("on the command line", flags),
    ):
        for key, value in entries.items():
            if key.startswith(GOSSIP_PREFIX):  # of the environment, which has no tables
                values["gossip"] = {**values.get("gossip", {}), key.removeprefix(GOSSIP_PREFIX): value}
                origin["gossip"] = source
                continue
            if key not in NodeConfig.model_fields:
                raise ConfigInvalid(_unknown_key(key, source))
            values[key], origin[key] = value, source
    try:
        return NodeConfig(**values)
    except ValidationError as exc:
        fault = exc.errors()[0]
        key = str(fault["loc"][0])
        reason = str(fault.get("ctx", {}).get("error", "")) or _lower_first(fault["msg"])
        value, source = values.get(key), origin.get(key, "")
        if key == "gossip":
            if len(fault["loc"]) == 1:  # no table, or two of its keys contradict each other
                reason = reason if isinstance(value, dict) else f"{value!r} is no table; write [gossip] and keys below"
                raise ConfigInvalid(f"gossip {source}: {reason}") from exc
            inner = str(fault["loc"][1])
            if fault["type"] == "extra_forbidden":
                raise ConfigInvalid(_unknown_key(inner, f"in [gossip] {source}", GossipSettings)) from exc
            key, value = f"gossip.{inner}", value.get(inner) if isinstance(value, dict) else value
        shown = "" if key in SECRET_KEYS else f" = {repr(value)[:VALUE_CHARS_SHOWN]}"
        raise ConfigInvalid(f"{key}{shown} {source}: {reason}") from exc


def _unread(fault: OSError | UnicodeDecodeError, fix: str) -> str:
    """Why a file could not be read, and the fix; another one where it may not be."""
    if isinstance(fault, PermissionError):
        fix = "let the user that the node runs as read it"
    return f"{fault.strerror if isinstance(fault, OSError) else 'it is not text'}; {fix}"


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text())
    except OSError as exc:
        raise ConfigInvalid(f"configuration file {file}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigInvalid(f"configuration file {file} is no TOML: {exc}") from exc
    _check_types(values, NodeConfig, file)
    if isinstance(values.get("gossip"), dict):
        _check_types(values["gossip"], GossipSettings, file, "gossip.")
    return values


def _check_types(values: dict[str, Any], of: type[BaseModel], file: Path, prefix: str = "") -> None:
    """TOML has numbers, truth values and texts, so one is not taken for another, as it is of the environment, which has
    texts alone. Raises ConfigInvalid."""
    for key, value in values.items():
        annotation = of.model_fields[key].annotation if key in of.model_fields else None
        for kind in get_args(annotation) or (annotation,):
            if kind in _TOML_TYPES and type(value) not in _TOML_TYPES[kind][0]:
                shown = str(value).lower() if isinstance(value, bool) else repr(value)[:VALUE_CHARS_SHOWN]
                raise ConfigInvalid(f"{prefix}{key} = {shown} in {file}: write {_TOML_TYPES[kind][1]}")


def _read_environment(environment: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for variable, value in environment.items():
        name = variable.removeprefix(ENV_PREFIX)
        if name != variable and name not in ENV_OF_OTHERS:
            found[name.lower()] = value
    return found


def _unknown_key(key: str, source: str, of: type[BaseModel] | None = None) -> str:
    close = difflib.get_close_matches(key, (of or NodeConfig).model_fields, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; docs/configuration.md lists the keys"
    shown = ENV_PREFIX + key.upper() if source == "in the environment" else key
    return f"unknown configuration key {shown} {source}{hint}"


def _lower_first(message: str) -> str:
    return message[:1].lower() + message[1:]
