"""The table of slots: dense decode batches, whoever comes and goes, and moves that keep every row with its sequence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.engine.kv_slots import KvSlots, SlotMove
from nodes.engine.sampling import SamplingParams
from nodes.engine.sequence import Sequence
from tests.unit.test_sequence import LetterDecoder

SLOTS = 6


def sequence() -> Sequence:
    return Sequence([1], SamplingParams(), LetterDecoder(), eos_ids=frozenset(), capacity=8, deadline=0.0)


def decoding(count: int) -> tuple[KvSlots, list[Sequence]]:
    """`count` sequences that decode; the one in slot i has i + 1 rows and feeds token 10 + i."""
    kv = KvSlots(SLOTS)
    sequences = [sequence() for _ in range(count)]
    for slot, one in enumerate(sequences):
        assert kv.begin(one) == slot
        kv.lengths[slot] = slot + 1
        kv.next_ids[slot] = 10 + slot
        assert kv.promote() is None
    return kv, sequences


@pytest.mark.parametrize(
    ("leaving", "moves", "order"),
    [
        ([], [], [0, 1, 2, 3]),
        ([3], [], [0, 1, 2]),
        ([0], [SlotMove(3, 0, 4)], [3, 1, 2]),
        ([0, 1], [SlotMove(2, 0, 3), SlotMove(3, 1, 4)], [2, 3]),
        ([3, 1], [SlotMove(2, 1, 3)], [0, 2]),
        ([2, 0, 3], [SlotMove(1, 0, 2)], [1]),
        ([0, 1, 2, 3], [], []),
    ],
    ids=["none", "the last", "the first", "both fill", "one fills", "one stays", "all"],
)
def test_who_stays_closes_the_holes(leaving: list[int], moves: list[SlotMove], order: list[int]) -> None:
    kv, sequences = decoding(4)
    assert kv.release(leaving) == moves
    assert kv.decoding() == [sequences[i] for i in order]
    assert kv.lengths[: kv.active].tolist() == [i + 1 for i in order]
    assert kv.next_ids[: kv.active].tolist() == [10 + i for i in order]
    assert kv.free == SLOTS - len(order)


def test_a_prefilled_sequence_joins_in_place() -> None:
    kv, _ = decoding(2)
    one = sequence()
    assert kv.begin(one) == 2
    assert kv.prefilling == (2, one)
    assert (kv.active, kv.free) == (2, SLOTS - 3)
    assert kv.promote() is None
    assert kv.decoding()[-1] is one


def test_a_prefilled_sequence_moves_when_the_batch_shrank_meanwhile() -> None:
    kv, _ = decoding(3)
    one = sequence()
    slot = kv.begin(one)
    kv.lengths[slot] = 7
    kv.release([0, 1])
    assert kv.promote() == SlotMove(3, 1, 7)
    assert kv.decoding()[1] is one
    assert kv.prefilling is None


def test_a_sequence_that_leaves_in_prefill_frees_its_slot() -> None:
    kv, _ = decoding(2)
    kv.begin(sequence())
    kv.release_prefilling()
    assert (kv.active, kv.free, kv.prefilling) == (2, SLOTS - 2, None)


@given(st.lists(st.one_of(st.just("begin"), st.just("promote"), st.just("drop"), st.sets(st.integers(0, SLOTS - 1)))))
def test_rows_stay_with_their_sequence_whatever_happens(steps: list[str | set[int]]) -> None:
    kv = KvSlots(SLOTS)
    rows: list[Sequence | None] = [None] * SLOTS  # whose rows a slot holds
    for step in steps:
        moves: list[SlotMove] = []
        if step == "begin" and kv.prefilling is None and kv.free:
            one = sequence()
            rows[kv.begin(one)] = one
        elif step == "promote" and kv.prefilling is not None:
            move = kv.promote()
            moves = [] if move is None else [move]
        elif step == "drop" and kv.prefilling is not None:
            kv.release_prefilling()
        elif isinstance(step, set):
            moves = kv.release([slot for slot in step if slot < kv.active])
        for move in moves:
            rows[move.target] = rows[move.source]
        assert rows[: kv.active] == kv.decoding()
        assert kv.prefilling is None or (kv.prefilling[0] >= kv.active and rows[kv.prefilling[0]] is kv.prefilling[1])
        assert len({id(one) for one in kv.decoding()}) == kv.active
