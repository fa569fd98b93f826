"""Which conversations' beginnings are cached where: what a node tells of its own, and what is known of the others.

A conversation is named by its blocks: name i stands for everything up to the end of block i, so a name found in a
node's digest says that the node holds the text before it too. A digest names only some blocks of each conversation: the
last one, those where two conversations part, the first few, and from there on geometrically fewer. So what it says is
never more than what is cached, less by a fifth at most where a conversation is left between two of its names.
Names are cut to 4 bytes: of 120 of them and 256 blocks asked for, one in 140,000 requests believes a node that has
nothing of its prompt, and is served a little later for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgpack

from mesh.view import MemberView
from mesh.wire import BULK_INLINE_BYTES_MAX

NAME_BYTES = 4
_NAME_SHIFT = 32  # the upper half of an 8-byte name
FIRST_BLOCKS = 4  # named one by one
THINNING = 1.25  # from there on each block named has at least this many times the index of the one before
# How often a node tells a new one, at most.
DIGEST_INTERVAL_S = 4.0
# A node's own digest. It travels inside datagrams then; 30 peers with one each 4 s are a fifth of the byte budget.
DIGEST_BYTES_MAX = BULK_INLINE_BYTES_MAX
# Names taken from one node, whatever it sends.
NAMES_MAX = DIGEST_BYTES_MAX // NAME_BYTES
CONVERSATIONS_MAX = NAMES_MAX  # of one model: each gives a name at least
MODELS_MAX = 16  # in one digest
# Nodes whose digests are kept. As many as there are members; the longest unused goes first.
NODES_MAX = 16_384
# Names under which own dispatches are remembered: some hundred conversations. A digest tells of them seconds later.
OWN_NAMES_MAX = 8_192
# After so many digests that came since a dispatch has ended, they say better than it whether the rows are still there.
DIGESTS_UNTIL_TOLD = 2
ANY_GENERATION = 0  # of a dispatch whose caller does not say


def named_indices(length: int) -> list[int]:
    """Which blocks of a conversation of so many are named, in rising order: the first few, then fewer, and the last."""
    indices = list(range(min(length, FIRST_BLOCKS)))
    following = float(FIRST_BLOCKS)
    while following < length:
        indices.append(int(following))
        following = max(following + 1, following * THINNING)
    if length and indices[-1] != length - 1:
        indices.append(length - 1)
    return indices


def encode_digest(conversations: Mapping[str, Sequence[Sequence[int]]], bytes_max: int = DIGEST_BYTES_MAX) -> bytes:
    """The digest of what is cached. conversations: by model, the names of each one's blocks, the most precious first.

    Where not all fits, every conversation keeps its last name as long as there is room, and the models share it."""
    models = [(name, rows[:CONVERSATIONS_MAX]) for name, rows in conversations.items() if any(rows)][:MODELS_MAX]
    frame = 1 + sum(len(name.encode()) + 8 for name, _ in models)
    room = max(0, bytes_max - frame) // NAME_BYTES
    parts = []
    for position, (name, rows) in enumerate(models):
        wanted = _by_worth(rows)
        chosen = wanted[: room // (len(models) - position)]
        room -= len(chosen)
        lasts = {row[-1] >> _NAME_SHIFT for row in rows if row}
        is_whole = lasts <= set(chosen)
        packed = b"".join(value.to_bytes(NAME_BYTES) for value in chosen)
        parts.append([name, packed, is_whole])
    return msgpack.packb(parts) if parts else b""


def _by_worth(conversations: Sequence[Sequence[int]]) -> list[int]:
    """Short names, each once: last blocks, then where conversations part, then the others, last ones first."""
    lasts = [row[-1] for row in conversations if row]
    forks = []
    seen: dict[int, int] = {}  # a block, and how many conversations have it
    for row in conversations:
        for block in row:
            seen[block] = seen.get(block, 0) + 1
    for row in conversations:
        for block, following in pairwise(row):
            if seen[following] < seen[block]:
                forks.append(block)
    others = [
        (place, row[index]) for row in conversations for place, index in enumerate(reversed(named_indices(len(row))))
    ]
    others.sort(key=lambda pair: pair[0])
    ordered = [*lasts, *forks, *(block for _, block in others)]
    return list(dict.fromkeys(block >> _NAME_SHIFT for block in ordered))


def decode_digest(bulk: bytes) -> dict[str, tuple[frozenset[int], bool]]:
    """By model: the short names, and whether the last block of everything cached is among them. Nothing of bytes that
    are no digest; a newer version's fields are ignored."""
    if not bulk or len(bulk) > DIGEST_BYTES_MAX:
        return {}
    try:
        parts = msgpack.unpackb(bulk)
    except (ValueError, msgpack.UnpackException):
        return {}
    if not isinstance(parts, list) or len(parts) > MODELS_MAX:
        return {}
    digest: dict[str, tuple[frozenset[int], bool]] = {}
    for part in parts:
        if not isinstance(part, list) or len(part) < 3:
            return {}
        name, packed, is_whole = part[:3]
        if not isinstance(name, str) or not isinstance(packed, bytes) or len(packed) % NAME_BYTES:
            return {}
        names = [int.from_bytes(packed[at : at + NAME_BYTES]) for at in range(0, len(packed), NAME_BYTES)]
        digest[name] = frozenset(names), bool(is_whole)
    return digest


