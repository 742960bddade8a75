"""Counters of one cache. They are plain integers under the cache's lock. Exporters read `snapshot()`.

`hit_ratio` is at most 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class CacheCounters:
    """Counts of chunks unless the name says otherwise."""

    lookup_chunks: int = 0  # looked up
    hit_chunks: int = 0  # of those, found READY in an unbroken prefix
    stored_chunks: int = 0  # published
    failed_chunks: int = 0  # reserved, but not every rank wrote its part
    dropped_chunks: int = 0  # not written, because no slot was free and none could be evicted
    declined_chunks: int = 0  # not written, because the policy holds every cached chunk to be worth more
    evicted_chunks: int = 0
    bad_chunks: int = 0  # failed their checksum, so counted as a miss
    cleared_chunks: int = 0
    remote_lookup_chunks: int = 0  # not in DRAM, so looked up in the remote store
    remote_hit_chunks: int = 0  # of those, read and verified
    remote_unasked_chunks: int = 0  # of those, not asked for: asking costs too much, or the store keeps others waiting
    remote_gated_chunks: int = 0  # present in the store but not read, because computing them is faster
    remote_late_chunks: int = 0  # read after the last request had stopped waiting; they are in DRAM now
    remote_bad_chunks: int = 0  # failed their checksum, so counted as a miss and deleted in the store
    remote_written_chunks: int = 0
    remote_dropped_chunks: int = 0  # not written: the store has no room, too many chunks wait, or the write failed
    remote_failures: int = 0  # calls to the store that failed
    faults: int = 0  # exceptions turned into misses

    @property
    def hit_ratio(self) -> float:
        """Hit chunks over looked-up chunks, or 0 if none was looked up."""
        return self.hit_chunks / self.lookup_chunks if self.lookup_chunks else 0.0

    def snapshot(self) -> dict[str, int | float]:
        """Return all counters and the hit ratio."""
        return {**asdict(self), "hit_ratio": self.hit_ratio}
