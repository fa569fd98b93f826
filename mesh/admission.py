"""Whose datagrams are taken: those of processes known to be alive, and no more of them than a well-behaved peer sends.

The seal proves that a holder of the key made a datagram, not when. A recording of a former day, or one sent to a
process that restarted and so has no replay window, is told from a living peer by a cookie: a hash over the sender's
boot id and source address that only a living process at that very address can echo (as SCTP does, RFC 9260). It needs
no memory. Until then nothing is taken from it, and no answer to it is larger than what it sent, so nobody is flooded in
its name.
"""

from __future__ import annotations

import hmac
import math
from collections import OrderedDict

from mesh.dissemination import PacketBudget
from mesh.view import Address
from mesh.wire import COUNT_MAX, pack_address

# Datagrams taken from one process, sustained a second and at once. Peers send at most GossipConfig.packet_rate to all
# others together, and a burst when a mesh starts.
PEER_RATE = 64.0
PEER_BURST = 256
PEERS_MAX = 16_384  # processes whose rate and place are known; as many as members
PLACES_MAX = 4  # addresses of one process: two of IPv4, two of IPv6
# Cookies sent to strangers a second and at once: every pair of nodes of a starting mesh meets once.
COOKIE_RATE = 100.0
COOKIE_BURST = 200


class Admission:
    """Cookies, and the pace of each process. secret: random bytes that no other process has."""

    def __init__(self, secret: bytes, now: float) -> None:
        self._secret = secret
        self._cookies = PacketBudget(COOKIE_RATE, COOKIE_BURST, math.inf, now)
        # By boot id the addresses it has proven, or others have vouched for; the longest silent first.
        self._places: OrderedDict[bytes, tuple[Address, ...]] = OrderedDict()
        self._paces: OrderedDict[bytes, PacketBudget] = OrderedDict()  # by boot id, longest silent first

    def cookie(self, boot_id: bytes, source: Address) -> int:
        """What this process at this address must echo. Never 0."""
        digest = hmac.digest(self._secret, boot_id + pack_address(source), "sha256")
        return int.from_bytes(digest[:8], "big") & COUNT_MAX | 1

    def is_at(self, boot_id: bytes, source: Address) -> bool:
        """The process is known at that address. From elsewhere even what it sealed may have been meant for another, and
        answers to it may flood who never asked."""
        return source in self._places.get(boot_id, ())

    def note(self, boot_id: bytes, address: Address) -> None:
        """The process is at that address, too."""
        places = tuple(place for place in self._places.get(boot_id, ()) if place != address)
        self._places[boot_id] = (*places, address)[-PLACES_MAX:]
        self._places.move_to_end(boot_id)
        if len(self._places) > PEERS_MAX:
            self._places.popitem(last=False)

    def may_send_cookie(self, now: float) -> bool:
        return self._cookies.take(now)

    def is_flooding(self, boot_id: bytes, now: float) -> bool:
        """Count one more datagram of an admitted process. True where it is one too many."""
        pace = self._paces.get(boot_id)
        if pace is None:
            pace = self._paces[boot_id] = PacketBudget(PEER_RATE, PEER_BURST, math.inf, now)
            if len(self._paces) > PEERS_MAX:
                self._paces.popitem(last=False)
        self._paces.move_to_end(boot_id)
        return not pace.take(now)
