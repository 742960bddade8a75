"""Counters and histograms in plain memory: a dict look-up and an addition. Knows no exporter; docs/metrics.md names them."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator

from .catalogue import OTHER, Kind, Labels, Metric, series_known_before


class Histogram:
    """Counts of observations by upper bound, each in one bucket alone."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one: above every bound
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def plus(self, other: Histogram) -> Histogram:
        """Return the observations of both, which have the same bounds."""
        both = Histogram(self._bounds)
        both.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        both.total = self.total + other.total
        return both

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """Yield (upper bound, observations up to it), the last one with the bound infinity."""
        seen = 0
        for bound, count in zip((*self._bounds, float("inf")), self.counts, strict=True):
            seen += count
            yield bound, seen


class Meters:
    """The counters and histograms of one exporter. Thread-safe. Implements kvkern.metrics.Meter."""

    def __init__(self, metrics: dict[Metric, Labels]) -> None:
        self._lock = threading.Lock()
        self.counters: dict[str, dict[Labels, float]] = {}
        self.histograms: dict[str, dict[Labels, Histogram]] = {}
        self._bounds = {metric.name: metric.buckets for metric in metrics}
        for metric, labels in metrics.items():
            known = list(series_known_before(metric, labels))
            if metric.kind is Kind.COUNTER:
                self.counters[metric.name] = dict.fromkeys(known, 0.0)
            elif metric.kind is Kind.HISTOGRAM:
                self.histograms[metric.name] = {values: Histogram(metric.buckets) for values in known}

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Increase a counter. `amount` is at least 0."""
        with self._lock:
            series = self.counters[name]
            series[labels] = series.get(labels, 0.0) + amount

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Count a value in a histogram."""
        with self._lock:
            series = self.histograms[name]
            if (histogram := series.get(labels)) is None:
                histogram = series[labels] = Histogram(self._bounds[name])
            histogram.observe(value)


class BoundedNames:
    """Lets the first `limit` names through as they are. Further ones become OTHER, so the values of a label are bounded."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def name(self, wanted: str) -> str:
        """Return the label's value for this name."""
        if wanted not in self._known and len(self._known) < self._limit:
            self._known.add(wanted)
        return wanted if wanted in self._known else OTHER
