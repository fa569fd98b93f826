"""The table of slots: dense decode batches, whoever comes and goes, and moves that keep every row with its sequence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.engine.kv_slots import BLOCK_TOKENS, CopyRows, KvSlots, Match, Move, SwapRows
from nodes.engine.sampling import SamplingParams
from nodes.engine.sequence import Sequence
from tests.unit.test_sequence import LetterDecoder

SLOTS = 6


def sequence(ids: list[int] | None = None) -> Sequence:
    return Sequence(ids or [1], SamplingParams(), LetterDecoder(), eos_ids=frozenset(), capacity=10_000, deadline=0.0)


def decoding(count: int) -> tuple[KvSlots, list[Sequence]]:
    """`count` sequences that decode; the one in slot i has i + 1 rows and feeds token 10 + i."""
    kv = KvSlots(SLOTS)
    sequences = [sequence() for _ in range(count)]
    for slot, one in enumerate(sequences):
        assert kv.begin(one) == []
        assert kv.prefilling == (slot, one)
        kv.lengths[slot] = slot + 1
        kv.next_ids[slot] = 10 + slot
        assert kv.promote() == []
    return kv, sequences


@pytest.mark.parametrize(
    ("leaving", "moves", "order"),
    [
        ([], [], [0, 1, 2, 3]),
        ([3], [], [0, 1, 2]),
        ([0], [CopyRows(3, 0, 4)], [3, 1, 2]),
        ([0, 1], [CopyRows(2, 0, 3), CopyRows(3, 1, 4)], [2, 3]),
        ([3, 1], [CopyRows(2, 1, 3)], [0, 2]),
        ([2, 0, 3], [CopyRows(1, 0, 2)], [1]),
        ([0, 1, 2, 3], [], []),
    ],
    ids=["none", "the last", "the first", "both fill", "one fills", "one stays", "all"],
)
def test_who_stays_closes_the_holes(leaving: list[int], moves: list[Move], order: list[int]) -> None:
    kv, sequences = decoding(4)
    assert kv.release(leaving) == moves
    assert kv.decoding() == [sequences[i] for i in order]
    assert kv.lengths[: kv.active].tolist() == [i + 1 for i in order]
    assert kv.next_ids[: kv.active].tolist() == [10 + i for i in order]
    assert kv.free == SLOTS - len(order)


def test_a_prefilled_sequence_joins_in_place() -> None:
    kv, _ = decoding(2)
    one = sequence()
    assert kv.begin(one) == []
    assert kv.prefilling == (2, one)
    assert (kv.active, kv.free) == (2, SLOTS - 3)
    assert kv.promote() == []
    assert kv.decoding()[-1] is one


def test_a_prefilled_sequence_moves_when_the_batch_shrank_meanwhile() -> None:
    kv, _ = decoding(3)
    one = sequence()
    kv.begin(one)
    kv.lengths[3] = 7
    kv.release([0, 1])
    assert kv.promote() == [CopyRows(3, 1, 7)]
    assert kv.decoding()[1] is one
    assert kv.prefilling is None


def test_a_sequence_that_leaves_in_prefill_frees_its_slot() -> None:
    kv, _ = decoding(2)
    kv.begin(sequence())
    kv.release_prefilling()
    assert (kv.active, kv.free, kv.prefilling) == (2, SLOTS - 2, None)


def conversation(topic: int, blocks: int, extra: int = 0) -> list[int]:
    """Ids that begin alike for one topic, and not for two."""
    return [topic * 1_000_000 + i for i in range(blocks * BLOCK_TOKENS + extra)]


def serve(kv: KvSlots, ids: list[int], *, stays: bool = False) -> tuple[int, list[Move]]:
    """Prefill ids, and let the sequence leave unless it stays. Tokens found in the cache, and the moves."""
    one = sequence(ids)
    moves = kv.begin(one)
    found = one.cached_tokens
    assert kv.prefilling is not None
    kv.lengths[kv.prefilling[0]] = len(ids)
    moves += kv.promote()
    if not stays:
        moves += kv.release([kv.active - 1])
    return found, moves


@pytest.mark.parametrize(
    ("mixes_rows", "lengths"), [(True, (132, 127, 65)), (False, (128, 64, 64))], ids=["float32", "quantised"]
)
def test_a_repeated_prompt_finds_all_but_its_last_token(mixes_rows: bool, lengths: tuple[int, int, int]) -> None:
    kv = KvSlots(SLOTS, mixes_rows=mixes_rows)
    assert serve(kv, conversation(1, 2, 5))[0] == 0
    asked = (conversation(1, 2, 5), conversation(1, 2), [*conversation(1, 1, 1), 7, 7])
    assert tuple(kv.match(ids).length for ids in asked) == lengths
    assert kv.match(conversation(1, 0, 64)) == Match(None, 0), "of a single block one token must be computed"
    assert kv.match(conversation(2, 2, 5)) == Match(None, 0)
    assert serve(kv, conversation(1, 2, 5)) == (lengths[0], [])


def test_a_longer_conversation_takes_the_slot_of_the_one_it_continues() -> None:
    kv = KvSlots(SLOTS)
    serve(kv, conversation(1, 2, 5))
    assert serve(kv, conversation(1, 4)) == (2 * BLOCK_TOKENS + 5, [])
    assert [len(rows.ids) for rows in kv.retained()] == [4 * BLOCK_TOKENS]


def test_a_prompt_that_branches_off_leaves_the_older_one_in_the_cache() -> None:
    kv = KvSlots(SLOTS)
    serve(kv, conversation(1, 4))
    branch = conversation(1, 2) + conversation(2, 2)
    found, moves = serve(kv, branch)
    assert (found, moves) == (2 * BLOCK_TOKENS, [CopyRows(0, 1, 4 * BLOCK_TOKENS)])
    assert kv.match(conversation(1, 4, 1)).length == 4 * BLOCK_TOKENS
    assert kv.match([*branch, 1]).length == 4 * BLOCK_TOKENS


def test_the_prefix_of_a_running_sequence_is_copied() -> None:
    kv = KvSlots(SLOTS)
    serve(kv, conversation(1, 3, 1), stays=True)
    found, moves = serve(kv, conversation(1, 3, 1), stays=True)
    assert (found, moves) == (3 * BLOCK_TOKENS, [CopyRows(0, 1, 3 * BLOCK_TOKENS)])
    found, moves = serve(kv, conversation(1, 3, 9), stays=True)
    assert (found, moves) == (3 * BLOCK_TOKENS + 1, [CopyRows(0, 2, 3 * BLOCK_TOKENS + 1)])


def test_who_leaves_the_batch_keeps_its_rows_by_a_swap() -> None:
    kv = KvSlots(SLOTS)
    for topic in (1, 2, 3):
        serve(kv, conversation(topic, topic), stays=True)
    assert kv.release([0]) == [SwapRows(2, 0, 3 * BLOCK_TOKENS, BLOCK_TOKENS)]
    assert kv.match(conversation(1, 1, 1)) == Match(2, BLOCK_TOKENS)
    assert kv.match(conversation(3, 3, 1)) == Match(0, 3 * BLOCK_TOKENS)


def test_the_conversation_used_longest_ago_is_given_up_first() -> None:
    kv = KvSlots(3)
    for topic in (1, 2, 3):
        serve(kv, conversation(topic, 1, 1))
    serve(kv, conversation(1, 1, 1))
    serve(kv, conversation(4, 1, 1))
    kept = [topic for topic in (1, 2, 3, 4) if kv.match(conversation(topic, 1, 1)).length]
    assert kept == [1, 3, 4]


def test_where_rows_must_not_be_mixed_only_prefilled_blocks_are_reused() -> None:
    ids = conversation(1, 1, 10)
    answered = [*ids, *range(100)]
    for mixes_rows, length in ((True, len(answered) - 1), (False, BLOCK_TOKENS)):
        kv = KvSlots(SLOTS, mixes_rows=mixes_rows)
        one = sequence(ids)
        kv.begin(one)
        one.generated_ids.extend(range(100))
        kv.lengths[0] = len(answered)
        assert kv.promote() == []
        assert kv.match(answered).length == length
        kv.release([0])
        assert kv.match(answered).length == length


def test_conversations_of_busy_and_idle_slots_are_told_of() -> None:
    kv = KvSlots(SLOTS)
    for topic in (1, 2):
        one = Sequence(
            conversation(topic, 1, 1),
            SamplingParams(),
            LetterDecoder(),
            eos_ids=frozenset(),
            capacity=10_000,
            deadline=0.0,
            text_blocks=(topic, topic + 10),
        )
        kv.begin(one)
        assert all(topic not in blocks for blocks in kv.conversations()), "no row is there yet"
        kv.lengths[kv.active] = BLOCK_TOKENS + 1
        kv.promote()
    kv.release([0])
    assert kv.conversations() == [(2, 12), (1, 11)], "the busy one first"
    kv.release([0])
    assert kv.conversations() == [(2, 12), (1, 11)], "the one used last first"
    kv.clear()
    assert kv.conversations() == []


STEPS = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)),
        st.sampled_from(["chunk", "promote", "drop"]),
        st.sets(st.integers(0, SLOTS - 1)),
    ),
    max_size=40,
)


@given(steps=STEPS, mixes_rows=st.booleans())
def test_rows_are_what_the_table_says_whatever_happens(
    steps: list[tuple[int, int, int] | str | set[int]], mixes_rows: bool
) -> None:
    """Rows hold the ids they were computed for, as FakeSession's do; the table must always be right about them."""
    kv = KvSlots(SLOTS, mixes_rows=mixes_rows)
    rows: list[list[int]] = [[] for _ in range(SLOTS)]
    for step in steps:
        moves: list[Move] = []
        if isinstance(step, tuple) and kv.prefilling is None and kv.free:
            topic, blocks, extra = step
            moves = kv.begin(sequence([*conversation(topic, blocks, extra), 7]))
        elif step == "promote" and kv.prefilling is not None:
            slot, one = kv.prefilling
            rows[slot] = list(one.prefill_ids)
            kv.lengths[slot] = one.prefilled = len(one.prefill_ids)
            moves = kv.promote()
        elif step == "chunk" and kv.prefilling is not None:
            slot, one = kv.prefilling
            one.prefilled = min(one.prefilled + BLOCK_TOKENS, len(one.prefill_ids))
            rows[slot] = list(one.prefill_ids[: one.prefilled])
            kv.lengths[slot] = one.prefilled
        elif step == "drop" and kv.prefilling is not None:
            kv.release_prefilling()
        elif isinstance(step, set):
            moves = kv.release([slot for slot in step if slot < kv.active])
        for move in moves:
            match move:
                case CopyRows(source, target, length):
                    rows[target] = rows[source][:length]
                case SwapRows(first, second, first_length, second_length):
                    assert (len(rows[first]) >= first_length, len(rows[second]) >= second_length) == (True, True)
                    rows[first], rows[second] = rows[second][:second_length], rows[first][:first_length]
        for slot in range(SLOTS):
            held = list(kv._held_ids(slot))
            assert rows[slot][: len(held)] == held, f"slot {slot}"
        busy = kv.decoding() + ([kv.prefilling[1]] if kv.prefilling else [])
        assert len({id(one) for one in busy}) == len(busy) == SLOTS - kv.free
        assert kv.prefilling is None or kv.prefilling[0] >= kv.active
        assert len(kv.retained()) <= kv.free


def test_rows_in_use_and_rows_kept_are_counted_apart() -> None:
    kv, _ = decoding(3)
    assert kv.rows() == (1 + 2 + 3, 0)
    kept = sequence(list(range(1, 2 * BLOCK_TOKENS)))
    kv.begin(kept)
    kv.lengths[3] = len(kept.prompt_ids)
    assert kv.rows() == (1 + 2 + 3 + 2 * BLOCK_TOKENS - 1, 0)
    kv.release_prefilling()
    assert kv.rows() == (1 + 2 + 3, 2 * BLOCK_TOKENS - 1)
