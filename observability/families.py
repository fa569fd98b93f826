"""Metric families made of plain numbers: how figures become samples, and how many of them one label may have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mesh.view import MemberView

PREFIX = "ai_cluster_"
# Distinct values of one label; further ones are "other". Prometheus keeps every series for hours in memory.
LABEL_VALUES_MAX = 1_000
OTHER = "other"

# One number, or numbers by label value; the key is a pair where the family has two labels.
PairFigures = dict[tuple[str, str], float]
Figure = float | Mapping[str, float] | Mapping[tuple[str, str], float]


def gauge(key: str, help_text: str, labels: tuple[str, ...], figure: Figure) -> Metric:
    return _fill(GaugeMetricFamily(PREFIX + key, help_text, labels=labels), labels, figure)


def counter(key: str, help_text: str, labels: tuple[str, ...], figure: Figure) -> Metric:
    return _fill(CounterMetricFamily(PREFIX + key, help_text, labels=labels), labels, figure)


def _fill(
    family: GaugeMetricFamily | CounterMetricFamily, labels: tuple[str, ...], figure: Figure
) -> GaugeMetricFamily | CounterMetricFamily:
    """Raises ValueError or TypeError where the figure does not have the shape of the labels."""
    rows = figure.items() if isinstance(figure, Mapping) else [((), figure)]
    for key, value in rows:
        values: tuple[str, ...] = (key,) if isinstance(key, str) else key
        if len(values) != len(labels):
            raise ValueError(f"{family.name}: label values {values!r} for labels {labels!r}")
        # float() here and not in the encoder: what is no number costs this collector, not the scrape.
        family.add_metric(values, float(value))
    return family


def by_node(
    key: str,
    help_text: str,
    members: Iterable[MemberView],
    value: Callable[[MemberView], float],
    combine: Callable[[list[float]], float],
) -> Metric:
    rows = ((member.node_id, value(member)) for member in members)
    return gauge(key, help_text, ("node_id",), dict(_capped(rows, combine)))


def _capped(rows: Iterator[tuple[str, float]], combine: Callable[[list[float]], float]) -> Iterator[tuple[str, float]]:
    """The first LABEL_VALUES_MAX rows, and what is beyond them combined into one row named "other"."""
    rest: list[float] = []
    for index, row in enumerate(rows):
        if index < LABEL_VALUES_MAX:
            yield row
        else:
            rest.append(row[1])
    if rest:
        yield OTHER, combine(rest)
