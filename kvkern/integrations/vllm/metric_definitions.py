"""The Prometheus counters that vLLM exports for kvkern: their names and what they count."""

from __future__ import annotations

from ...metrics import CacheCounters
from . import shim


def metric_definitions(daemon: bool = False, remote: bool = True) -> dict[str, shim.OffloadingMetricMetadata]:
    """Return the Prometheus counters of this adapter. vLLM has its own for bytes and seconds.

    Left out are counters that a daemon keeps for all its engines, and remote counters of an engine without a remote store.
    """
    texts = {
        "lookup_chunks": "KV chunks of scheduled requests that vLLM's own cache lacked.",
        "hit_chunks": "Of those, chunks loaded and verified.",
        "stored_chunks": "KV chunks stored.",
        "failed_chunks": "KV chunks reserved but not written by every rank.",
        "evicted_chunks": "KV chunks evicted to make room.",
        "dropped_chunks": "KV chunks not stored because there was no room.",
        "declined_chunks": "KV chunks not stored because every cached chunk is worth more.",
        "bad_chunks": "KV chunks that failed verification and were dropped.",
        "remote_lookup_chunks": "KV chunks looked for in the remote store.",
        "remote_hit_chunks": "Of those, chunks read and verified.",
        "remote_unasked_chunks": "KV chunks not asked for: the remote store is slow, or keeps other requests waiting.",
        "remote_gated_chunks": "KV chunks not read from the remote store because computing them is faster.",
        "remote_late_chunks": "KV chunks read from the remote store after their request had stopped waiting.",
        "remote_bad_chunks": "KV chunks of the remote store that failed verification.",
        "remote_written_chunks": "KV chunks written to the remote store.",
        "remote_dropped_chunks": "KV chunks not written to the remote store: it has no room, or it failed.",
        "remote_failures": "Calls to the remote store that failed.",
        "faults": "Faults in the cache that were answered as a miss.",
    }
    elsewhere = {name for name in texts if name.startswith("remote_")} if daemon or not remote else set()
    elsewhere |= {"evicted_chunks", "declined_chunks"} if daemon else set()
    return {
        f"kvkern:{name}": shim.OffloadingCounterMetadata(documentation=text)
        for name, text in texts.items()
        if name not in elsewhere
    }


class ReportedCounters:
    """Remembers which part of the counters vLLM has been told of."""

    def __init__(self, counters: CacheCounters) -> None:
        self._counters = counters
        self._reported = counters.snapshot()

    def increase(self) -> shim.OffloadingConnectorStats | None:
        """Return the counters' increase since the last call, or None if nothing changed."""
        now = self._counters.snapshot()
        stats = shim.OffloadingConnectorStats()
        for name in metric_definitions():
            field = name.split(":", 1)[1]
            if delta := now[field] - self._reported[field]:
                stats.increase_counter(name, delta)
        self._reported = now
        return None if stats.is_empty() else stats
