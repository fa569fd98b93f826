"""The `ai-cluster` command: starts nodes, and talks to running ones over HTTP."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from nodes import cli_keys, cli_mesh
from nodes.cli_models import models_app
from nodes.cli_options import DEFAULT_URL, ApiKey, CaFile, Url
from nodes.config import SECRET_KEYS, ConfigInvalid, load_config

EXIT_OUTPUT = 1  # what was asked may have been done
EXIT_USAGE = 2  # a fault of configuration or environment that starting again does not mend

app = typer.Typer(
    name="ai-cluster",
    help="A masterless mesh of nodes that serve language models behind one OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="The configuration of a node.", no_args_is_help=True)
app.add_typer(cli_mesh.keyring_app, name="keyring")
app.add_typer(config_app, name="config")
app.add_typer(models_app, name="models")
cli_mesh.register(app)
cli_keys.register(app)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with the same keys (dashes become underscores)", metavar="FILE"),
]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"ai-cluster {version('ai-cluster')}")
        raise typer.Exit


@app.callback()
def ai_cluster(
    _: Annotated[
        bool, typer.Option("--version", help="print the version, and end", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Every option is also a TOML key (--config) and an environment variable AI_CLUSTER_NAME; flags win over "
    "environment, environment over file. Example of a second node: "
    "ai-cluster serve --http 127.0.0.1:8081 --mesh 127.0.0.1:7947 --join 127.0.0.1:7946 --data-dir data/two"
)
def serve(
    http: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="for users [127.0.0.1:8080]")] = None,
    mesh: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="for other nodes [127.0.0.1:7946]")] = None,
    join: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="mesh address of a running node; repeatable")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER[=NAME]", help="model to serve; repeatable [the built-in model]"),
    ] = None,
    no_model: Annotated[bool | None, typer.Option("--no-model", help="serve no model: an entry that forwards")] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="which graph of a folder with several: q4, fp16 ... [best]")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(metavar="N", help="sequences decoded together, per model [8, or what fits]")
    ] = None,
    queue: Annotated[int | None, typer.Option(metavar="N", help="requests that may wait, per model [512]")] = None,
    capacity: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="prompt and answer of one slot [model's context, <= 8192]")
    ] = None,
    memory_limit_mib: Annotated[
        int | None, typer.Option(metavar="MIB", help="memory for weights and KV of each model [what is available]")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="ONNX Runtime threads [0: all cores]")] = None,
    spinning: Annotated[
        bool | None, typer.Option("--spinning/--no-spinning", help="let idle threads spin [--spinning]")
    ] = None,
    provider: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="where models run [auto]")] = None,
    device: Annotated[int | None, typer.Option(metavar="N", help="which CUDA device [0]")] = None,
    name: Annotated[str | None, typer.Option(metavar="ID", help="node id, unique [host name and mesh port]")] = None,
    advertise: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="mesh address others use [the bound one]")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="this node's own state [./data]")] = None,
    log_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="combined.log, error.log [./logs]")] = None,
    log_level: Annotated[str | None, typer.Option(metavar="LEVEL", help="debug, info, warning, error [info]")] = None,
    log_console: Annotated[
        str | None, typer.Option(metavar="KIND", help="log on stderr: auto, plain, json, none [auto]")
    ] = None,
    cluster_name: Annotated[str | None, typer.Option(metavar="NAME", help="keeps meshes apart [ai-cluster]")] = None,
    cluster_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="cluster key, needed off loopback (see: keyring new)")
    ] = None,
    open_: Annotated[
        bool | None, typer.Option("--open", help="serve /v1 to everyone, also off loopback; put a proxy before it")
    ] = None,
    deadline_s: Annotated[float | None, typer.Option(metavar="S", help="longest time of a request [600]")] = None,
    limits_partition_hold_s: Annotated[
        float | None,
        typer.Option("--limits-partition-hold-s", help="how long a lost node keeps its share of the keys' limits"),
    ] = None,
    hedge: Annotated[bool | None, typer.Option("--hedge", help="open late requests on a second node as well")] = None,
    drain_s: Annotated[float | None, typer.Option(metavar="S", help="time for streams to finish at stop [30]")] = None,
    drain_notice_s: Annotated[
        float | None, typer.Option(metavar="S", help="of which clients are told to go elsewhere [1]")
    ] = None,
    nodes_expected: Annotated[int | None, typer.Option(metavar="N", help="nodes there should be, for alerts")] = None,
    body_bytes_max: Annotated[int | None, typer.Option(metavar="BYTES", help="largest request [4194304]")] = None,
    http_connections_max: Annotated[
        int | None, typer.Option(metavar="N", help="connections at once [3/4 of ulimit -n, <= 10000]")
    ] = None,
    tls_cert_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM certificate and chain: HTTPS, read again when it changes")
    ] = None,
    tls_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM key of the certificate")] = None,
    tls_min: Annotated[str | None, typer.Option(metavar="1.2|1.3", help="oldest version of TLS [1.2]")] = None,
    cors_origins: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="whose web pages may call /v1; repeatable [none]"),
    ] = None,
    tracing_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="OTLP/HTTP collector of request spans [no tracing]")
    ] = None,
    tracing_sample_ratio: Annotated[
        float | None, typer.Option(metavar="SHARE", help="of requests without a traceparent, traced [1]")
    ] = None,
    tracing_headers_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="headers for the collector, NAME: VALUE lines")
    ] = None,
    tracing_service_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="of the service in traces [ai-cluster]")
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Run one node until SIGTERM or Ctrl-C, which let running streams finish first."""
    given = dict(locals())
    given.pop("config")
    given["open"] = given.pop("open_")
    flags = {key: value for key, value in given.items() if value is not None and value != []}
    raise typer.Exit(_run_node(config, flags))


