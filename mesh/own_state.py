"""What this node says of itself: its load, its profile, its version. The only place that raises the own version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mesh.counters_wire import USAGE_BYTES_MAX
from mesh.gossip_types import GossipConfig
from mesh.member import Member
from mesh.pace import Pace
from mesh.state import encode_load, encode_profile, is_urgent
from mesh.view import MemberStatus, NodeLoad, NodeProfile
from mesh.wire import BULK_BYTES_MAX, SECTION_BYTES_MAX

# What a usage section takes in the hot one beyond its own bytes.
_USAGE_HEADER_BYTES = 3


class OwnState:
    """The node's own row, and when it is published next.

    usage: the next usage section of at most so many bytes, asked for at each publication. refutations: how often a
    claim about this node had to be outdone."""

    def __init__(
        self,
        config: GossipConfig,
        pace: Pace,
        member: Member,
        now: float,
        usage: Callable[[float, int], bytes] = lambda now, bytes_max: b"",
    ) -> None:
        self.member = member
        self.publish_at = now
        self.refutations = 0
        self._pace = pace
        self._spacing_s = config.urgent_spacing_s
        self._published_load = NodeLoad()
        self._usage = usage
        self._next_hot = self._published_hot = encode_load(NodeLoad())  # without the usage
        self._next_bulk = b""
        self._is_urgent = False
        self._urgent_at = float("-inf")
        self._published_at = float("-inf")

    def set_load(self, load: NodeLoad, now: float) -> None:
        """Raises ValueError for a load that no datagram holds; the former one stays."""
        self._next_hot = encode_load(load)
        self.member.load = load
        if is_urgent(self._published_load, load):
            self.hurry(now)
        elif self._next_hot != self._published_hot:
            self._publish_change(now)

    def set_profile(self, profile: NodeProfile, now: float) -> bool:
        """True where it differs from the former one.

        Raises ValueError for a profile that no datagram holds; the former one stays."""
        encoded = encode_profile(profile)
        member = self.member
        if encoded == member.warm:
            return False
        member.profile, member.warm = profile, encoded
        # Raised here and not with the publication, so that no datagram in between names this version without it.
        member.version += 1
        member.warm_version = member.profile_version = member.version
        member.hot_since = 0
        member.touched()
        self.hurry(now)
        return True

    def set_bulk(self, bulk: bytes, now: float) -> None:
        """Raises ValueError for more than a peer link carries; the former one stays."""
        if len(bulk) > BULK_BYTES_MAX:
            raise ValueError(f"a bulk section of {len(bulk)} bytes exceeds {BULK_BYTES_MAX}")
        self._next_bulk = bulk
        if bulk != self.member.bulk:
            self._publish_change(now)

    def _publish_change(self, now: float) -> None:
        self.publish_at = min(self.publish_at, max(now, self._published_at + self._pace.change_interval_s))

    def hurry_usage(self, now: float) -> None:
        """Publish as soon as usage may be told again."""
        self.publish_at = min(self.publish_at, max(now, self._published_at + self._pace.usage_interval_s))

    def hurry(self, now: float) -> None:
        """Publish at once, but for the spacing of urgent publications."""
        if not self._is_urgent:
            self._is_urgent = True
            self.publish_at = min(self.publish_at, max(now, self._urgent_at + self._spacing_s))

    def publish(self, now: float) -> None:
        member = self.member
        member.version += 1
        member.load_version = member.version
        hot = self._published_hot = self._next_hot
        room_bytes = min(USAGE_BYTES_MAX, SECTION_BYTES_MAX - len(self._next_hot) - _USAGE_HEADER_BYTES)
        if usage := self._usage(now, room_bytes):
            hot = encode_load(replace(member.load, usage=usage))
        if hot != member.hot or not member.hot_since:
            member.hot, member.hot_since = hot, member.version
        if self._next_bulk != member.bulk:
            member.bulk = self._next_bulk
            member.bulk_version = member.bulk_version_heard = member.hot_since = member.version
        member.touched()
        self._published_load = member.load
        self._published_at = now
        interval_s = self._pace.publish_interval_s
        on_time = self.publish_at + interval_s
        self.publish_at = on_time if on_time > now else now + interval_s
        if self._is_urgent:
            self._urgent_at = now
        self._is_urgent = False

    def outdo(self, generation: int, version: int, now: float) -> None:
        """Be newer than a claim about this node, and publish that at once."""
        member = self.member
        member.generation = max(member.generation, generation)
        member.version = max(member.version, version) + 1
        member.touched()
        self.refutations += 1
        self.hurry(now)

    def leave(self) -> None:
        self.member.version += 1
        self.member.status = MemberStatus.LEFT
        self.member.touched()
