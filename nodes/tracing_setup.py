"""From a node's configuration to its Tracer. Imports OpenTelemetry only where tracing is switched on."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import version
from urllib.parse import urlsplit

from nodes.config import ConfigInvalid, NodeConfig
from observability.tracing import NO_TRACING, Tracer

logger = logging.getLogger(__name__)

TRACES_PATH = "/v1/traces"  # of OTLP/HTTP, below a collector's base


def enter_tracing(stack: ExitStack, config: NodeConfig) -> Tracer:
    """The tracer, whose last spans are sent as the stack unwinds, for a few seconds at most.

    Raises ConfigInvalid where tracing is configured and cannot be had."""
    check_tracing(config)
    if config.tracing_endpoint is None:
        return NO_TRACING
    from observability.span_export import open_pipeline, pipeline_tracer

    _warn_of_exposure(config)
    pipeline = open_pipeline(traces_url(config.tracing_endpoint), config.collector_headers())
    stack.callback(pipeline.close)
    return pipeline_tracer(
        pipeline,
        sample_ratio=config.tracing_sample_ratio,
        service_name=config.tracing_service_name,
        node_id=config.node_id(),
        version=version("ai-cluster"),
    )


def check_tracing(config: NodeConfig) -> None:
    """Raises ConfigInvalid where tracing is configured and cannot be had. Makes nothing."""
    if config.tracing_endpoint is None:
        return
    config.collector_headers()
    try:
        import_module("observability.span_export")
    except ModuleNotFoundError as exc:
        if not (exc.name or "").startswith("opentelemetry"):
            raise
        raise ConfigInvalid(
            f"tracing_endpoint {config.tracing_endpoint} needs OpenTelemetry, which is not installed here; "
            "install it with: pip install -e '.[tracing]' in the checkout"
        ) from exc


def traces_url(endpoint: str) -> str:
    """Where spans are posted to: the endpoint itself where it has a path."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + TRACES_PATH


def _warn_of_exposure(config: NodeConfig) -> None:
    file = config.tracing_headers_file
    if file is not None and os.name == "posix" and file.stat().st_mode & 0o077:
        logger.warning("other users may read the collector's headers; chmod 600 it", extra={"file": str(file)})
