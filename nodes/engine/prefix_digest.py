"""Names the beginnings of conversations, so that a node without the tokenizer can tell which node has them cached.

A conversation is written down in one canonical way and cut into blocks of TEXT_BLOCK_BYTES; block i's name is a hash of
everything up to its end. So two conversations share exactly as many names as they share blocks from the beginning, and
a name found in a node's digest says that the node holds all of the text before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

TEXT_BLOCK_BYTES = 256  # about the 64 tokens in which rows are reused, of English text
NAME_BYTES = 8
# Of one conversation: a digest of 8 slots then has at most 16 kB. The beginning is what conversations share.
BLOCKS_MAX = 256
BYTES_MAX = BLOCKS_MAX * TEXT_BLOCK_BYTES


def text_blocks(messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Names of the blocks of a conversation, first block first; whole blocks only, at most BLOCKS_MAX."""
    # Joined as a list without its brackets: a conversation that goes on begins with the one before.
    parts: list[str] = []
    size = 0
    for message in messages:
        cut = {name: value[:BYTES_MAX] if isinstance(value, str) else value for name, value in message.items()}
        parts.append(json.dumps(cut, ensure_ascii=True, sort_keys=True, separators=(",", ":")))
        size += len(parts[-1]) + 1
        if size > BYTES_MAX:
            break
    data = ",".join(parts).encode()[:BYTES_MAX]
    running = hashlib.blake2b(digest_size=NAME_BYTES)
    names = []
    for start in range(0, len(data) - TEXT_BLOCK_BYTES + 1, TEXT_BLOCK_BYTES):
        running.update(data[start : start + TEXT_BLOCK_BYTES])
        names.append(int.from_bytes(running.digest()))
    return tuple(names)


def cached_bytes(blocks: Sequence[int], digest: Collection[int]) -> int:
    """Bytes of the conversation's beginning that the node of this digest holds."""
    for index in range(len(blocks) - 1, -1, -1):
        if blocks[index] in digest:
            return (index + 1) * TEXT_BLOCK_BYTES
    return 0