def _run_node(config_file: Path | None, flags: dict[str, Any]) -> int:
    from nodes.process import run_node  # imports the runtime, which the other commands do without

    try:
        run_node(load_config(config_file, os.environ, flags))
    except ConfigInvalid as exc:
        print(f"ai-cluster: {exc}", file=sys.stderr)
        return EXIT_USAGE
    return 0


@app.command()
def up(
    nodes: Annotated[int, typer.Option("--nodes", "-n", min=1, max=64, help="how many nodes")] = 3,
    http_port: Annotated[
        int, typer.Option(min=1, max=65000, help="HTTP port of the first; the next take the next")
    ] = 8080,
    mesh_port: Annotated[int, typer.Option(min=1, max=65000, help="mesh port of the first")] = 7946,
    model: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER[=NAME]", help="model to serve; repeatable [the built-in model]")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(metavar="N", help="sequences decoded together, per model [8, or what fits]")
    ] = None,
    data_dir: Annotated[Path, typer.Option(metavar="DIR", help="each node gets DIR/<name>")] = Path("data"),
    log_dir: Annotated[Path, typer.Option(metavar="DIR", help="all nodes' lines, merged")] = Path("logs"),
    config: ConfigFile = None,
) -> None:
    """Run a local mesh of several nodes until Ctrl-C: node-1 on 8080, node-2 on 8081, and so on."""
    from nodes.local_mesh import LocalMesh, run_local_mesh

    mesh = LocalMesh(
        nodes=nodes,
        http_port=http_port,
        mesh_port=mesh_port,
        models=tuple(model or ()),
        slots=slots,
        data_dir=data_dir,
        log_dir=log_dir,
        config=config,
    )
    try:
        raise typer.Exit(run_local_mesh(mesh))
    except ConfigInvalid as exc:
        print(f"ai-cluster: {exc}", file=sys.stderr)
        raise typer.Exit(EXIT_USAGE) from exc


@app.command()
def status(
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="follow it until Ctrl-C, as top does")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the node's answer as it is")] = False,
) -> None:
    """Show every node of the mesh as one of them sees it."""
    from nodes.watching import show_status

    raise typer.Exit(show_status(url, ca_file, watch=watch, as_json=as_json))


