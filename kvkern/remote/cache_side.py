"""What the remote tier has to do with on this side: the cache, where faults end, and requests that wait. Knows no store."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from ..policy.base import Use
from ..tiers.base import Lease, Reservation


class CacheSide(Protocol):
    """The cache's side. Thread-safe."""

    def lease(self, keys: Sequence[bytes], prefix: bool = True, hit: bool = False) -> Lease:
        """Pin those of these that are READY, or the longest prefix; counts as no use, and as hits only if told so."""

    def release(self, lease: Lease) -> int:
        """End a lease."""

    def grant(self, count: int) -> Reservation:
        """Slots to read into."""

    def give_back(self, slots: Sequence[int]) -> None:
        """Granted slots that nothing is read into any more."""

    def promote(self, reservation: Reservation, namespace: bytes, use: Use | None, pin: bool, prefix: bool) -> Lease:
        """Publish what was read and verified; what is READY then, or its longest prefix, pinned for its reader, or not."""

    def departed(self, slots: Sequence[int]) -> None:
        """The outbox is done with these slots."""


class FaultsAsMisses(Protocol):
    """Where a fault becomes a miss: cache.Faults."""

    def are_misses(self) -> AbstractContextManager[None]:
        """Count and log what goes wrong inside."""
