"""The catalogue is consistent, and docs/metrics.md is the catalogue."""

from __future__ import annotations

from itertools import pairwise

import pytest

from docs.list_metrics import PAGE, page
from kvkern.observability.catalogue import CATALOGUE, PUBLISHED, VALUES, Kind, Metric, series_known_before

each_metric = pytest.mark.parametrize("metric", [*CATALOGUE, *PUBLISHED], ids=lambda metric: metric.name)
BOUNDED_OTHERWISE = {
    "model",
    "tenant",
    "version",
    "policy",
    "name",
}  # see daemon_meter.py; the last three name the process


def test_the_page_is_the_catalogue() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python docs/list_metrics.py"


def test_no_name_twice() -> None:
    for names in ([m.daemon_name for m in CATALOGUE], [m.engine_name for m in (*CATALOGUE, *PUBLISHED)]):
        assert len(set(names)) == len(names)


@each_metric
def test_a_metric_is_exported_explained_and_bounded(metric: Metric) -> None:
    assert metric.daemon is not None or metric.engine is not None
    assert metric.help.endswith(".")
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert all(low < high for low, high in pairwise(metric.buckets))
    for label in (*(metric.daemon or ()), *(metric.engine or ())):
        assert metric.values_of(label) or label in VALUES or label in BOUNDED_OTHERWISE, label


@each_metric
def test_the_unit_is_in_the_name(metric: Metric) -> None:
    """As Prometheus asks. The published names are as they are."""
    units = {"seconds": "seconds", "bytes": "bytes", "chunks": "chunks", "tokens": "tokens", "bytes/s": "per_second"}
    if not metric.published and metric.unit in units:
        assert units[metric.unit] in metric.name


def test_series_of_fixed_labels_are_known_before() -> None:
    (metric,) = (m for m in CATALOGUE if m.name == "lookup_tokens")
    assert list(series_known_before(metric, ("tier",), engine=True)) == [("vllm",), ("dram",), ("remote",)]
    assert list(series_known_before(metric, ("tier",))) == [("dram",), ("remote",)]
    assert list(series_known_before(metric, ("tier", "model"))) == []  # models are not known before
    assert list(series_known_before(metric, ())) == [()]
