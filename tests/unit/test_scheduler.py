"""The scheduler without an engine: plans executed by the fake session, or by nobody."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nodes.engine.errors import DeadlinePassed, EngineFault, QueueFull
from nodes.engine.kv_slots import CopyRows, SwapRows
from nodes.engine.sampler import INVALID, sample
from nodes.engine.sampling import Sampled, SamplingParams
from nodes.engine.scheduler import (
    LONE_PREFILL_S,
    RESUMED_BLOCKS,
    RESUMED_PER_SLOT,
    Failed,
    Outcome,
    Plan,
    Progress,
    Scheduler,
)
from nodes.engine.sequence import Phase, Sequence
from nodes.witness import HANG_MIN_S
from tests.unit.fake_session import CAPACITY, FakeSession, greedy
from tests.unit.test_sequence import LetterDecoder

SLOTS = 3
QUEUE_LIMIT = 2
FAR = 1e9
NOW = 100.0


def sequence(
    prompt_tokens: int = 3,
    deadline: float = FAR,
    params: SamplingParams | None = None,
    asker: str = "",
    generated_ids: tuple[int, ...] = (),
    capacity: int = CAPACITY,
) -> Sequence:
    return Sequence(
        [10 + i % 90 for i in range(prompt_tokens)],
        params or greedy(),
        LetterDecoder(),
        eos_ids=frozenset(),
        capacity=capacity,
        deadline=deadline,
        generated_ids=generated_ids,
        fairness_id=asker,
    )


def execute(plan: Plan, scheduler: Scheduler, session: FakeSession) -> list[Outcome]:
    """What an engine does with a plan."""
    for move in plan.moves:
        match move:
            case CopyRows(source, target, length):
                session.copy(source, target, length)
            case SwapRows(first, second, first_length, second_length):
                session.swap(first, second, first_length, second_length)
    tokens: list[Sampled] = []
    if plan.decode:
        count = len(plan.decode)
        logits = session.decode(scheduler.kv.next_ids[:count], scheduler.kv.lengths[:count])
        tokens = sample(logits, [s.sampling for s in plan.decode])
    first_token = None
    for chunk in plan.prefill:
        logits = session.prefill(chunk.slot, np.array(chunk.token_ids), chunk.start)
        if chunk.is_last:
            first_token = sample(logits[None], [chunk.sequence.sampling])[0]
    return scheduler.commit(plan, tokens, first_token)


def tick(scheduler: Scheduler, now: float = NOW, token: int = 5, prefill_s: float = 0.0) -> Plan:
    """One tick in which every token is `token`."""
    plan = scheduler.plan(now)
    is_last = any(chunk.is_last for chunk in plan.prefill)
    scheduler.commit(plan, [Sampled(token)] * len(plan.decode), Sampled(token) if is_last else None, prefill_s)
    return plan


def spans(plan: Plan) -> list[tuple[int, int]]:
    """(start, end) of each of its chunks."""
    return [(chunk.start, chunk.start + len(chunk.token_ids)) for chunk in plan.prefill]


def chunks(prompt_tokens: int) -> list[tuple[int, int]]:
    """(start, end) of each chunk of a prompt."""
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    scheduler.submit(sequence(prompt_tokens))
    found = []
    while planned := tick(scheduler).prefill:
        (chunk,) = planned
        found.append((chunk.start, chunk.start + len(chunk.token_ids)))
        assert chunk.is_last == (found[-1][1] == prompt_tokens)
    return found


@pytest.mark.parametrize(
    ("prompt_tokens", "expected"),
    [
        (1, [(0, 1)]),
        (64, [(0, 64)]),
        (65, [(0, 64), (64, 65)]),
        (200, [(0, 64), (64, 128), (128, 192), (192, 200)]),
    ],
)
def test_prompts_are_cut_at_multiples_of_64(prompt_tokens: int, expected: list[tuple[int, int]]) -> None:
    assert chunks(prompt_tokens) == expected


def test_a_long_prompt_delays_the_others_by_one_chunk_a_token() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    first = sequence()
    scheduler.submit(first)
    tick(scheduler)
    scheduler.submit(sequence(250))
    for _ in range(4):
        plan = tick(scheduler)
        assert list(plan.decode) == [first]
        assert len(plan.prefill) == 1
    assert len(tick(scheduler).decode) == 2


@pytest.mark.parametrize(
    ("block_s", "second"),
    [
        (0.0, (64, 128)),
        (LONE_PREFILL_S / 9, (64, 320)),
        (LONE_PREFILL_S / 3, (64, 256)),
        (LONE_PREFILL_S / 2.5, (64, 192)),
        (LONE_PREFILL_S * 3, (64, 128)),
    ],
    ids=["not measured", "fast", "less fast", "slow", "very slow"],
)
def test_a_prompt_that_nobody_waits_for_has_chunks_as_large_as_their_time_allows(
    block_s: float, second: tuple[int, int]
) -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT, chunk_tokens_max=256)
    scheduler.submit(sequence(600, capacity=1024))
    assert spans(tick(scheduler, prefill_s=block_s)) == [(0, 64)]
    assert spans(tick(scheduler)) == [second]


def test_several_blocks_at_once_make_no_entry_believe_that_the_node_hangs() -> None:
    assert 4 * LONE_PREFILL_S <= HANG_MIN_S


def test_a_rest_that_takes_long_says_nothing_of_a_blocks_time() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT, chunk_tokens_max=256)
    scheduler.submit(sequence(70, params=greedy(1), capacity=1024))
    tick(scheduler, prefill_s=LONE_PREFILL_S / 9)
    tick(scheduler, prefill_s=LONE_PREFILL_S / 9)
    scheduler.submit(
        Sequence(
            [400 - i % 90 for i in range(300)],
            greedy(),
            LetterDecoder(),
            eos_ids=frozenset(),
            capacity=1024,
            deadline=FAR,
        )
    )
    assert spans(tick(scheduler)) == [(0, 256)]


@pytest.mark.parametrize(
    ("prompt_tokens", "cuts"),
    [(65, [(0, 64), (64, 65)]), (66, [(0, 66)]), (257, [(0, 256)]), (193, [(0, 192), (192, 193)])],
)
def test_a_single_token_of_a_block_is_a_chunk_of_its_own(prompt_tokens: int, cuts: list[tuple[int, int]]) -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT, chunk_tokens_max=256)
    scheduler.submit(sequence(64, params=greedy(1), capacity=1024))
    tick(scheduler, prefill_s=1e-3)
    scheduler.submit(
        Sequence(
            [400 - i % 90 for i in range(prompt_tokens)],
            greedy(),
            LetterDecoder(),
            eos_ids=frozenset(),
            capacity=1024,
            deadline=FAR,
        )
    )
    assert spans(tick(scheduler)) == cuts


def test_a_beginning_that_lacks_one_token_of_a_block_is_filled_up_first() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT, chunk_tokens_max=256)
    scheduler.submit(sequence(127, params=greedy(1), capacity=1024))
    for _ in range(3):
        tick(scheduler, prefill_s=1e-3)
    scheduler.submit(sequence(300, capacity=1024))
    assert spans(tick(scheduler)) == [(127, 128), (128, 300)]


def test_beside_others_and_after_a_cached_beginning_large_chunks_end_at_blocks_too() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT, chunk_tokens_max=256)
    scheduler.submit(sequence(100, params=greedy(3), capacity=1024))
    tick(scheduler, prefill_s=1e-3)
    assert spans(tick(scheduler, prefill_s=1e-3)) == [(64, 100)]
    scheduler.submit(sequence(700, capacity=1024))  # begins like the other, which still runs
    assert spans(tick(scheduler, prefill_s=1e-3)) == [(100, 128)]
    assert spans(tick(scheduler, prefill_s=1e-3)) == [(128, 192)]
    assert [spans(tick(scheduler, prefill_s=1e-3)) for _ in range(3)] == [[(192, 448)], [(448, 700)], []]


def test_an_answer_begun_elsewhere_has_one_large_chunk_a_token_where_results_are_exact() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT, chunk_tokens_max=256)
    scheduler.submit(sequence())
    tick(scheduler)
    scheduler.submit(sequence(70, params=greedy(400), generated_ids=tuple(range(290)), capacity=512))
    assert [spans(tick(scheduler)) for _ in range(3)] == [[(0, 256)], [(256, 360)], []]


def test_an_answer_begun_elsewhere_gets_several_chunks_a_token_cut_like_any_other() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    running, resumed = sequence(), sequence(70, params=greedy(400), generated_ids=tuple(range(290)), capacity=512)
    scheduler.submit(running)
    tick(scheduler)
    scheduler.submit(resumed)
    ends = []
    while planned := tick(scheduler).prefill:
        assert {chunk.sequence for chunk in planned} == {resumed}
        assert len(planned) <= RESUMED_BLOCKS
        ends.append([chunk.start + len(chunk.token_ids) for chunk in planned])
    assert ends == [[64, 128, 192, 256], [320, 360]]
    assert list(tick(scheduler).decode) == [running, resumed]


@pytest.mark.parametrize("how", ["cancelled", "late"])
def test_an_answer_begun_elsewhere_leaves_after_its_first_chunks(how: str) -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    resumed = sequence(70, deadline=NOW + 1, params=greedy(400), generated_ids=tuple(range(290)), capacity=512)
    scheduler.submit(resumed)
    plan = scheduler.plan(NOW)
    if how == "cancelled":
        scheduler.cancel(resumed)
    scheduler.commit(plan, [], None)
    assert scheduler.kv.lengths[plan.prefill[0].slot] == RESUMED_BLOCKS * 64
    expired = scheduler.plan(NOW + 1).expired
    assert len(expired) == (how == "late")
    assert not scheduler.plan(NOW + 1).has_steps
    assert (scheduler.load().free_slots, scheduler.load().queued_tokens) == (SLOTS, 0)


def test_prompts_are_prefilled_in_order_of_arrival() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    sequences = [sequence() for _ in range(SLOTS)]
    for one in sequences:
        scheduler.submit(one)
    begun = [chunk.sequence for _ in range(SLOTS) for chunk in tick(scheduler).prefill]
    assert begun == sequences


def test_requests_join_and_leave_between_steps() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    scheduler.submit(sequence(params=greedy(2)))
    scheduler.submit(sequence(params=greedy(6)))
    sizes = [len(tick(scheduler).decode) for _ in range(4)]
    scheduler.submit(sequence(params=greedy(3)))
    sizes += [len(tick(scheduler).decode) for _ in range(5)]
    assert sizes == [0, 1, 1, 1, 1, 2, 2, 0, 0]
    assert not scheduler.plan(NOW).has_steps


def test_the_queue_is_bounded_and_a_free_slot_counts_as_room() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    for _ in range(SLOTS + QUEUE_LIMIT):
        scheduler.submit(sequence())
    load = scheduler.load()
    assert (load.active, load.queued, load.free_slots) == (SLOTS, QUEUE_LIMIT, 0)
    late = sequence()
    with pytest.raises(QueueFull) as raised:
        scheduler.submit(late)
    assert (raised.value.queued, raised.value.limit) == (QUEUE_LIMIT, QUEUE_LIMIT)
    assert scheduler.load() == load
    tick(scheduler)
    with pytest.raises(QueueFull):
        scheduler.submit(late)


def test_an_asker_who_fills_the_queue_gives_up_its_newest_to_one_who_has_no_place() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    placed = [sequence(asker="much") for _ in range(SLOTS)]
    for one in placed:
        assert scheduler.submit(one) is None
        tick(scheduler)
    older, newest = sequence(asker="much"), sequence(asker="much")
    assert scheduler.submit(older) is None
    assert scheduler.submit(newest) is None
    load = scheduler.load()
    other = sequence(asker="little")
    assert scheduler.submit(other) is newest
    assert newest.phase is Phase.ENDED
    assert scheduler.load() == load
    for asker in ("much", "little", "third"):  # one place each: nobody holds too many
        with pytest.raises(QueueFull):
            scheduler.submit(sequence(asker=asker))
    assert older.phase is other.phase is Phase.WAITING
    scheduler.cancel(newest)  # its reader may still close the stream
    assert scheduler.load() == load


def test_without_a_queue_as_many_are_taken_as_there_are_slots() -> None:
    scheduler = Scheduler(SLOTS, queue_limit=0)
    for _ in range(SLOTS):
        scheduler.submit(sequence())
        tick(scheduler)
    with pytest.raises(QueueFull):
        scheduler.submit(sequence())


@pytest.mark.parametrize("ticks", [0, 1, 2, 5], ids=["waiting", "in prefill", "at the last chunk", "decoding"])
def test_a_cancelled_sequence_is_gone_at_the_next_plan_and_gives_nothing_more(ticks: int) -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    one = sequence(100)
    scheduler.submit(one)
    for _ in range(ticks):
        tick(scheduler)
    scheduler.cancel(one)
    scheduler.cancel(one)
    assert not scheduler.plan(NOW).has_steps
    assert scheduler.load().active == scheduler.load().queued_tokens == 0
    assert scheduler.kv.free == SLOTS
    assert one.phase is Phase.ENDED


def test_a_sequence_cancelled_during_the_step_gives_no_event() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    stays, leaves = sequence(), sequence()
    for one in (stays, leaves):
        scheduler.submit(one)
        tick(scheduler)
    plan = scheduler.plan(NOW)
    scheduler.cancel(leaves)
    outcomes = scheduler.commit(plan, [Sampled(5)] * len(plan.decode), None)
    assert [outcome.sequence for outcome in outcomes] == [stays]


def test_cancelling_a_queued_request_leaves_the_others_alone() -> None:
    scheduler = Scheduler(1, QUEUE_LIMIT)
    running, queued, last = sequence(), sequence(), sequence()
    for one in (running, queued, last):
        scheduler.submit(one)
    tick(scheduler)
    scheduler.cancel(queued)
    assert list(tick(scheduler).decode) == [running]
    scheduler.cancel(running)
    plan = tick(scheduler)
    assert [chunk.sequence for chunk in plan.prefill] == [last]


@pytest.mark.parametrize("ticks", [1, 2, 5], ids=["in prefill", "at the last chunk", "decoding"])
def test_a_late_running_sequence_ends_and_the_others_go_on(ticks: int) -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    late, other = sequence(100, deadline=NOW + 1), sequence()
    scheduler.submit(late)
    scheduler.submit(other)
    for _ in range(ticks):
        tick(scheduler)
    plan = tick(scheduler, NOW + 1)
    assert [(failed.sequence, type(failed.error)) for failed in plan.expired] == [(late, DeadlinePassed)]
    assert other in [*plan.decode, *(chunk.sequence for chunk in plan.prefill)]
    assert scheduler.load().active == 1


def test_a_late_waiting_sequence_is_dropped_before_it_gets_a_slot() -> None:
    scheduler = Scheduler(1, QUEUE_LIMIT)
    running, late, patient = sequence(), sequence(deadline=NOW + 1), sequence(deadline=NOW + 2)
    for one in (running, late, patient):
        scheduler.submit(one)
    assert tick(scheduler).expired == []
    assert [failed.sequence for failed in tick(scheduler, NOW + 1).expired] == [late]
    assert tick(scheduler, NOW + 1).expired == []
    assert [failed.sequence for failed in tick(scheduler, NOW + 2).expired] == [patient]
    assert scheduler.load().queued == 0


@pytest.mark.parametrize("how", ["finished", "cancelled"])
def test_a_slot_counts_as_free_as_soon_as_its_sequence_is_over(how: str) -> None:
    scheduler = Scheduler(1, queue_limit=0)
    one = sequence(params=greedy(1 if how == "finished" else 9))
    scheduler.submit(one)
    tick(scheduler)
    if how == "cancelled":
        scheduler.cancel(one)
        scheduler.cancel(one)
    assert scheduler.load().free_slots == 1
    other = sequence()
    scheduler.submit(other)
    with pytest.raises(QueueFull):
        scheduler.submit(sequence())
    assert (scheduler.load().active, scheduler.load().free_slots) == (1, 0)
    plan = scheduler.plan(NOW)
    assert [chunk.sequence for chunk in plan.prefill] == [other]


def test_queued_tokens_are_the_prompt_tokens_still_to_prefill() -> None:
    scheduler = Scheduler(1, QUEUE_LIMIT)
    first, second = sequence(100), sequence(70)
    scheduler.submit(first)
    scheduler.submit(second)
    seen = [scheduler.load().queued_tokens]
    for _ in range(2):
        tick(scheduler)
        seen.append(scheduler.load().queued_tokens)
    scheduler.cancel(second)
    assert [*seen, scheduler.load().queued_tokens] == [170, 106, 70, 0]


def test_logits_that_are_no_numbers_end_their_sequence_alone() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    bad, good = sequence(), sequence()
    for one in (bad, good):
        scheduler.submit(one)
        tick(scheduler)
    plan = scheduler.plan(NOW)
    outcomes = scheduler.commit(plan, [Sampled(INVALID), Sampled(5)], None)
    assert isinstance(outcomes[0], Failed)
    assert isinstance(outcomes[0].error, EngineFault)
    assert isinstance(outcomes[1], Progress)
    assert list(scheduler.plan(NOW).decode) == [good]


def test_abandoned_sequences_leave_nothing_behind() -> None:
    scheduler = Scheduler(1, QUEUE_LIMIT)
    sequences = [sequence(100) for _ in range(3)]
    for one in sequences:
        scheduler.submit(one)
    tick(scheduler)
    scheduler.abandon()
    load = scheduler.load()
    assert (load.active, load.queued, load.queued_tokens) == (0, 0, 0)
    for one in sequences:
        scheduler.cancel(one)
    assert not scheduler.plan(NOW).has_steps


@pytest.mark.parametrize("seed", range(8))
def test_any_traffic_gives_each_sequence_what_it_gets_alone(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 63, 64, 65, rng.randrange(1, 200)]) for _ in range(14)]
    params = [
        SamplingParams(temperature=rng.choice([0.0, 1.0]), top_p=0.9, seed=i, max_tokens=rng.randrange(1, 25))
        for i in range(14)
    ]

    def alone(index: int) -> list[int]:
        scheduler, session = Scheduler(1, 0), FakeSession(1)
        one = sequence(lengths[index], params=params[index])
        scheduler.submit(one)
        while (plan := scheduler.plan(NOW)).has_steps:
            execute(plan, scheduler, session)
        return one.generated_ids

    scheduler, session = Scheduler(SLOTS, 99), FakeSession(SLOTS)
    sequences = [sequence(length, params=options) for length, options in zip(lengths, params, strict=True)]
    waiting, cancelled = list(sequences), set()
    while waiting or scheduler.load().active:
        if waiting and rng.random() < 0.3:
            scheduler.submit(waiting.pop(0))
        if rng.random() < 0.03:
            victim = rng.choice(sequences)
            if victim not in waiting and victim.phase is not Phase.ENDED:
                scheduler.cancel(victim)
                cancelled.add(victim)
        execute(scheduler.plan(NOW), scheduler, session)
    for index, one in enumerate(sequences):
        expected = alone(index)
        assert one.generated_ids == (expected[: len(one.generated_ids)] if one in cancelled else expected)
    assert scheduler.load().free_slots == SLOTS
    assert scheduler.load().queued_tokens == 0


def test_what_another_engine_has_begun_finds_room_beyond_a_full_queue_and_goes_first() -> None:
    scheduler = Scheduler(SLOTS, QUEUE_LIMIT)
    for _ in range(SLOTS + QUEUE_LIMIT):
        scheduler.submit(sequence())
    with pytest.raises(QueueFull):
        scheduler.submit(sequence())
    resumed = [sequence(generated_ids=(5, 6)) for _ in range(RESUMED_PER_SLOT * SLOTS)]
    for one in resumed:
        assert scheduler.submit(one) is None
    with pytest.raises(QueueFull) as refusal:
        scheduler.submit(sequence(generated_ids=(5, 6)))
    assert refusal.value.limit == QUEUE_LIMIT + RESUMED_PER_SLOT * SLOTS
    for _ in range(SLOTS):
        tick(scheduler)
    assert [one.phase for one in resumed[: SLOTS + 1]] == [
        *([Phase.DECODING] * (SLOTS - 1)),
        Phase.PREFILLING,
        Phase.WAITING,
    ]
