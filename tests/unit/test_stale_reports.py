"""The arithmetic of what other entries have done since the reports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.stale_reports import RATE_WINDOW_S, DispatchRate, water_level

pools = st.lists(st.tuples(st.floats(0, 1e6), st.floats(1e-6, 1e3)), min_size=1, max_size=20).map(sorted)


@given(pools, st.floats(0, 1e4))
def test_the_water_up_to_the_level_is_what_came(nodes: list[tuple[float, float]], arrivals: float) -> None:
    estimates, costs = zip(*nodes, strict=True)
    level_s = water_level(estimates, costs, arrivals)
    assert level_s >= estimates[0]
    filled = sum(max(0.0, level_s - estimate) / cost for estimate, cost in nodes)
    # A level of a million seconds holds ten digits behind the point, of which a node of a microsecond takes six.
    assert filled == pytest.approx(arrivals, rel=1e-3, abs=1e-2)


@pytest.mark.parametrize(
    ("estimates", "arrivals", "level_s"),
    [
        pytest.param([1.0, 2.0, 3.0], 0.0, 1.0, id="none came"),
        pytest.param([1.0, 2.0, 3.0], 1.0, 1.5, id="all to the best"),
        pytest.param([1.0, 2.0, 3.0], 4.0, 2.5, id="two are level"),
        pytest.param([1.0, 1.0, 1.0], 6.0, 2.0, id="all are level"),
    ],
)
def test_the_level_of_nodes_that_take_two_a_second(estimates: list[float], arrivals: float, level_s: float) -> None:
    assert water_level(estimates, [0.5] * 3, arrivals) == pytest.approx(level_s)


def test_a_rate_is_that_of_even_dispatches_and_fades_without_any() -> None:
    rate = DispatchRate()
    assert rate.per_s(0.0) == 0.0
    for step in range(1000):
        rate.note(step / 10)
    assert rate.per_s(99.9) == pytest.approx(10, rel=0.05)
    assert rate.per_s(99.9 + 10 * RATE_WINDOW_S) < 0.01
    assert rate.per_s(0.0) <= rate.per_s(99.9), "a clock that goes back gives no more"
