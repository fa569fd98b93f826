"""What mesh, dispatch and HTTP have counted, under the metric keys of observability.collectors.MESH_FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.forwarder import ForwarderStatistics
from mesh.gossip import GossipStatistics
from mesh.udp import SocketStatistics
from nodes.dispatch import DispatchStatistics
from nodes.http_connection import CLOSE_REASONS
from nodes.http_server import HttpStatistics
from observability.families import Figure
from observability.tracing import TracingStatistics

# Every value of the label, so that a scrape shows each from the start.
FAILOVER_REASONS = ("link", "fault", "hang", "drain", "refused")


@dataclass(frozen=True, slots=True)
class UsageFigures:
    """Sections of API key usage told and heard so far, and the counters of peers held now."""

    told: int
    heard: int
    rows: int


def mesh_figures(
    gossip: GossipStatistics,
    udp: SocketStatistics,
    links: ForwarderStatistics,
    dispatch: DispatchStatistics,
    http: HttpStatistics,
    usage: UsageFigures,
    tracing: TracingStatistics,
    certificate_expires_at: float | None,
) -> Mapping[str, Figure]:
    """certificate_expires_at: seconds since 1970; None where there is no TLS, and the figure is left out."""
    certificate = (
        {} if certificate_expires_at is None else {"tls_certificate_expiry_timestamp_seconds": certificate_expires_at}
    )
    sent = {("out", kind): float(count) for kind, count in gossip.packets_sent.items()}
    received = {("in", kind): float(count) for kind, count in gossip.packets_received.items()}
    return {
        "gossip_packets": sent | received,
        "gossip_bytes": {"in": gossip.bytes_received, "out": gossip.bytes_sent},
        "gossip_rejected": gossip.rejects,
        "gossip_send_errors": udp.send_errors,
        "gossip_suspicions": gossip.suspicions,
        "gossip_refutations": gossip.refutations,
        "gossip_deaths": gossip.deaths,
        "forwards": dispatch.forwards,
        "retries": dispatch.retries,
        "failovers": dict.fromkeys(FAILOVER_REASONS, 0) | dict(dispatch.failovers),
        "failover_tokens": dispatch.resumed_tokens,
        "answers_lost": dispatch.lost,
        "hedges": dispatch.hedges,
        "hedge_tokens": dispatch.hedge_tokens,
        "probes": dispatch.probes,
        "nodes_witnessed": dispatch.witnessed,
        "streams_open": dispatch.open_streams,
        "http_connections_open": http.connections,
        "http_connections_closed": dict.fromkeys(CLOSE_REASONS, 0) | dict(http.closed),
        "usage_sections": {"in": usage.heard, "out": usage.told},
        "usage_rows": usage.rows,
        "links": links.links,
        "link_streams_open": links.streams,
        "link_streams": {"opened": links.streams_opened, "served": links.streams_served},
        "link_frames": {"in": links.frames_in, "out": links.frames_out},
        "link_bytes": {"in": links.bytes_in, "out": links.bytes_out},
        "link_rejected": links.rejected,
        "link_broken": links.broken_links,
        "link_cancels": links.cancels_sent,
        "trace_spans_exported": tracing.exported,
        "trace_spans_dropped": {"queue": tracing.dropped_queue, "export": tracing.dropped_export},
        **certificate,
    }
