"""The manager: what is cached, what is read, what is written. Thread-safe; knows keys and slots, not tensors or engines.

The one place where a fault becomes a miss: an unexpected error in a tier is counted, logged once per kind, and answered
as if nothing were cached. Calls are batched, in prefix order, and linear in the number of chunks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TypeVar

from ..metrics import CacheCounters
from ..policy.base import Use
from ..tiers.base import AdoptionResult, ChunkShape, IndexChanges, Lease, Outbox, Reservation
from ..tiers.dram import DramTier
from .base import NO_LEASE, NO_RESERVATION, BackingTier, Faults, RequestEnd

logger = logging.getLogger("kvkern")

DRAIN_S = 2.0
_UNKNOWN = Use()


class Cache:
    """One namespace-agnostic cache over the node's DRAM tier: keys already name model, weights and tenant."""

    def __init__(
        self,
        dram: DramTier,
        clock: Callable[[], float] = time.monotonic,  # seconds; of every use, whatever its caller says
    ) -> None:
        self._dram = dram
        self._clock = clock
        self._lock = threading.Lock()
        self._late_leases: deque[Lease] = deque()  # abandoned leases, see release_later
        self._remote: BackingTier | None = None
        self._grown_namespaces: set[bytes] | None = (
            None  # namespaces that may be above their quotas; None: there are none
        )
        self.counters = CacheCounters()
        self.faults = Faults(self.counters)

    def lookup(self, keys: Sequence[bytes]) -> int:
        """Length of the longest prefix of `keys` that could be acquired now. Pins and counts nothing."""
        with self._lock, self.faults.are_misses():
            self._end_late_leases()
            return self._dram.contains(keys)
        return 0

    def attach_remote(self, remote: BackingTier, outbox: Outbox, spare: int) -> None:
        """From now on chunks come from a remote store too, and go there; `spare` slots are kept for those that leave."""
        with self._lock:
            self._remote, self._dram.outbox, self._dram.spare = remote, outbox, spare

    def acquire(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Lease:
        """Pin the longest cached prefix (or, for windowed groups, all cached chunks with `prefix=False`).

        The caller may read the slots until it calls `release`, which it must do exactly once, also for an empty lease.
        With a remote store it waits for what comes from there.
        """
        return self.acquire_soon(keys, prefix, use).result()

    def _acquire(self, keys: Sequence[bytes], prefix: bool, use: Use | None) -> Lease:
        with self._lock, self.faults.are_misses():
            self._end_late_leases()
            lease = self._dram.acquire(keys, prefix, self._timed(use))
            self.counters.lookup_chunks += len(keys)
            self.counters.hit_chunks += len(lease.slots)
            return lease
        return NO_LEASE

    def acquire_soon(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Future[Lease]:
        """See ChunkCache; done at once, but for what comes from a remote store."""
        lease = self._acquire(keys, prefix, use)
        if self._remote is None or len(lease.keys) == len(keys):
            return _done(lease)
        return self._remote.extend(lease, keys, prefix, use or _UNKNOWN)

    def release(self, lease: Lease) -> int:
        """End a lease. Chunks its reader marked BAD are dropped and counted; returns how many."""
        with self._lock, self.faults.are_misses():
            bad = self._dram.drop_bad(lease)
            self._dram.release(lease)
            self.counters.bad_chunks += bad
            if bad:
                logger.warning("kvkern: %d chunk(s) failed verification and were dropped", bad)
            return bad
        return 0

    def release_later(self, lease: Lease) -> None:
        """For finalizers, which may run while this thread holds the lock: the next lookup or store ends the lease."""
        self._late_leases.append(lease)

    def touch(self, keys: Sequence[bytes], use: Use | None = None) -> None:
        """The engine used these chunks from its own cache: they count as used here too."""
        with self._lock, self.faults.are_misses():
            self._dram.touch(keys, self._timed(use))

    def finish(self, use: Use, request_end: RequestEnd | None = None) -> None:
        """See ChunkCache."""
        if request_end is not None and request_end.prefill_tokens_s:
            self.note_prefill(request_end.prefill_tokens_s)
        self.touch((), use)

    def note_prefill(self, tokens_s: float) -> None:
        """See ChunkCache."""
        if self._remote is not None:
            self._remote.note_prefill(tokens_s)

    def reserve(
        self, chain: Sequence[bytes], wanted: Sequence[bytes], shape: ChunkShape, use: Use | None = None
    ) -> Reservation:
        """Slots to write those of `wanted` into that nobody has. See DramTier.reserve."""
        with self._lock, self.faults.are_misses():
            self._end_late_leases()
            reservation = self._dram.reserve(chain, wanted, shape, self._timed(use))
            self.counters.dropped_chunks += reservation.dropped
            self.counters.declined_chunks += reservation.declined
            self.counters.evicted_chunks += len(reservation.evicted)
            return reservation
        return NO_RESERVATION

    def has_room(self, wanted: Sequence[bytes]) -> bool:
        """Reserving here never has to wait."""
        return True

    def commit_soon(self, reservation: Reservation) -> Future[int]:
        """See ChunkCache; done at once."""
        return _done(self.commit(reservation))

    def commit(self, reservation: Reservation) -> int:
        """Publish the chunks every rank has written, free the others. Returns how many were published."""
        with self._lock, self.faults.are_misses():
            stored = self._dram.commit(reservation)
            self.counters.stored_chunks += stored
            self.counters.failed_chunks += len(reservation.slots) - stored
            return stored
        return 0

    def abort(self, reservation: Reservation) -> None:
        """Give reserved slots back unwritten. Only once no writer can still be writing them."""
        with self._lock, self.faults.are_misses():
            self._dram.abort(reservation)

    def clear(self, namespace: bytes | None = None, fresh: Collection[int] = ()) -> int:
        """Forget every chunk, or those of a namespace (32-byte root). `fresh`: see DramTier.clear.

        Slots being read or written are freed when their lease or reservation ends.
        """
        with self._lock, self.faults.are_misses():
            count = self._dram.clear(namespace, fresh)
            self.counters.cleared_chunks += count
            return count
        return 0

    def clear_soon(self, namespace: bytes) -> Future[int]:
        """See ChunkCache; done at once."""
        return _done(self.clear(namespace))

    def describe_namespace(self, root: bytes, fields: dict[str, str]) -> None:
        """An embedded cache serves one engine, which knows its namespaces."""

    @property
    def shared(self) -> bool:
        """An embedded cache is one engine's."""
        return False

    def close(self) -> None:
        """End the remote tier, when it has written what waits or DRAIN_S have passed. The arena is its owner's to close."""
        if self._remote is not None:
            self._remote.close(DRAIN_S)

    def drop(self, keys: Sequence[bytes]) -> int:
        """Forget these chunks. Returns how many there were."""
        with self._lock, self.faults.are_misses():
            count = self._dram.drop(keys)
            self.counters.cleared_chunks += count
            return count
        return 0

    # -- for a tier above ------------------------------------------------------------------------------------------------

    def present_keys(self, keys: Sequence[bytes], writing: bool = False) -> set[bytes]:
        """Those of these that are READY, or with `writing` on their way to it. Pins and counts nothing."""
        with self._lock, self.faults.are_misses():
            return self._dram.present_keys(keys, writing)
        return set()

    # -- for the remote tier ---------------------------------------------------------------------------------------------

    def lease(self, keys: Sequence[bytes], prefix: bool = True, hit: bool = False) -> Lease:
        """Pin the longest READY prefix, or all READY chunks. Counts as no lookup, as no use, and as hits if told so."""
        with self._lock, self.faults.are_misses():
            lease = self._dram.lease(keys[: self._dram.contains(keys)] if prefix else keys)
            self.counters.hit_chunks += len(lease.keys) * hit
            return lease
        return NO_LEASE

    def promote(self, reservation: Reservation, namespace: bytes, use: Use | None, pin: bool, prefix: bool) -> Lease:
        """Publish what a remote store has given; the lease is its reader's, empty without `pin`."""
        with self._lock, self.faults.are_misses():
            self._dram.publish(reservation, namespace, self._timed(use), computed=False)
            keys = reservation.keys if pin else ()
            lease = self._dram.lease(keys[: self._dram.contains(keys)] if prefix else keys)
            self.counters.hit_chunks += len(lease.keys)
            if self._grown_namespaces is not None:
                self._grown_namespaces.add(namespace)
            return lease
        return NO_LEASE

    def free_departed(self, slots: Sequence[int]) -> None:
        """The outbox is done with these slots."""
        with self._lock, self.faults.are_misses():
            self._dram.free_departed(slots)

    # -- for a daemon, whose clients are other processes --------------------------------------------------------------

    def grant(self, count: int) -> Reservation:
        """Slots for a client to fill and name. See DramTier.grant."""
        with self._lock, self.faults.are_misses():
            self._end_late_leases()
            reservation = self._dram.grant(count)
            self.counters.evicted_chunks += len(reservation.evicted)
            return reservation
        return NO_RESERVATION

    def publish(self, reservation: Reservation, namespace: bytes, use: Use | None = None) -> list[bool]:
        """Make granted slots READY. See DramTier.publish."""
        with self._lock, self.faults.are_misses():
            published = self._dram.publish(reservation, namespace, self._timed(use))
            self.counters.stored_chunks += sum(published)
            self.counters.failed_chunks += len(published) - sum(published)
            return published
        return [False] * len(reservation.slots)

    def give_back(self, slots: Sequence[int]) -> None:
        """Granted slots come back unwritten. Only once no writer can still be writing them."""
        with self._lock, self.faults.are_misses():
            self._dram.give_back(slots)

    def adopt(self, alive: Callable[[int, int], bool]) -> AdoptionResult:
        """Take over an arena's chunks. See DramTier.adopt."""
        with self._lock:
            return self._dram.adopt(alive, self._timed(None))

    def trim(self, namespace: bytes, limit: int) -> None:
        """Keep a namespace within `limit` slots. See DramTier.trim."""
        with self._lock, self.faults.are_misses():
            evicted, above = self._dram.trim(namespace, limit)
            self.counters.evicted_chunks += evicted
            if above and self._grown_namespaces is not None:
                self._grown_namespaces.add(namespace)

    def take_grown_namespaces(self) -> set[bytes]:
        """Namespaces to trim: those that a remote store has added to since the last call, and those that leases kept above
        their limits."""
        with self._lock:
            grown, self._grown_namespaces = self._grown_namespaces or set(), set()
            return grown

    def pin_all(self) -> Lease:
        """A lease of every chunk, for readers nobody knows by name. Counts as no lookup, and as no use."""
        with self._lock, self.faults.are_misses():
            return self._dram.acquire_all()
        return NO_LEASE

    def track_changes(self) -> None:
        """From now on `take_changes` tells what becomes cached and what is forgotten."""
        with self._lock:
            self._dram.changes = IndexChanges()

    def take_changes(self) -> IndexChanges:
        """Since the last call. The caller takes them often: they are kept until then."""
        with self._lock:
            changes, self._dram.changes = self._dram.changes, IndexChanges()
            return changes or IndexChanges()

    def all_keys(self) -> list[bytes]:
        """All chunks that are cached."""
        with self._lock:
            return self._dram.all_keys()

    def describe_chunks(self, keys: Sequence[bytes]) -> list[dict[str, int | str]]:
        """What the headers of cached chunks say, for operators."""
        with self._lock:
            return self._dram.describe_chunks(keys)

    def usage(self) -> dict[str, int]:
        """Slots in all and free ones; the rest are READY or being written."""
        with self._lock:
            return {"slots": self._dram.num_slots, "free_slots": self._dram.num_free}

    @property
    def locked(self) -> AbstractContextManager[object]:
        """A block of it in which nothing changes, for who reads what the policy has learned."""
        return self._lock

    def _timed(self, use: Use | None) -> Use:
        return replace(use or _UNKNOWN, now_s=self._clock())

    def _end_late_leases(self) -> None:
        while self._late_leases:
            lease = self._late_leases.popleft()
            self.counters.bad_chunks += self._dram.drop_bad(lease)
            self._dram.release(lease)


T = TypeVar("T")


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
