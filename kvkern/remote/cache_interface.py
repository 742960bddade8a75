"""What the remote tier needs from its node: the cache, and the place where faults become misses. Knows no store."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from ..metrics import CacheObserver
from ..policy.base import Use
from ..tiers.base import Lease, Reservation
from ..tiers.slot_records import SlotRecords


class CacheSide(Protocol):
    """The cache, as the remote tier uses it. Thread-safe."""

    observer: CacheObserver

    @property
    def records(self) -> SlotRecords:
        """What the headers of complete slots said when they were published."""

    def lease(self, keys: Sequence[bytes], prefix: bool = True, hit: bool = False) -> Lease:
        """Pin those of `keys` that are READY; with `prefix` their longest prefix.

        The policy does not count this as a use. The chunks count as hits only with `hit`.
        """

    def release(self, lease: Lease) -> int:
        """End a lease."""

    def grant(self, count: int) -> Reservation:
        """Reserve `count` free slots to read into."""

    def give_back(self, slots: Sequence[int]) -> None:
        """Free granted slots. Nothing reads into them any more."""

    def promote(self, reservation: Reservation, namespace: bytes, use: Use | None, pin: bool, prefix: bool) -> Lease:
        """Publish chunks that were read and verified.

        With `pin` the lease holds the reservation's keys that are READY then, with `prefix` their longest prefix. Without
        `pin` the lease is empty.
        """

    def free_departed(self, slots: Sequence[int]) -> None:
        """Free slots of evicted chunks. The outbox does not need them any more."""


class FaultsAsMisses(Protocol):
    """The place where a fault becomes a miss: `Faults` of kvkern/cache/base.py."""

    def are_misses(self) -> AbstractContextManager[None]:
        """Count and log the exceptions of the block, and suppress them."""
