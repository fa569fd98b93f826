"""What goes into a Gossip and comes out of it: its parameters, the effects it asks for, what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.view import Address, MemberView


@dataclass(frozen=True, slots=True)
class GossipConfig:
    """Parameters; the defaults were chosen in simulation for 3 to 100 nodes. All nodes of a mesh should share them."""

    # How often a node publishes its load, which is also its sign of life. Over 0; shorter is fresher and costs packets
    # in proportion. Routers believe a load for three of these.
    publish_interval_s: float = 1.0
    # Up to so many members they all publish each publish_interval_s; with more the interval grows with their number,
    # and overdue_s with it: 4 s at 1,000; that for loads that changed grows with the root, 2 s at 1,000. What one node
    # is sent holds about as many records a second.
    steady_members: int = 250
    # How often one member is probed. Over verdict_timeout_s. Shorter finds the dead sooner: about half of it at n=3.
    probe_interval_s: float = 1.0
    # How long a direct probe may take before others are asked. Several round trips of the slowest network in the mesh.
    direct_timeout_s: float = 0.25
    # How long a probe may take altogether. At least twice direct_timeout_s, so that indirect answers are heard.
    verdict_timeout_s: float = 0.5
    # A member not heard of for this long is probed before its turn. Over publish_interval_s.
    overdue_s: float = 1.2
    # A member heard of within this time is not suspected whatever a probe says. Over publish_interval_s by the time
    # news takes to arrive; longer finds the dead later by as much.
    evidence_age_s: float = 1.5
    # How many others are asked to probe. SWIM's k; three make a wrong verdict at 30 % loss rare.
    indirect_count: int = 3
    # The shortest a suspicion lasts among up to 10: the time to refute. Over the longest stall to be forgiven less
    # evidence_age_s; at 2 s, stalls of 3 s were deaths. Each tenfold of members makes it longer by suspicion_growth of
    # itself, 0 or more: 5.4 s at 1,000.
    suspicion_min_s: float = 3.0
    suspicion_growth: float = 0.4
    # The longest a suspicion lasts, in terms of the shortest, while nobody confirms it. At least 1.
    suspicion_max_factor: float = 2.0
    # Independent confirmations that bring a suspicion down to its shortest. 1 or 2 (a record carries three accusers).
    confirmations: int = 2
    # With no more peers than these each is told of each publication by its owner, at once, and there are no rounds:
    # publications arrive as evenly spaced as they were made. Each costs a packet a second out and one in.
    everyone_max: int = 31
    # With more, the peers told of each publication at once; and always those told of urgent news at once.
    direct_peers: int = 4
    # Between two rounds of telling news in a larger mesh, and how many peers each tells. Together with direct_peers
    # they make the packets a second; keep it two below packet_rate.
    round_interval_s: float = 0.2
    round_peers: int = 2
    # Between two urgent tellings of one node; the first goes at once.
    urgent_spacing_s: float = 0.05
    # How often one piece of news is passed on by one node. What got lost is replaced by the next publication or found
    # by a digest.
    retransmit_max: int = 4
    # Between two comparisons with a random peer, and while such comparisons still find what is missing.
    digest_interval_s: float = 2.0
    digest_hurry_s: float = 0.25
    # A digest calls a member's load old when the other side holds one this many versions newer.
    digest_lag_versions: int = 3
    # Between two comparisons of everything with a random peer over the link to it, at most; at least half of it. And
    # between any two such comparisons.
    exchange_interval_s: float = 60.0
    exchange_spacing_s: float = 0.25
    # How long a bulk section that was heard of may be on its way before its owner is asked for it.
    bulk_patience_s: float = 1.0
    # Between two calls to a seed that no member answers for; and while this node knows nobody.
    seed_interval_s: float = 10.0
    seed_alone_interval_s: float = 0.5
    # Between two calls to each dead member; and while the latest death is less than recent_death_s ago, because a
    # restart follows a crash soon. Never more than one call per dead_spacing_s altogether.
    dead_interval_s: float = 10.0
    dead_recent_interval_s: float = 2.0
    recent_death_s: float = 60.0
    dead_spacing_s: float = 0.25
    # How long the dead and those who left are remembered, so that no old news revives them.
    tombstone_s: float = 86_400.0
    # Packets a second this node sends, sustained and at once: one to each of everyone_max, and as many as probes,
    # digests and answers need. A larger mesh uses about 16. Burst covers a join of many.
    packet_rate: float = 40.0
    packet_burst: int = 64
    # Bytes a second this node sends; beyond it packets carry no news but their sender's own. Of 24 kB/s with IP and UDP
    # headers what probes and answers leave.
    byte_rate: float = 20_000.0
    # Of the burst, what only probes and their answers may use; as much again is kept from the rounds for urgent news.
    packet_reserve: int = 6
    # A tick later than this means that the process stood still: then it blames nobody, but itself (awareness).
    stall_s: float = 0.5


@dataclass(frozen=True, slots=True)
class SendDatagram:
    """Send these bytes over UDP; if they get lost, nothing need be done."""

    address: Address
    data: bytes


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """A member is new (before is None), or changed in status, generation, readiness or profile. Never about oneself."""

    before: MemberView | None
    after: MemberView


@dataclass(frozen=True, slots=True)
class UsageHeard:
    """A member published a usage section (mesh.counters_wire), which came here now."""

    node_id: str
    section: bytes


@dataclass(frozen=True, slots=True)
class PingLink:
    """Ping this member over its peer link, then say link_answered or link_failed."""

    node_id: str
    address: Address


@dataclass(frozen=True, slots=True)
class ExchangeState:
    """Send the question to this member over its peer link, then give take_exchange the answer, or say
    exchange_failed."""

    node_id: str
    address: Address
    question: bytes


@dataclass(frozen=True, slots=True)
class Fenced:
    """Another process, at `address`, has this node's name, is older and answers: the mesh takes nothing from this
    process. Told once."""

    address: Address


@dataclass(frozen=True, slots=True)
class SeedUnanswered:
    """A seed has not answered `attempts` calls in a row; it is called again. Told at attempts 1, 2, 4, 8, …

    is_lasting: it has been silent for longer than nodes that start together take; told once in a silence."""

    address: Address
    attempts: int
    is_lasting: bool = False


@dataclass(frozen=True, slots=True)
class DuplicateNode:
    """Another live process at `address` uses the id of this node or of a member. Told at most each 10 s an id."""

    node_id: str
    address: Address


Effect = SendDatagram | MemberChanged | UsageHeard | PingLink | ExchangeState | SeedUnanswered | DuplicateNode | Fenced


@dataclass(frozen=True, slots=True)
class GossipStatistics:
    """Counts since the start, gauges as of now.

    packets_*: by message type. rejects: datagrams dropped, by reason. strangers: datagrams of processes that had not
    proven yet that they are alive, which were answered with a cookie. packets_withheld: not sent for lack of budget.
    packets_unlimited: sent outside it, each an answer to one that came, or a farewell."""

    packets_sent: Mapping[str, int]
    packets_received: Mapping[str, int]
    packets_withheld: int
    packets_unlimited: int
    bytes_sent: int
    bytes_received: int
    rejects: Mapping[str, int]
    strangers: int
    probes: int
    suspicions: int  # raised by this node
    refutations: int  # of suspicions and obituaries of this node
    deaths: int  # declared by this node
    stalls: int
    duplicates: int  # datagrams of a second process under one id
    exchanges: int  # comparisons of everything that were answered
    members_refused: int
    awareness: int
    members: int
    rumours_waiting: int
    suspicions_watched: int