@app.command()
def top(
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    once: Annotated[bool, typer.Option("--once", help="print it once, and end")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="a line of JSON for each status and event")] = False,
) -> None:
    """Follow the mesh: load, speed and queue of each node, and what happens, until Ctrl-C."""
    from nodes.watching import follow_mesh

    raise typer.Exit(follow_mesh(url, ca_file, as_json=as_json, once=once))


@app.command()
def chat(
    question: Annotated[
        list[str] | None, typer.Argument(help="the question; without it, one is read from stdin")
    ] = None,
    url: Url = DEFAULT_URL,
    ca_file: CaFile = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="model name [the first one served]")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the likeliest token")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="longest answer")] = None,
    api_key: ApiKey = None,
) -> None:
    """Ask a model, and print the answer while it is made."""
    from nodes.client import stream_chat

    try:
        text = " ".join(question) if question else sys.stdin.read().strip()
        text.encode()  # bytes of an argument that are no text have become surrogates
    except UnicodeError as exc:
        print("ai-cluster: the question is no UTF-8 text; convert it, as with: iconv -t utf-8", file=sys.stderr)
        raise typer.Exit(EXIT_USAGE) from exc
    if not text:
        print('ai-cluster: no question; try: ai-cluster chat "How do I add a node?"', file=sys.stderr)
        raise typer.Exit(EXIT_USAGE)
    raise typer.Exit(
        stream_chat(url, ca_file, text, model=model, temperature=temperature, max_tokens=max_tokens, api_key=api_key)
    )


@config_app.command("check")
def config_check(config: Annotated[Path | None, typer.Argument(help="TOML file", metavar="[FILE]")] = None) -> None:
    """Check a configuration file together with the environment and the files that both name, as serve does at its
    start, and print what a node would use. Starts and changes nothing; a node that runs may have them in use."""
    from nodes.config_check import check_start  # imports the engine and the server, which the other commands do without

    try:
        checked = load_config(config, os.environ, {})
        check_start(checked)
    except ConfigInvalid as exc:
        print(f"ai-cluster: {exc}", file=sys.stderr)
        raise typer.Exit(EXIT_USAGE) from exc
    for key in sorted(type(checked).model_fields):
        value = getattr(checked, key)
        if value is not None and key not in SECRET_KEYS and not isinstance(value, BaseModel):
            print(f"{key} = {_toml(value)}")
    print("\n[gossip]")
    for key, value in checked.gossip.model_dump().items():
        print(f"{key} = {_toml(value)}")


def _toml(value: object) -> str:
    """A configuration value as TOML; strings and lists are written as in JSON."""
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(part) for part in value) + "]"
    return json.dumps(value if isinstance(value, bool | int | float) else str(value))


def _leave_native_threads(code: int | str | None) -> None:
    """End this process now if it has run models. A thread may still load one, as when a node is stopped at its start:
    the interpreter's end would run ONNX Runtime's destructors under it, which aborts the process (SIGABRT)."""
    if "onnxruntime" in sys.modules and (code is None or isinstance(code, int)):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code or 0)


def main() -> None:
    """The script's entry point. Output that cannot be written is one line and exit code 1; a reader that has gone, as
    of `| head`, is no line at all."""
    try:
        try:
            app()
        except SystemExit as exc:
            _leave_native_threads(exc.code)
            raise
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, and not by the interpreter's exit, which would print a traceback
    except OSError as exc:
        if not _is_output_broken():
            raise
        with suppress(OSError):
            if not isinstance(exc, BrokenPipeError):
                print(f"ai-cluster: the output cannot be written: {exc.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in its buffer
        sys.exit(EXIT_OUTPUT)


def _is_output_broken() -> bool:
    """Tells a fault of writing the output from others: what could not be written is still there, and fails again. An
    output without a buffer has kept nothing, and is tried with an empty line."""
    try:
        sys.stdout.flush()
        if getattr(sys.stdout, "write_through", False):
            print(flush=True)
    except OSError:
        return True
    return False


if __name__ == "__main__":
    main()
