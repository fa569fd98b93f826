"""The frozen picture of the cluster that everybody else reads.

Data only: it holds no socket, no clock and no reference into the gossip core.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from types import MappingProxyType

# A member's load older than this many publish intervals no longer says how the member is.
STALE_PUBLISH_INTERVALS = 3
# Local health awareness (Lifeguard) from which a node counts itself as degraded.
DEGRADED_AWARENESS = 3
# A node whose event loop wakes up so late answers nobody in time.
LOOP_LAG_DEGRADED_S = 0.25


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """An IP address and port. On the mesh the same port number carries UDP gossip and TCP peer links."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class MemberStatus(IntEnum):
    """What an observer believes of a member. The number is the rank that decides between records of equal version."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class Readiness(StrEnum):
    """What a node says of itself."""

    LOADING = "loading"  # alive, its models are not there yet
    READY = "ready"
    DRAINING = "draining"  # finishes its streams, takes no new ones
    FAILED = "failed"  # its engine stopped with a fault


class NodeStatus(StrEnum):
    """What operators see: the `status` label of `ai_cluster_cluster_nodes_total`."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    OFFLINE = "offline"


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """How busy one model is on one node. Rates are tokens per second, measured on the run; 0.0 while unmeasured.

    step_s: the median tick of its engine. wait_s, prompt_token_s: a request that comes now has its first token after
    wait_s + prompt tokens x prompt_token_s, as its engine estimates it. answer_tokens: the running mean of answers."""

    active: int = 0
    queued: int = 0
    free_slots: int = 0
    prefill_rate: float = 0.0
    decode_rate: float = 0.0
    step_count: int = 0
    queued_tokens: int = 0  # prompt tokens not yet prefilled, waiting and running together
    step_s: float = 0.0
    wait_s: float = 0.0
    prompt_token_s: float = 0.0
    answer_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """The hot section: published by its owner each second and at once when it jumps.

    usage: of API keys, as mesh.counters_wire has it; in publications alone. after_version: on a peer link, of the
    owner's state when it sent this: publications up to it are older. 0 in publications."""

    readiness: Readiness = Readiness.LOADING
    active_requests: int = 0  # streams this node executes now
    tokens_per_s: float = 0.0  # generated over the last 10 s
    loop_lag_s: float = 0.0
    models: Mapping[str, ModelLoad] = field(default_factory=lambda: MappingProxyType({}))
    usage: bytes = b""
    after_version: int = 0
    view_hash: int = 0  # ClusterView.hash() at its owner; 0 where it does not tell


# Kinds of models: what they are asked for. UNKNOWN_KIND: one of a later version.
GENERATION = "generation"
EMBEDDING = "embedding"
UNKNOWN_KIND = "unknown"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model a node serves.

    fingerprint: hash of weights, tokenizer and template, as hex; equal means interchangeable. Empty while it loads."""

    name: str
    fingerprint: str
    context_length: int
    slots: int
    queue_limit: int = 512  # requests that may wait for a slot; a node with more takes none
    kind: str = GENERATION


@dataclass(frozen=True, slots=True)
class NodeProfile:
    """The warm section: published when it changes.

    records_digest: of the node's replica (mesh.replica), as hex; equal where the records are. Empty: it has none."""

    http_address: str = ""  # HOST:PORT for people and Prometheus; empty while unbound
    version: str = ""
    models: tuple[ModelInfo, ...] = ()
    records_digest: str = ""


@dataclass(frozen=True, slots=True)
class MemberView:
    """One member as this node believes it to be.

    age_s: seconds since its state last advanced, on this node's monotonic clock; 0 for itself."""

    node_id: str
    address: Address
    status: MemberStatus
    generation: int
    version: int
    load: NodeLoad
    profile: NodeProfile
    age_s: float
    is_self: bool = False
    load_age_s: float = 0.0
    load_version: int = 0  # the version at which `load` was published: tells a fresh report from a repeated one
    bulk: bytes = b""  # what its owner published beside load and profile, and at which version
    bulk_version: int = 0

    @property
    def is_live(self) -> bool:
        return self.status in (MemberStatus.ALIVE, MemberStatus.SUSPECT)

    def model(self, name: str) -> ModelInfo | None:
        return next((m for m in self.profile.models if m.name == name), None)


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All members this node knows, itself included, at one instant of its own clock (`now`, seconds, monotonic).

    witnessed: ids of the nodes that this node itself saw accept streams and make no progress."""

    self_id: str
    now: float
    members: Mapping[str, MemberView]
    awareness: int = 0  # this node's own Lifeguard score, 0 (well) to 8
    publish_interval_s: float = 1.0
    witnessed: frozenset[str] = frozenset()

    @property
    def me(self) -> MemberView:
        return self.members[self.self_id]

    def status(self, member: MemberView) -> NodeStatus:
        """Healthy, degraded or offline, as gossip.md defines them."""
        if member.status in (MemberStatus.DEAD, MemberStatus.LEFT):
            return NodeStatus.OFFLINE
        return NodeStatus.DEGRADED if self.complaint(member) else NodeStatus.HEALTHY

    def complaint(self, member: MemberView) -> str:
        """Why a member is degraded or offline, in a few words; empty where it is healthy."""
        if member.status is not MemberStatus.ALIVE:
            return member.status.name.lower()
        if member.load.readiness is not Readiness.READY:
            return member.load.readiness.value
        if member.load.loop_lag_s > LOOP_LAG_DEGRADED_S:
            return "its event loop lags"
        if member.load_age_s > STALE_PUBLISH_INTERVALS * self.publish_interval_s and not member.is_self:
            return "its load is old"
        if member.is_self and self.awareness >= DEGRADED_AWARENESS:
            return "hears too little of the others"
        return "streams there make no progress" if member.node_id in self.witnessed else ""

    def hash(self) -> int:
        """32 bits of the ids that this node holds to be there, alive or suspect: equal where two nodes agree."""
        here = (member.node_id for member in self.members.values() if member.status <= MemberStatus.SUSPECT)
        return zlib.crc32("\n".join(sorted(here)).encode())

    def disagreeing(self) -> list[str]:
        """Ids of live peers whose last report was of another view than this one; for a second or two after each change
        that is as it should be."""
        own = self.hash()
        return sorted(
            member.node_id
            for member in self.members.values()
            if not member.is_self and member.status <= MemberStatus.SUSPECT and member.load.view_hash not in (0, own)
        )

    def counts(self) -> dict[NodeStatus, int]:
        """Members by status, every status present. A member that left on purpose is no longer counted."""
        counts = dict.fromkeys(NodeStatus, 0)
        for member in self.members.values():
            if member.status is not MemberStatus.LEFT:
                counts[self.status(member)] += 1
        return counts

    def is_routable(self, member: MemberView) -> bool:
        """True where new requests may go: alive, ready, and its load recent enough to be believed."""
        return (
            member.status is MemberStatus.ALIVE
            and member.load.readiness is Readiness.READY
            and (member.is_self or member.load_age_s <= STALE_PUBLISH_INTERVALS * self.publish_interval_s)
        )
