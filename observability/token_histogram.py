"""A histogram that is told of every token: it costs a search among its bounds, a quarter of the client library's."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenHistogram(Collector):
    """Samples of one thread; any other may collect. One label's values are known beforehand, the second's is fixed.

    name, help_text, labels: as exported; bounds: upper ones, rising, without the infinite one."""

    def __init__(
        self, name: str, help_text: str, labels: tuple[str, str], second: str, *, bounds: Sequence[float]
    ) -> None:
        self._name, self._help, self._labels, self._second = name, help_text, labels, second
        self._bounds = tuple(bounds)
        self._rows: dict[str, _Row] = {}

    def know(self, value: str) -> None:
        """From now on it is exported, from 0 on."""
        self._rows.setdefault(value, _Row(len(self._bounds) + 1))

    def observe(self, value: str, amount: float, count: int) -> None:
        """count: of samples, of `amount` each. One of a value that is not known is left out."""
        row = self._rows.get(value)
        if row is not None:
            row.counts[bisect_left(self._bounds, amount)] += count
            row.total += amount * count

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for value, row in list(self._rows.items()):
            buckets, below = [], 0
            for name, count in zip(names, list(row.counts), strict=True):
                below += count
                buckets.append((name, float(below)))
            family.add_metric((value, self._second), buckets, row.total)
        yield family


class _Row:
    """counts: of each bound and beyond the last, not of those below it."""

    __slots__ = ("counts", "total")

    def __init__(self, size: int) -> None:
        self.counts = [0] * size
        self.total = 0.0
