"""What vLLM exports for kvkern: the metrics of the catalogue that an engine has, in vLLM's own words."""

from __future__ import annotations

from ...observability.catalogue import CATALOGUE, PUBLISHED, Kind, Metric, Needs
from . import shim


def engine_metrics(daemon: bool = False, remote: bool = True, published: bool = False) -> list[Metric]:
    """Return the metrics of an engine: none that a daemon keeps for all its engines, and none that would stay at 0 for ever.

    `remote` says whether a remote store is configured. `published` adds the names of the published deployment.
    """
    needs = {
        Needs.NOTHING: True,
        Needs.OWN_CACHE: not daemon,
        Needs.OWN_REMOTE: remote and not daemon,
        Needs.DAEMON: daemon,
    }
    own = [metric for metric in CATALOGUE if metric.engine is not None and needs[metric.needs]]
    return [*own, *(PUBLISHED if published else ())]


def metric_definitions(
    daemon: bool = False, remote: bool = True, published: bool = False
) -> dict[str, shim.OffloadingMetricMetadata]:
    """Return the definitions that vLLM registers, by the name that vLLM is given."""
    return {metric.vllm_name: _definition(metric) for metric in engine_metrics(daemon, remote, published)}


def _definition(metric: Metric) -> shim.OffloadingMetricMetadata:
    labels = metric.engine or ()
    if metric.kind is Kind.HISTOGRAM:
        return shim.OffloadingHistogramMetadata(documentation=metric.help, labelnames=labels, buckets=metric.buckets)
    make = shim.OffloadingCounterMetadata if metric.kind is Kind.COUNTER else shim.OffloadingGaugeMetadata
    return make(documentation=metric.help, labelnames=labels)
