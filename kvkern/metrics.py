"""Counters of one cache. Plain integers under the cache's lock; exporters read `snapshot()`. Ratios never exceed 1."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class CacheCounters:
    """Counts of chunks unless the name says otherwise."""

    lookup_chunks: int = 0  # asked for
    hit_chunks: int = 0  # of those, found READY in an unbroken prefix
    stored_chunks: int = 0  # published
    failed_chunks: int = 0  # reserved but not written by every rank
    dropped_chunks: int = 0  # found no room
    declined_chunks: int = 0  # not written: the policy holds what is there to be worth more
    evicted_chunks: int = 0
    bad_chunks: int = 0  # failed their checksum: a miss
    cleared_chunks: int = 0
    remote_lookup_chunks: int = 0  # that were not in DRAM and looked for in the remote store
    remote_hit_chunks: int = 0  # of those, read and verified
    remote_unasked_chunks: int = 0  # of those, not asked for: asking costs too much, or the store leaves others waiting
    remote_gated_chunks: int = 0  # there, and not read: computing them is faster
    remote_late_chunks: int = 0  # read when nobody waited any more; they are in DRAM now
    remote_bad_chunks: int = 0  # did not verify: a miss, and deleted there
    remote_written_chunks: int = 0
    remote_dropped_chunks: int = 0  # not written: no room there, too many waiting, or it failed
    remote_failures: int = 0  # calls that failed
    faults: int = 0  # exceptions turned into misses

    @property
    def hit_ratio(self) -> float:
        """Hit chunks over looked-up chunks, 0 when nothing was looked up."""
        return self.hit_chunks / self.lookup_chunks if self.lookup_chunks else 0.0

    def snapshot(self) -> dict[str, int | float]:
        """All counters and the hit ratio."""
        return {**asdict(self), "hit_ratio": self.hit_ratio}
