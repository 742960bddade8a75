"""What an engine counts, until vLLM fetches it: vLLM asks once a step for what has changed since the last one.

The front end, which exports the metrics, is another process. So counters travel as their increase, histograms as lists of
values, and gauges as they are, not more often than once in GAUGES_S.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import fields

from ...bounded_dict import BoundedDict
from ...metrics import CacheCounters
from ...observability.catalogue import Kind, Labels, Metric, series_known_before
from ...tiers.base import Reservation
from . import shim
from .metric_definitions import engine_metrics

GAUGES_S = 1.0
MAX_VALUES = 4096  # of one histogram that wait for vLLM; further ones are left out
MAX_NOT_STORED = 65_536  # chunks whose refusal is remembered, to say later why they are missing
MAX_REQUESTS = 1024  # for which the remote tier's reason is remembered
_P = "vllm:cache_service_"
# kvkern's histogram -> those of the published deployment that take the same values
_PUBLISHED_AS = {
    "acquire_seconds": (f"{_P}time_query_seconds",),
    "load_seconds": (f"{_P}time_load_seconds",),
    "store_seconds": (f"{_P}time_unload_seconds", f"{_P}time_async_update_exec_seconds"),
    "update_seconds": (f"{_P}time_update_seconds",),
    "update_tokens": (f"{_P}counter_async_update_updated_seconds",),
}

Usage = Mapping[str, int | float | str]


class EngineMeter:
    """Implements kvkern.metrics.CacheObserver and Meter for one engine. Thread-safe; `take` belongs to the scheduler."""

    def __init__(
        self,
        counters: CacheCounters,
        daemon: bool = False,
        remote: bool = False,
        published: bool = False,
        chunk_tokens: int = 0,  # of the first KV group
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lock = threading.Lock()
        self._clock, self._chunk_tokens, self._published = clock, chunk_tokens, published
        metrics = engine_metrics(daemon, remote, published)
        self._vllm_names = {metric.name: metric.vllm_name for metric in metrics}
        self._counts: dict[tuple[str, Labels], float] = {}  # increases since the last `take`
        self._values: dict[str, dict[Labels, list[float]]] = {}  # the same, of histograms
        self._gauges_due_s = 0.0
        self._zeros = [(metric, labels) for metric in metrics for labels in _known(metric)]
        self.usage: Callable[[], Usage] = dict  # of the cache
        self.remote_usage: Callable[[], Usage] = dict
        self.prefill_tokens_s: Callable[[], float] = float
        self._unconverted_tokens = 0  # loaded before the prefill speed was known
        self._not_stored: BoundedDict[bytes, str] = BoundedDict(MAX_NOT_STORED)
        self._reasons: BoundedDict[int, str] = BoundedDict(MAX_REQUESTS)
        self._totals = dict.fromkeys(("lookup_tokens", "hit_tokens"), 0.0)  # of the tier dram
        own = {found.name for found in fields(CacheCounters)}
        self._fields = [(name, vllm) for name, vllm in self._vllm_names.items() if name in own]
        self.watch(counters)

    def watch(self, counters: CacheCounters) -> None:
        """Count the increase of these counters from now on."""
        self._counters = counters
        self._reported = {name: getattr(counters, name) for name, _ in self._fields}

    # -- Meter -----------------------------------------------------------------------------------------------------------

    def add(self, name: str, amount: float, *labels: str) -> None:
        """See Meter. What this engine does not export is left out."""
        if (vllm := self._vllm_names.get(name)) is None:
            return
        with self._lock:
            at = (vllm, labels)
            self._counts[at] = self._counts.get(at, 0) + amount
            if labels == ("dram",) and name in self._totals:
                self._totals[name] += amount

    def observe(self, name: str, value: float, *labels: str) -> None:
        """See Meter. What this engine does not export is left out."""
        if name not in self._vllm_names:
            return
        with self._lock:
            self._append(self._vllm_names[name], labels, value)
            if self._published:
                for vllm in _PUBLISHED_AS.get(name, ()):
                    self._append(vllm, (), value)

    def _append(self, vllm: str, labels: Labels, value: float) -> None:
        waiting = self._values.setdefault(vllm, {}).setdefault(labels, [])
        if len(waiting) < MAX_VALUES:
            waiting.append(value)

    # -- CacheObserver -------------------------------------------------------------------------------------------------

    def looked_up(self, tier: str, namespace: bytes, client: int, chunks: int, hits: int, tokens: bool = True) -> None:
        """See CacheObserver. The scheduler counts what it looks up and loads itself, so only the remote tier counts here."""
        if tier == "remote" and tokens:
            self.add("lookup_tokens", chunks * self._chunk_tokens, "remote")
            self.add("hit_tokens", hits * self._chunk_tokens, "remote")

    def stored(self, tier: str, namespace: bytes, client: int, chunks: int, first_group: int) -> None:
        """See CacheObserver. ObservedCache counts what the engine stores."""

    def not_loaded(self, reason: str, request: int, chunks: int) -> None:
        """See CacheObserver."""
        if chunks and request and reason != "not_found":
            self._reasons.put(request, reason)

    def prefill(self, tokens_s: float, client: int) -> None:
        """See CacheObserver. The engine's own speed is `prefill_tokens_s`."""

    # -- the scheduler -----------------------------------------------------------------------------------------------

    def note_loaded(self, tokens: int) -> None:
        """Count a load that was verified."""
        self.add("hit_tokens", tokens, "dram")
        self.add("loaded_tokens", tokens)
        self._unconverted_tokens += tokens
        if speed := self.prefill_tokens_s():
            self.add("prefill_seconds_avoided", self._unconverted_tokens / speed)
            self._unconverted_tokens = 0

    def note_transfer(self, is_load: bool, nbytes: int, seconds: float) -> None:
        """Count a transfer of one worker."""
        kind = "load" if is_load else "store"
        self.add("loaded_bytes" if is_load else "stored_bytes", nbytes)
        self.observe(f"{kind}_seconds", seconds)
        self.observe(f"{kind}_bytes_per_second", nbytes / max(seconds, 1e-9))

    def note_reserved(self, reservation: Reservation, wanted: list[bytes]) -> None:
        """Remember which of the wanted chunks got no slot. If some were declined and others dropped, all count as declined."""
        if not (reservation.dropped or reservation.declined):
            return
        stored, reason = set(reservation.keys), "declined" if reservation.declined else "dropped"
        for key in wanted:
            if key not in stored:
                self._not_stored.put(key, reason)

    def why_missing(
        self,
        key: bytes,  # of the first chunk that a request asked for and that is not there
        request: int,  # its number, see policy.base.Use
    ) -> str:
        """Return a reason of the catalogue."""
        if not self.usage().get("connected", 1):
            return "no_daemon"
        return self._reasons.pop(request, None) or self._not_stored.get(key) or "not_found"

    def take(self) -> shim.OffloadingConnectorStats | None:
        """Return what has changed since the last call, or None if nothing has."""
        stats, now_s = shim.OffloadingConnectorStats(), self._clock()
        if now_s >= self._gauges_due_s:
            self._gauges_due_s = now_s + GAUGES_S
            self._set_gauges(stats)
        if self._zeros:
            for metric, labels in self._zeros:  # so that a series exists before its first event
                if metric.kind is Kind.HISTOGRAM:
                    shim.show_histogram(stats, metric.vllm_name, labels)
                else:
                    stats.increase_counter(metric.vllm_name, 0, labels)
            self._zeros = []
        counters, reported = self._counters, self._reported
        for name, vllm in self._fields:
            if (value := getattr(counters, name)) != reported[name]:
                stats.increase_counter(vllm, value - reported[name])
                reported[name] = value
        if self._counts or self._values:
            with self._lock:
                counts, self._counts = self._counts, {}
                values, self._values = self._values, {}
            for (vllm, labels), amount in counts.items():
                stats.increase_counter(vllm, amount, labels)
            for vllm, by_labels in values.items():
                for labels, observed in by_labels.items():
                    for value in observed:
                        stats.observe_histogram(vllm, value, labels)
        return None if stats.is_empty() else stats

    def _set_gauges(self, stats: shim.OffloadingConnectorStats) -> None:
        usage, remote = self.usage(), self.remote_usage()
        gauges: dict[str, dict[Labels, float]] = {"prefill_tokens_per_second": {(): self.prefill_tokens_s()}}
        if "connected" in usage:
            gauges["connected"] = {(): float(usage["connected"])}
        if "free_slots" in usage:
            slots, free, ready = (float(usage.get(name, 0)) for name in ("slots", "free_slots", "ready_slots"))
            gauges["arena_slots"] = {("free",): free, ("ready",): ready, ("writing",): max(0.0, slots - free - ready)}
        if remote:
            for name in ("remote_works", "remote_queue_chunks", "remote_waiting_requests"):
                gauges[name] = {(): float(remote[name])}
        if self._published:
            gauges |= {name: {(): value} for name, value in self._published_gauges().items()}
        for name, series in gauges.items():
            for labels, value in series.items():
                if (vllm := self._vllm_names.get(name)) is not None:
                    stats.set_gauge(vllm, value, labels)

    def _published_gauges(self) -> dict[str, float]:
        counters, (looked_up, hit) = self._counters, self._totals.values()
        return {
            f"{_P}tokens_hit_rate": hit / looked_up if looked_up else 0.0,
            f"{_P}blocks_hit_rate": counters.hit_ratio,
            f"{_P}hit_tokens": hit,
            f"{_P}total_tokens": looked_up,
            f"{_P}hit_blocks": counters.hit_chunks,
            f"{_P}total_blocks": counters.lookup_chunks,
            f"{_P}err_query": counters.faults + counters.bad_chunks,
            f"{_P}err_async_update_task_queue_full": counters.dropped_chunks,
            f"{_P}err_update": counters.failed_chunks,
        }


def _known(metric: Metric) -> list[Labels]:
    gauge = metric.kind is Kind.GAUGE
    return [] if gauge else list(series_known_before(metric, metric.engine or (), engine=True))