@dataclass(slots=True)
class _Known:
    """The digest held of one node. count: of digests of this life of it that came so far."""

    generation: int
    version: int
    count: int
    models: dict[str, tuple[frozenset[int], bool]]


@dataclass(slots=True)
class OwnMark:
    """A dispatch of this node, as the holder of a conversation. digests: how many its node had told when it ended; None
    while it runs."""

    generation: int
    digests: int | None = None


class PrefixDigests:
    """All digests, by the names in them, and what this node itself has dispatched where."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._holders: dict[tuple[str, int], set[str]] = {}  # who tells of a model's name; bounded by what is known
        self._own: OrderedDict[tuple[str, int], dict[str, OwnMark]] = OrderedDict()

    def learn(self, member: MemberView) -> None:
        """Read the member's digest, unless it is the one that was read last."""
        known = self._known.get(member.node_id)
        if known is not None and known.version == member.bulk_version and known.generation == member.generation:
            return
        if known is None and not member.bulk:
            return
        count = known.count + 1 if known is not None and known.generation == member.generation else 1
        if known is not None:
            self._forget(member.node_id, known)
        elif len(self._known) >= NODES_MAX:
            self._forget(*self._known.popitem(last=False))
        models = decode_digest(member.bulk)
        self._known[member.node_id] = _Known(member.generation, member.bulk_version, count, models)
        for model, (names, _) in models.items():
            for name in names:
                self._holders.setdefault((model, name), set()).add(member.node_id)

    def dispatched(self, node_id: str, model: str, blocks: Sequence[int], generation: int) -> OwnMark | None:
        """Remember at once that the node will hold this conversation."""
        if not blocks:
            return None
        mark = OwnMark(generation)
        for index in named_indices(len(blocks)):
            key = model, blocks[index] >> _NAME_SHIFT
            holders = self._own.get(key)
            if holders is None:
                if len(self._own) >= OWN_NAMES_MAX:
                    self._own.popitem(last=False)
                holders = self._own[key] = {}
            else:
                self._own.move_to_end(key)
            holders[node_id] = mark
        return mark

    def ended(self, node_id: str, mark: OwnMark) -> None:
        """The dispatch is over: the second digest that comes from now on says whether the rows are still there."""
        known = self._known.get(node_id)
        mark.digests = known.count if known is not None else 0

    def matches(self, model: str, blocks: Sequence[int], members: Mapping[str, MemberView]) -> dict[str, int]:
        """By node that holds anything of it: how many blocks of the conversation's beginning it holds, as far as known.

        members: those whose marks count; a mark from another life of its node does not, and is dropped."""
        found: dict[str, int] = {}
        for index in range(len(blocks) - 1, -1, -1):
            key = model, blocks[index] >> _NAME_SHIFT
            for node_id in self._holders.get(key, ()):
                found.setdefault(node_id, index + 1)
            own = self._own.get(key)
            if own is not None:
                for node_id in list(own):
                    member = members.get(node_id)
                    if member is None or not self._holds(node_id, model, own[node_id], member.generation):
                        del own[node_id]
                    else:
                        found.setdefault(node_id, index + 1)
                if not own:
                    del self._own[key]
        return found

    def _holds(self, node_id: str, model: str, mark: OwnMark, generation: int) -> bool:
        if mark.generation not in (ANY_GENERATION, generation):
            return False
        known = self._known.get(node_id)
        if mark.digests is None or known is None or known.count - mark.digests < DIGESTS_UNTIL_TOLD:
            return True
        return not known.models.get(model, (frozenset(), True))[1]

    def _forget(self, node_id: str, known: _Known) -> None:
        for model, (names, _) in known.models.items():
            for name in names:
                holders = self._holders.get((model, name))
                if holders is not None:
                    holders.discard(node_id)
                    if not holders:
                        del self._holders[model, name]
