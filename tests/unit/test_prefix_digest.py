"""Names of conversation beginnings: equal exactly as far as the conversations are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nodes.engine.prefix_digest import BLOCKS_MAX, TEXT_BLOCK_BYTES, cached_bytes, text_blocks

SYSTEM = {"role": "system", "content": "You help. " * 100}


def test_a_conversation_that_goes_on_shares_all_blocks_of_the_one_before() -> None:
    before = [SYSTEM, {"role": "user", "content": "What is a node?"}]
    after = [*before, {"role": "assistant", "content": "A process."}, {"role": "user", "content": "And a mesh? " * 50}]
    blocks = text_blocks(before)
    assert len(blocks) == 4
    assert text_blocks(after)[:4] == blocks
    assert cached_bytes(text_blocks(after), set(blocks)) == 4 * TEXT_BLOCK_BYTES


def test_what_differs_early_shares_nothing() -> None:
    one = text_blocks([SYSTEM])
    other = text_blocks([{"role": "system", "content": "I help. " * 100}])
    assert not set(one) & set(other)
    assert cached_bytes(one, set(other)) == 0


def test_names_are_bounded() -> None:
    assert len(text_blocks([{"role": "user", "content": "x" * 1_000_000}])) == BLOCKS_MAX
    assert text_blocks([{"role": "user", "content": "short"}]) == ()
    assert all(0 <= name < 1 << 64 for name in text_blocks([SYSTEM]))


@given(st.text(min_size=300, max_size=2_000), st.text(max_size=600), st.text(max_size=600))
def test_two_conversations_share_as_many_names_as_whole_blocks(start: str, one: str, other: str) -> None:
    first, second = ([{"role": "user", "content": start + end}] for end in (one, other))
    shared = sum(a == b for a, b in zip(text_blocks(first), text_blocks(second), strict=False))
    assert cached_bytes(text_blocks(first), set(text_blocks(second))) == shared * TEXT_BLOCK_BYTES
