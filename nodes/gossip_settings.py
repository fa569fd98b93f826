"""The table [gossip] of a node's configuration: what mesh.gossip_types.GossipConfig takes, with bounds and help."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mesh.gossip_types import GossipConfig

_DEFAULT = GossipConfig()


class GossipSettings(BaseModel):
    """All nodes of a mesh should share them. The defaults hold from 3 nodes to 1,000 on one network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    publish_interval_s: float = Field(
        default=_DEFAULT.publish_interval_s,
        gt=0,
        le=60,
        description="How often a node publishes its load, which is also its sign of life. Shorter is fresher and "
        "costs packets in proportion; routers believe a load for three of these.",
    )
    steady_members: int = Field(
        default=_DEFAULT.steady_members,
        ge=1,
        le=16_384,
        description="Up to so many members they all publish each publish_interval_s; with more the interval grows "
        "with their number, for loads that changed with the root of it.",
    )
    probe_interval_s: float = Field(
        default=_DEFAULT.probe_interval_s,
        gt=0,
        le=60,
        description="How often one member is asked whether it lives. At least verdict_timeout_s; shorter finds the "
        "dead sooner.",
    )
    direct_timeout_s: float = Field(
        default=_DEFAULT.direct_timeout_s,
        gt=0,
        le=10,
        description="How long a direct probe may take before others are asked: several round trips of the slowest "
        "network in the mesh.",
    )
    verdict_timeout_s: float = Field(
        default=_DEFAULT.verdict_timeout_s,
        gt=0,
        le=20,
        description="How long a probe may take altogether. At least twice direct_timeout_s, so that indirect "
        "answers are heard.",
    )
    overdue_s: float = Field(
        default=_DEFAULT.overdue_s,
        gt=0,
        le=120,
        description="A member not heard of for this long is probed before its turn. At least publish_interval_s.",
    )
    evidence_age_s: float = Field(
        default=_DEFAULT.evidence_age_s,
        gt=0,
        le=120,
        description="A member heard of within this time is not suspected, whatever a probe says. At least "
        "publish_interval_s; longer finds the dead later by as much.",
    )
    indirect_count: int = Field(
        default=_DEFAULT.indirect_count,
        ge=0,
        le=16,
        description="How many others are asked to probe; three make a wrong verdict at 30 % loss rare.",
    )
    suspicion_min_s: float = Field(
        default=_DEFAULT.suspicion_min_s,
        gt=0,
        le=120,
        description="The shortest a suspicion lasts among up to 10 members: the time to refute. Stalls shorter "
        "than this and evidence_age_s together kill nobody.",
    )
    suspicion_growth: float = Field(
        default=_DEFAULT.suspicion_growth,
        ge=0,
        le=2,
        description="Each tenfold of members makes a suspicion longer by this share of itself.",
    )
    suspicion_max_factor: float = Field(
        default=_DEFAULT.suspicion_max_factor,
        ge=1,
        le=10,
        description="How much longer than the shortest a suspicion lasts while nobody confirms it.",
    )
    confirmations: int = Field(
        default=_DEFAULT.confirmations,
        ge=1,
        le=2,
        description="Independent confirmations that bring a suspicion down to its shortest.",
    )
    everyone_max: int = Field(
        default=_DEFAULT.everyone_max,
        ge=0,
        le=200,
        description="With no more peers than these each is told of each publication by its owner. Costs as many "
        "packets a second; packet_rate must allow it.",
    )
    direct_peers: int = Field(
        default=_DEFAULT.direct_peers,
        ge=1,
        le=64,
        description="With more peers than that: how many are told of each publication at once; and always of "
        "urgent news.",
    )
    round_interval_s: float = Field(
        default=_DEFAULT.round_interval_s,
        gt=0,
        le=10,
        description="Between two rounds of telling news in a larger mesh.",
    )
    round_peers: int = Field(
        default=_DEFAULT.round_peers,
        ge=1,
        le=64,
        description="How many peers a round tells.",
    )
    urgent_spacing_s: float = Field(
        default=_DEFAULT.urgent_spacing_s,
        ge=0.001,
        le=10,
        description="Between two urgent tellings of one node; the first goes at once.",
    )
    retransmit_max: int = Field(
        default=_DEFAULT.retransmit_max,
        ge=1,
        le=64,
        description="How often one piece of news is passed on by one node. What got lost is replaced by the next "
        "publication or found by a comparison.",
    )
    digest_interval_s: float = Field(
        default=_DEFAULT.digest_interval_s,
        gt=0,
        le=600,
        description="Between two comparisons with a random peer.",
    )
    digest_hurry_s: float = Field(
        default=_DEFAULT.digest_hurry_s,
        gt=0,
        le=60,
        description="The same while comparisons find what is missing.",
    )
    digest_lag_versions: int = Field(
        default=_DEFAULT.digest_lag_versions,
        ge=1,
        le=1_000,
        description="A load this many versions behind counts as missing.",
    )
    exchange_interval_s: float = Field(
        default=_DEFAULT.exchange_interval_s,
        gt=0,
        le=86_400,
        description="Between two comparisons of everything with a random peer over its link, at most; at least "
        "half of it.",
    )
    exchange_spacing_s: float = Field(
        default=_DEFAULT.exchange_spacing_s,
        gt=0,
        le=60,
        description="Between any two of them.",
    )
    bulk_patience_s: float = Field(
        default=_DEFAULT.bulk_patience_s,
        ge=0,
        le=60,
        description="How long a bulk section that was heard of may be on its way before its owner is asked for it.",
    )
    seed_interval_s: float = Field(
        default=_DEFAULT.seed_interval_s,
        gt=0,
        le=3_600,
        description="Between two calls to a seed that no member answers for.",
    )
    seed_alone_interval_s: float = Field(
        default=_DEFAULT.seed_alone_interval_s,
        gt=0,
        le=3_600,
        description="The same while this node knows nobody.",
    )
    dead_interval_s: float = Field(
        default=_DEFAULT.dead_interval_s,
        gt=0,
        le=3_600,
        description="Between two calls to each dead member: how a partition heals.",
    )
    dead_recent_interval_s: float = Field(
        default=_DEFAULT.dead_recent_interval_s,
        gt=0,
        le=3_600,
        description="The same while the latest death is less than recent_death_s ago: a restart follows a crash soon.",
    )
    recent_death_s: float = Field(
        default=_DEFAULT.recent_death_s,
        ge=0,
        le=86_400,
        description="How long a death counts as recent.",
    )
    dead_spacing_s: float = Field(
        default=_DEFAULT.dead_spacing_s,
        gt=0,
        le=60,
        description="Between any two calls to the dead, however many they are.",
    )
    tombstone_s: float = Field(
        default=_DEFAULT.tombstone_s,
        ge=60,
        le=31_536_000,
        description="How long the dead and those who left are remembered, so that no old news revives them.",
    )
    packet_rate: float = Field(
        default=_DEFAULT.packet_rate,
        ge=1,
        le=60,
        description="Packets a second this node sends, sustained: everyone_max, and as many as probes and answers "
        "need.",
    )
    packet_burst: int = Field(
        default=_DEFAULT.packet_burst,
        ge=1,
        le=250,
        description="Packets at once.",
    )
    byte_rate: float = Field(
        default=_DEFAULT.byte_rate,
        ge=1_000,
        le=1e9,
        description="Bytes a second this node sends; beyond it packets carry no news but their sender's own.",
    )
    packet_reserve: int = Field(
        default=_DEFAULT.packet_reserve,
        ge=0,
        le=1_000,
        description="Of the burst, what only probes and their answers may use; as much again is kept for urgent news.",
    )
    stall_s: float = Field(
        default=_DEFAULT.stall_s,
        gt=0,
        le=60,
        description="A tick later than this means that this process stood still: then it blames nobody but itself.",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        for smaller, larger, factor in (
            ("direct_timeout_s", "verdict_timeout_s", 2.0),
            ("verdict_timeout_s", "probe_interval_s", 1.0),
            ("publish_interval_s", "overdue_s", 1.0),
            ("publish_interval_s", "evidence_age_s", 1.0),
            ("everyone_max", "packet_rate", 1.0),
            ("packet_reserve", "packet_burst", 3.0),  # a third each for probes, urgent news and all else
            ("dead_interval_s", "tombstone_s", 1.0),
        ):
            low, high = getattr(self, smaller), getattr(self, larger)
            if low * factor > high:
                times = f"{factor:g} times " if factor != 1.0 else ""
                raise ValueError(f"{larger} = {high:g} must be at least {times}{smaller}, which is {low:g}")
        return self

    def config(self) -> GossipConfig:
        return GossipConfig(**self.model_dump())
