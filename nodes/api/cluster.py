"""The cluster as this node sees it, for people and for Prometheus's service discovery. Answered from gossip alone."""

from __future__ import annotations

import ipaddress
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import trio
from quart import Quart, Response, jsonify

from mesh.view import ClusterView, MemberStatus, MemberView, NodeStatus
from nodes.api.services import Services

# However many clients follow events, the status is made so often at most; with many members, whose status takes longer
# to make, less often: two hundredths of the time at most.
STATUS_REUSE_S = 0.2
STATUS_REUSE_MEMBER_S = 0.002
# The prompt for which a node's time to first token is told; what it has cached would make that shorter.
PROMPT_TOKENS_ASSUMED = 100
# What Prometheus calls the labels that relabelling may use; it drops them afterwards.
SD_LABEL_NODE = "__meta_ai_cluster_node"
SD_LABEL_CLUSTER = "__meta_ai_cluster_name"


def register(app: Quart, services: Services) -> None:
    @app.get("/cluster/status")
    async def cluster_status() -> Response:
        # As of now: who asks once decides by it.
        return Response(_encoded(services, services.view()), 200, content_type="application/json")

    @app.get("/cluster/sd")
    async def service_discovery() -> Response:
        return jsonify(sd_targets(services.view(), services.cluster_name))


def sd_targets(view: ClusterView, cluster_name: str) -> list[dict[str, Any]]:
    """Target groups of Prometheus's http_sd_configs: every member that has not left, the dead ones included, so that
    `up == 0` tells of them. Labels do not depend on who is asked: else each answerer would make targets of its own."""
    return [
        {"targets": [target], "labels": {SD_LABEL_NODE: node_id, SD_LABEL_CLUSTER: cluster_name}}
        for node_id, member in sorted(view.members.items())
        if member.status is not MemberStatus.LEFT and (target := _http_target(member))
    ]


def _http_target(member: MemberView) -> str:
    """HOST:PORT of its HTTP; of a node that binds all addresses, at the one where its mesh is."""
    host, _, port = member.profile.http_address.rpartition(":")
    if not port:
        return ""
    try:
        is_everywhere = ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        is_everywhere = False
    if is_everywhere:
        host = f"[{member.address.host}]" if ":" in member.address.host else member.address.host
    return f"{host}:{port}"


def status_source(services: Services) -> Callable[[], bytes]:
    """Makes the body of /cluster/status for followers; it may be a little old."""
    made, made_at = b"", -STATUS_REUSE_S

    def status() -> bytes:
        nonlocal made, made_at
        now = trio.current_time()
        view = services.view()
        if not made or now - made_at >= max(STATUS_REUSE_S, STATUS_REUSE_MEMBER_S * len(view.members)):
            made_at = now
            made = _encoded(services, view)
        return made

    return status


def _encoded(services: Services, view: ClusterView) -> bytes:
    return json.dumps(_cluster_status(services, view), separators=(",", ":")).encode()


def _cluster_status(services: Services, view: ClusterView) -> dict[str, Any]:
    counts = view.counts()
    known = sum(1 for member in view.members.values() if member.status is not MemberStatus.LEFT)
    return {
        "node_id": services.node_id,
        "cluster_name": services.cluster_name,
        "version": services.version,
        "nodes": {status.value: count for status, count in counts.items()},
        "nodes_expected": services.nodes_expected or known,
        "view_hash": view.hash(),
        "views_disagreeing": view.disagreeing(),
        "warnings": _warnings(view),
        "members": [_member(view, view.members[node_id]) for node_id in sorted(view.members)],
    }


def _member(view: ClusterView, member: MemberView) -> dict[str, Any]:
    return {
        "node_id": member.node_id,
        "status": view.status(member).value,
        "reason": view.complaint(member),
        "membership": member.status.name.lower(),
        "readiness": member.load.readiness.value,
        "is_self": member.is_self,
        "mesh": str(member.address),
        "http": member.profile.http_address,
        "version": member.profile.version,
        "generation": member.generation,
        "age_s": round(member.age_s, 3),
        "load_age_s": round(member.load_age_s, 3),
        "loop_lag_s": round(member.load.loop_lag_s, 3),
        "view_hash": view.hash() if member.is_self else member.load.view_hash,
        "active_requests": member.load.active_requests,
        "tokens_per_s": round(member.load.tokens_per_s, 1),
        "prefix_digest_bytes": len(member.bulk),
        "models": [
            {"name": model.name, "fingerprint": model.fingerprint, "context_length": model.context_length}
            | {"slots": model.slots, "queue_limit": model.queue_limit}
            | _load(member, model.name)
            for model in member.profile.models
        ],
    }


def _load(member: MemberView, name: str) -> dict[str, int | float]:
    """first_token_s: what a request that comes now has to wait for its first token, as its engine estimates it."""
    load = member.load.models.get(name)
    if load is None:
        return {}
    return {
        "active": load.active,
        "queued": load.queued,
        "free_slots": load.free_slots,
        "queued_tokens": load.queued_tokens,
        "decode_rate": round(load.decode_rate, 1),
        "first_token_s": round(load.wait_s + PROMPT_TOKENS_ASSUMED * load.prompt_token_s, 4),
    }


def _warnings(view: ClusterView) -> list[str]:
    """What an operator should mend: models that differ under one name."""
    fingerprints: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for member in view.members.values():
        if view.status(member) is not NodeStatus.OFFLINE:
            for model in filter(lambda model: model.fingerprint, member.profile.models):
                fingerprints[model.name][model.fingerprint].append(member.node_id)
    return [
        f"model {name!r} differs between nodes: "
        + "; ".join(f"{', '.join(sorted(nodes))} have {fingerprint}" for fingerprint, nodes in sorted(kinds.items()))
        for name, kinds in sorted(fingerprints.items())
        if len(kinds) > 1
    ]
