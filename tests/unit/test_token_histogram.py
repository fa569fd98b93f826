"""The histogram of tokens counts as the client library's does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.openmetrics.exposition import generate_latest

from observability.token_histogram import TokenHistogram

BOUNDS = (0.125, 0.5, 2, 8, 64)  # sums of these are exact
LABELS = ("model", "node_id")
samples = st.tuples(st.sampled_from(["m", "n"]), st.sampled_from([0.0, *BOUNDS, 5.0, 1e6]), st.integers(1, 3))


@given(st.lists(samples, max_size=30))
def test_both_export_the_same(told: list[tuple[str, float, int]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = TokenHistogram("tokens", "Help.", LABELS, "a", bounds=BOUNDS)
    ours.register(mine)
    other = Histogram("tokens", "Help.", LABELS, buckets=BOUNDS, registry=theirs)
    for model in ("m", "n"):
        mine.know(model)
        other.labels(model, "a")
    for model, amount, count in told:
        mine.observe(model, amount, count)
        for _ in range(count):
            other.labels(model, "a").observe(amount)
    assert lines(ours) == lines(theirs)


def test_what_is_not_known_is_left_out() -> None:
    mine = TokenHistogram("tokens", "Help.", LABELS, "a", bounds=BOUNDS)
    mine.observe("unknown", 1.0, 1)
    assert [sample for metric in mine.collect() for sample in metric.samples] == []


def lines(registry: CollectorRegistry) -> list[str]:
    text = generate_latest(registry).decode()
    return sorted(line for line in text.splitlines() if "_created" not in line)
