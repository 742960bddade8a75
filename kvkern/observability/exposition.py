"""A daemon's metrics as text for Prometheus. Reads what the daemon counts; nothing here runs between two scrapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.exposition import generate_latest

from ..metrics import CacheCounters
from .catalogue import CATALOGUE, Kind, Labels
from .daemon_meter import DaemonMeter

__all__ = ["CONTENT_TYPE", "ExposedDaemon", "daemon_text"]

Values = dict[str, dict[Labels, float]]  # metric -> label values -> value

# metric -> the field of stat that has its value
_GAUGES = {
    "slot_bytes": "slot_nbytes", "arena_bytes": "arena_nbytes", "capacity_bytes": "capacity_nbytes", "leases": "leases",
    "granted_slots": "granted_slots", "quarantined_leases": "quarantined_leases",
    "quarantined_slots": "quarantined_slots", "waiting_acquires": "waiting_acquires", "connections": "connections",
    "sessions": "sessions", "namespaces": "namespaces", "remote_works": "remote_works",
    "remote_queue_chunks": "remote_queue_chunks", "remote_waiting_requests": "remote_waiting_requests",
}  # fmt: skip


class ExposedDaemon(Protocol):
    """What is read of a daemon: node.daemon.server.Server."""

    meter: DaemonMeter
    counters: CacheCounters
    bad_frames: int

    def stat(self) -> Mapping[str, int | float | str]:
        """Return the row that answers Stat."""

    def namespace_chunks(self) -> Mapping[bytes, int]:
        """Return the number of cached chunks of each namespace root."""


def daemon_text(server: ExposedDaemon) -> bytes:
    """Return the daemon's metrics in Prometheus' text format. Call it in the daemon's thread; takes a few milliseconds."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(server))
    return generate_latest(registry)


class _Collector:
    def __init__(self, server: ExposedDaemon) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of the catalogue that a daemon exports."""
        meter, values = self._server.meter, _values(self._server)
        for metric in CATALOGUE:
            if metric.daemon is None:
                continue
            name = f"kvkern_{metric.name}"
            family: Metric
            if metric.kind is Kind.HISTOGRAM:
                family = HistogramMetricFamily(name, metric.help, labels=metric.daemon)
                for labels, histogram in list(meter.histogram_series(metric.name).items()):
                    buckets = [(_bound(bound), count) for bound, count in histogram.cumulative()]
                    family.add_metric(labels, buckets, histogram.total)
            else:
                make = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
                family = make(name, metric.help, labels=metric.daemon)
                for labels, value in sorted(
                    {**meter.counter_series(metric.name), **values.get(metric.name, {})}.items()
                ):
                    family.add_metric(labels, value)
            yield family


def _bound(bound: float) -> str:
    return "+Inf" if bound == float("inf") else repr(bound)


def _values(server: ExposedDaemon) -> Values:
    """Return what is not in the meter: the cache's own counters, and gauges."""
    stat, counters, meter = server.stat(), server.counters, server.meter

    def number(field: str) -> float:
        value = stat.get(field, 0)
        return 0.0 if isinstance(value, str) else float(value)

    slots, free, ready = number("slots"), number("free_slots"), number("chunks")
    values: Values = {name: {(): number(field)} for name, field in _GAUGES.items()}
    if "remote" not in stat:
        for name in ("remote_works", "remote_queue_chunks", "remote_waiting_requests"):
            values[name] = {}
    values |= {
        "failed_chunks": {(): counters.failed_chunks},
        "duplicate_chunks": {(): counters.duplicate_chunks},
        "dropped_chunks": {("dram",): counters.dropped_chunks, ("remote",): counters.remote_dropped_chunks},
        "evicted_chunks": {
            ("capacity",): counters.evicted_chunks - counters.trimmed_chunks,
            ("quota",): counters.trimmed_chunks,
        },
        "cleared_chunks": {(): counters.cleared_chunks},
        "bad_chunks": {("dram",): counters.bad_chunks, ("remote",): counters.remote_bad_chunks},
        "faults": {(): counters.faults},
        "remote_failures": {(): counters.remote_failures},
        "bad_frames": {(): server.bad_frames},
        "arena_slots": {("free",): free, ("ready",): ready, ("writing",): max(0.0, slots - free - ready)},
        "start_time_seconds": {(): number("started_s")},
        "build_info": {tuple(str(stat.get(name, "")) for name in ("version", "policy", "name")): 1.0},
        "prefill_tokens_per_second": {(model,): speed for model, speed in meter.prefill_speeds().items()},
        "tenant_chunks": _tenant_chunks(meter, server.namespace_chunks().items()),
    }
    return values


def _tenant_chunks(meter: DaemonMeter, namespaces: Iterable[tuple[bytes, int]]) -> dict[Labels, float]:
    """Add up the namespaces of a model and tenant. Tenants that once had chunks stay, with 0."""
    sums: dict[Labels, float] = dict.fromkeys(meter.known_tenants(), 0.0)
    for root, chunks in namespaces:
        labels = meter.labels_of(root)
        at = (labels.model, labels.tenant)
        sums[at] = sums.get(at, 0.0) + chunks
    return sums
