"""Tokens from logits: the distribution they should have, and that the same arguments give the same token."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.engine import sampler
from nodes.engine.logit_rows import BLOCK_LOGITS, LogitBlocks
from nodes.engine.noise import noise_key, noise_of
from nodes.engine.sampler import INVALID
from nodes.engine.sampling import TOP_LOGPROBS_MAX, Sampled, SamplingParams, SamplingState

VOCABULARY = 50


def sample(logits: npt.NDArray[np.float32], params: Sequence[SamplingParams], positions: Iterable[int]) -> list[int]:
    """The tokens chosen for rows at these positions of otherwise empty answers."""
    states = [SamplingState(p, range(position), frozenset()) for p, position in zip(params, positions, strict=True)]
    return [sampled.token_id for sampled in sampler.sample(logits, states)]


DRAWS = 20_000
# The 1 - 1e-6 quantile of chi-square with few degrees of freedom: the seeds are fixed, so this never flickers.
CHI_SQUARE_MAX = {5: 38.3, 9: 45.1, 19: 63.0}


def logits_of(probabilities: list[float]) -> npt.NDArray[np.float32]:
    return np.log(np.array(probabilities, np.float64)).astype(np.float32)


def draw(row: npt.NDArray[np.float32], count: int, **params: float) -> npt.NDArray[np.int64]:
    """How often each token is drawn over `count` positions of one seed."""
    options = SamplingParams(seed=11, **params)  # type: ignore[arg-type]
    tokens = sample(np.tile(row, (count, 1)), [options] * count, range(count))
    return np.bincount(tokens, minlength=len(row))


def chi_square(counts: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_are_distributed_as_the_softmax(temperature: float) -> None:
    row = np.random.default_rng(3).normal(0, 1, 20).astype(np.float32)
    expected = np.exp(row.astype(np.float64) / temperature)
    assert chi_square(draw(row, DRAWS, temperature=temperature), expected / expected.sum()) < CHI_SQUARE_MAX[19]


def test_seeds_draw_independently_of_each_other() -> None:
    row = logits_of([0.1] * 10)
    seeds = [SamplingParams(seed=seed) for seed in range(DRAWS)]
    tokens = sample(np.tile(row, (DRAWS, 1)), seeds, [7] * DRAWS)
    assert chi_square(np.bincount(tokens, minlength=10), np.full(10, 0.1)) < CHI_SQUARE_MAX[9]
    pairs = np.bincount([(a * 10 + b) % 20 for a, b in itertools.pairwise(tokens)], minlength=20)
    assert chi_square(pairs, np.full(20, 0.05)) < CHI_SQUARE_MAX[19]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [1]), (0.4, [1]), (0.41, [1, 3]), (0.7, [1, 3]), (0.85, [0, 1, 3]), (0.999, [0, 1, 2, 3, 4])],
)
def test_top_p_draws_from_the_fewest_tokens_that_reach_it(top_p: float, kept: list[int]) -> None:
    row = logits_of([0.15, 0.4, 0.1, 0.3, 0.05])
    counts = draw(row, 2_000, temperature=1.0, top_p=top_p - 1e-4)
    assert np.flatnonzero(counts).tolist() == kept


def test_top_p_keeps_the_proportions_of_what_it_keeps() -> None:
    row = logits_of([0.05, 0.25, 0.2, 0.15, 0.12, 0.1, 0.03, 0.1])
    counts = draw(row, DRAWS, temperature=1.0, top_p=0.9)
    kept = np.array([0.25, 0.2, 0.15, 0.12, 0.1, 0.1])
    assert chi_square(counts[[1, 2, 3, 4, 5, 7]], kept / kept.sum()) < CHI_SQUARE_MAX[5]
    assert counts[[0, 6]].tolist() == [0, 0]


@given(seed=st.integers(0, 2**32), top_p=st.floats(0.01, 0.999))
def test_the_nucleus_is_that_of_a_full_sort(seed: int, top_p: float) -> None:
    row = np.random.default_rng(seed).normal(0, 2, VOCABULARY).astype(np.float32)
    probabilities = np.exp(row.astype(np.float64))
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    nucleus = set(order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1].tolist())
    options = [SamplingParams(seed=seed, top_p=top_p)] * 40
    drawn = sample(np.tile(row, (40, 1)), options, range(40))
    assert set(drawn) <= nucleus


@given(seed=st.integers(0, 2**32), temperature=st.floats(0.05, 2.0))
def test_the_best_score_of_all_tokens_wins(seed: int, temperature: float) -> None:
    row = np.random.default_rng(seed).normal(0, 12, VOCABULARY).astype(np.float32)
    scores = row.astype(np.float64) / temperature + noise_of(VOCABULARY).all(noise_key(seed, 3))
    assert sample(row[None], [SamplingParams(seed=seed, temperature=temperature)], [3]) == [int(scores.argmax())]


def test_a_token_is_the_same_in_every_batch_and_on_every_machine() -> None:
    rows = np.random.default_rng(5).normal(0, 2, (6, VOCABULARY)).astype(np.float32)
    params = [SamplingParams(seed=-3 + i, top_p=0.5 + i / 10) for i in range(6)]
    together = sample(rows, params, range(100, 106))
    assert together == [sample(rows[i : i + 1], [params[i]], [100 + i])[0] for i in range(6)]
    assert together == [13, 8, 35, 35, 20, 24]  # all nodes of a mesh must agree, or a failover changes the text


@pytest.mark.parametrize(
    ("params", "row", "token"),
    [
        (SamplingParams(temperature=0), [1, 3, 2], 1),
        (SamplingParams(temperature=0), [1, 3, 3], 1),
        (SamplingParams(temperature=1e-9), [1, 3, 2.99], 1),
        (SamplingParams(temperature=0), [-np.inf, -5, -np.inf], 1),
        (SamplingParams(), [-np.inf, -5, -np.inf], 1),
        (SamplingParams(top_p=1e-9), [1, 3, 2.9], 1),
        (SamplingParams(temperature=0), [1, np.nan, 2], INVALID),
        (SamplingParams(), [np.nan] * 3, INVALID),
        (SamplingParams(), [1, np.inf, 2], INVALID),
        (SamplingParams(), [-np.inf] * 3, INVALID),
    ],
    ids=[
        "greedy",
        "lowest id of a tie",
        "tiny temperature is greedy",
        "greedy over masked logits",
        "sampled over masked logits",
        "tiny top_p is greedy",
        "one nan",
        "all nan",
        "infinite",
        "all masked",
    ],
)
def test_special_rows(params: SamplingParams, row: list[float], token: int) -> None:
    assert sample(np.array([row], np.float32), [params], [0]) == [token]


def test_at_a_high_temperature_a_token_far_below_the_best_one_has_its_share() -> None:
    row = np.array([0.0, -36.0], np.float32)
    counts = draw(row, 2_000, temperature=20.0)
    assert counts[1] > 200


def test_answers_to_one_prompt_differ_by_their_choice() -> None:
    row = logits_of([0.1] * 10)
    choices = [SamplingParams(seed=4, choice=choice) for choice in range(DRAWS)]
    tokens = sample(np.tile(row, (DRAWS, 1)), choices, [7] * DRAWS)
    assert chi_square(np.bincount(tokens, minlength=10), np.full(10, 0.1)) < CHI_SQUARE_MAX[9]
    assert sample(row[None], [SamplingParams(seed=4, choice=0)], [7]) == sample(
        row[None], [SamplingParams(seed=4)], [7]
    )


EOS = frozenset({2, 5})


def choose(row: list[float], answer: Sequence[int] = (), **params: object) -> int:
    """The token that greedy sampling, with these params, chooses after `answer` to the prompt [0, 1]."""
    state = SamplingState(SamplingParams(temperature=0.0, **params), [0, 1], EOS)  # type: ignore[arg-type]
    for token_id in answer:
        state.accept(token_id)
    return sampler.sample(np.array([row], np.float32), [state])[0].token_id


@pytest.mark.parametrize(
    ("answer", "ignore_eos", "token"),
    [([], False, 4), ([3], False, 4), ([3, 3], False, 2), ([], True, 2)],
    ids=["none yet", "one too few", "enough", "an end that is ignored is a token like any other"],
)
def test_no_end_of_sequence_token_comes_before_min_tokens(answer: list[int], ignore_eos: bool, token: int) -> None:
    row = [0.0, 1.0, 9.0, 2.0, 3.0, 8.0]
    assert choose(row, answer, min_tokens=2, ignore_eos=ignore_eos) == token


def test_a_row_of_nothing_but_ends_before_min_tokens_is_invalid() -> None:
    assert choose([-np.inf, -np.inf, 1.0, -np.inf, -np.inf, 1.0], min_tokens=1) == INVALID


@pytest.mark.parametrize(
    ("params", "answer", "token"),
    [
        ({"logit_bias": ((3, 2.0),)}, [], 3),
        ({"logit_bias": ((4, -100.0), (99, 50.0), (-1, 50.0))}, [], 0),
        ({"presence_penalty": 2.0}, [4], 0),
        ({"presence_penalty": 0.4}, [4, 4, 4], 4),
        ({"frequency_penalty": 0.5}, [4, 4, 4], 0),
        ({"repetition_penalty": 3.0}, [4], 3),
        ({"presence_penalty": -2.0}, [3], 3),
        ({"logit_bias": ((3, 2.0),), "presence_penalty": 2.0}, [3], 4),
    ],
    ids=[
        "bias",
        "bias of ids that the vocabulary lacks does nothing",
        "presence",
        "presence counts once",
        "frequency counts each",
        "repetition counts the prompt too",
        "a negative penalty is a reward",
        "bias and penalty add up",
    ],
)
def test_changed_logits_change_the_token(params: dict[str, object], answer: list[int], token: int) -> None:
    assert choose([2.5, 0.0, -9.0, 2.0, 3.0, -9.0], answer, **params) == token


def test_bias_comes_before_the_repetition_penalty_and_min_tokens_before_neither() -> None:
    """A biased negative logit is divided, for it is positive by then; a bias does not bring an excluded end back."""
    row = [-1.0, -9.0, 0.0, 0.9, -9.0, -9.0]
    assert choose(row, repetition_penalty=2.0, logit_bias=((0, 3.0), (2, 50.0)), min_tokens=1) == 0
    assert choose(row, repetition_penalty=4.0, logit_bias=((0, 3.0), (2, 50.0)), min_tokens=1) == 3


def test_logprobs_are_the_models_own_whatever_the_request_changes() -> None:
    row = np.random.default_rng(2).normal(0, 3, VOCABULARY).astype(np.float32)
    expected = row - np.log(np.exp(row.astype(np.float64)).sum())
    best = np.argsort(-row)[:3]
    params = SamplingParams(
        temperature=1.7, top_k=20, logit_bias=((7, 30.0),), presence_penalty=1.0, logprobs=3, min_tokens=4
    )
    state = SamplingState(params, [1], EOS)
    state.accept(int(best[0]))
    sampled = sampler.sample(row[None].copy(), [state])[0]
    assert sampled.token_id == 7
    assert sampled.logprobs is not None
    assert sampled.logprobs.token_id == 7
    assert sampled.logprobs.logprob == pytest.approx(expected[7], abs=1e-5)
    assert [token_id for token_id, _ in sampled.logprobs.top] == best.tolist()
    assert [logprob for _, logprob in sampled.logprobs.top] == pytest.approx(expected[best].tolist(), abs=1e-5)


ASKED = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.5]),
    top_p=st.sampled_from([1.0, 0.95, 0.3]),
    top_k=st.sampled_from([0, 0, 1, 40, 700]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
    seed=st.integers(0, 2**16),
    presence_penalty=st.sampled_from([0.0, 0.0, 5.0]),
    logit_bias=st.sampled_from([(), (), ((3, 100.0),)]),
    logprobs=st.sampled_from([None, None, 3]),
)


@given(
    seed=st.integers(0, 2**32),
    asked=st.lists(ASKED, min_size=1, max_size=20),
    blocks=st.integers(1, 90),
    spread=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    broken=st.sampled_from([None, None, np.nan, np.inf, -np.inf, 3e38]),
)
@settings(deadline=None, max_examples=200)
def test_what_is_known_of_blocks_changes_no_token(
    seed: int, asked: list[SamplingParams], blocks: int, spread: float, broken: float | None
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(0, spread, (len(asked), blocks * BLOCK_LOGITS)).astype(np.float32)
    if broken is not None:  # in several places, with both signs where it has one: a sum of large ones is no number
        for sign in (1, -1, 1, -1)[: rng.integers(1, 5)]:
            rows[rng.integers(len(rows)), rng.integers(rows.shape[1])] = sign * broken

    def chosen(logits: npt.NDArray[np.float32], known: LogitBlocks | None) -> list[Sampled]:
        states = [SamplingState(params, [1], EOS) for params in asked]
        for state in states:
            state.accept(2)
        with np.errstate(over="ignore", invalid="ignore"):
            return sampler.sample(logits, states, known)

    together = rows.copy()
    with np.errstate(invalid="ignore", over="ignore"):
        # As the graph's, these pass over what is no number.
        maxima = np.fmax.reduce(together.reshape(len(rows), -1, BLOCK_LOGITS), axis=2)
        known = LogitBlocks(together, maxima, together.sum(axis=1))
    assert chosen(together, known) == chosen(rows.copy(), None)


@given(seed=st.integers(0, 2**32), top=st.integers(0, 25), spread=st.floats(0.01, 30))
@settings(deadline=None, max_examples=30)
def test_logprobs_of_all_tokens_sum_to_one(seed: int, top: int, spread: float) -> None:
    rows = np.random.default_rng(seed).normal(0, spread, (VOCABULARY, VOCABULARY)).astype(np.float32)
    rows[:] = rows[0]
    one_each = [SamplingParams(temperature=0, logit_bias=((i, 1000.0),), logprobs=top) for i in range(VOCABULARY)]
    sampled = sampler.sample(rows, [SamplingState(params, [1], EOS) for params in one_each])
    assert [token.token_id for token in sampled] == list(range(VOCABULARY))
    logprobs = [token.logprobs.logprob for token in sampled if token.logprobs is not None]
    assert np.exp(logprobs).sum() == pytest.approx(1.0, abs=1e-4)
    assert all(len(token.logprobs.top) == min(top, TOP_LOGPROBS_MAX) for token in sampled if token.logprobs)


def test_logprobs_are_told_only_where_they_were_asked_for() -> None:
    row = np.zeros((1, 4), np.float32)
    assert sampler.sample(row, [SamplingState(SamplingParams(), [1], EOS)])[0].logprobs is None
    asked = sampler.sample(row, [SamplingState(SamplingParams(logprobs=0), [1], EOS)])[0].logprobs
    assert asked is not None
    assert asked.top == ()
    assert asked.logprob == pytest.approx(np.log(0.25))


def test_sampling_leaves_the_logits_as_they_are() -> None:
    rows = np.random.default_rng(1).normal(0, 2, (2, VOCABULARY)).astype(np.float32)
    before = rows.copy()
    sample(rows, [SamplingParams(top_p=0.9), SamplingParams(temperature=0)], [1, 2])
    assert (rows == before).all()
