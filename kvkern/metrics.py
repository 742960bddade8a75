"""Counters of one cache, and what observers of it are told. Knows no exporter.

The counters are plain integers under the cache's lock. Exporters read `snapshot()`. `hit_ratio` is at most 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from .bounded_dict import BoundedDict

MAX_REQUESTS = 4096  # whose lookups are remembered; an engine has a few hundred at a time


@dataclass(slots=True)
class CacheCounters:
    """Counts of chunks unless the name says otherwise."""

    lookup_chunks: int = 0  # looked up
    hit_chunks: int = 0  # of those, found READY in an unbroken prefix
    stored_chunks: int = 0  # published
    failed_chunks: int = 0  # reserved and not published, mostly because not every rank wrote its part
    duplicate_chunks: int = 0  # reserved and not published, because another writer had published them by then
    dropped_chunks: int = 0  # not written, because no slot was free and none could be evicted
    declined_chunks: int = 0  # not written, because the policy holds every cached chunk to be worth more
    evicted_chunks: int = 0
    trimmed_chunks: int = 0  # of the evicted, those of a namespace above its quota
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

    def note_stored(
        self,
        reserved: int,  # chunks
        stored: int,  # of those, published
        known: int,  # of those, in the index now, whoever has published them
    ) -> None:
        """Count the chunks of a store that has ended."""
        known = max(known, stored)  # a chunk may be evicted before its writer learns that it was published
        self.stored_chunks += stored
        self.duplicate_chunks += known - stored
        self.failed_chunks += reserved - known

    def snapshot(self) -> dict[str, int | float]:
        """Return all counters and the hit ratio."""
        return {**asdict(self), "hit_ratio": self.hit_ratio}


class CountedRequests:
    """Remembers which lookups are counted: a request that waits asks again and again, and counts once. Not thread-safe."""

    def __init__(self) -> None:
        self._counted: BoundedDict[tuple[int, bytes], int] = BoundedDict(MAX_REQUESTS)  # -> chunks of the sequence

    def num_new(
        self,
        request: int,  # number of the request, see policy.base.Use; 0: every lookup counts
        keys: Sequence[bytes],  # of the sequence, from its first chunk on
    ) -> int:
        """Return how many of `keys` the request asks for the first time: the last ones. They count as asked for from now on."""
        if not request or not keys:
            return len(keys)
        before = self._counted.get((request, keys[0]), 0)
        self._counted.put((request, keys[0]), max(before, len(keys)))
        return max(0, len(keys) - before)


class Meter(Protocol):
    """Takes counts and measurements, by the names of observability/catalogue.py. Thread-safe; never blocks, never raises."""

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Increase a counter."""

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Count a value in a histogram."""


class CacheObserver(Protocol):
    """Is told what a cache counts, and for whom. Thread-safe; never blocks, never raises. Called per request, not per chunk."""

    def looked_up(self, tier: str, namespace: bytes, client: int, chunks: int, hits: int, tokens: bool = True) -> None:
        """So many chunks were looked up in the tier "dram" or "remote", and so many found there.

        `namespace` is a root, or empty if it is not known. `client` is the number of a daemon's client. `tokens`: the
        chunks' tokens count; False if chunks of another KV group hold the same tokens.
        """

    def stored(self, tier: str, namespace: bytes, client: int, chunks: int, first_group: int) -> None:
        """So many chunks were stored. Those of the first KV group hold all tokens, the other groups hold them again."""

    def not_loaded(self, reason: str, request: int, chunks: int) -> None:
        """So many chunks that were looked up were not given to their request (0: its number is not known)."""

    def prefill(self, tokens_s: float, client: int) -> None:
        """An engine computes so many prompt tokens per second; 0: the client is gone."""


class Unobserved:
    """The observer and the meter of a cache that nobody watches."""

    def looked_up(self, tier: str, namespace: bytes, client: int, chunks: int, hits: int, tokens: bool = True) -> None:
        """See CacheObserver."""

    def stored(self, tier: str, namespace: bytes, client: int, chunks: int, first_group: int) -> None:
        """See CacheObserver."""

    def not_loaded(self, reason: str, request: int, chunks: int) -> None:
        """See CacheObserver."""

    def prefill(self, tokens_s: float, client: int) -> None:
        """See CacheObserver."""

    def add(self, name: str, amount: float, *labels: str) -> None:
        """See Meter."""

    def observe(self, name: str, value: float, *labels: str) -> None:
        """See Meter."""
