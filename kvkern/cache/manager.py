"""The manager: which chunks are cached, read and written. Thread-safe. Knows keys and slots, not tensors or engines.

One lock guards its state. Faults become misses: see cache/base.py. Calls are batched, in prefix order, and their cost is
linear in the number of chunks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager

from msgspec.structs import replace

from ..metrics import CacheCounters, CacheObserver, CountedRequests, Unobserved
from ..policy.base import Use
from ..tiers.base import AdoptionResult, ChunkShape, IndexChanges, Lease, Outbox, Reservation, slot_array
from ..tiers.dram import DramTier
from ..tiers.slot_records import SlotRecords
from .base import NO_LEASE, NO_RESERVATION, ONE_ROUND, BackingTier, Faults, RequestEnd, completed

logger = logging.getLogger("kvkern")

DRAIN_S = 2.0  # what `close` gives waiting writes to the remote store
_UNKNOWN = Use()


class Cache:
    """A cache over the node's DRAM tier. It holds chunks of all namespaces: a key already names model, weights and tenant."""

    def __init__(
        self,
        dram: DramTier,
        clock: Callable[[], float] = time.monotonic,  # seconds; sets the time of every use, whatever its caller says
        counters: CacheCounters | None = None,  # of an earlier cache that this one replaces; None: all start at 0
        observer: CacheObserver | None = None,
    ) -> None:
        self._dram = dram
        self._clock = clock
        self.observer: CacheObserver = observer or Unobserved()
        self._lock = threading.Lock()
        self._late_leases: deque[Lease] = deque()  # leases to end at the next call, see release_later
        self._remote: BackingTier | None = None
        self._grown_namespaces: set[bytes] | None = (
            None  # namespaces that may be above their quotas; None: there are no quotas
        )
        self.counters = counters or CacheCounters()
        self._counted = CountedRequests()
        self.faults = Faults(self.counters)

    def lookup(self, keys: Sequence[bytes]) -> int:
        """Return the length of the longest prefix of `keys` that can be acquired now. Pins and counts nothing."""
        with self._lock, self.faults.are_misses():
            self._end_late_leases()
            return self._dram.contains(keys)
        return 0

    def attach_remote(self, remote: BackingTier, outbox: Outbox, spare: int) -> None:
        """Read chunks from a remote store and write chunks to it from now on.

        `spare` slots are kept free, so that new chunks need not wait for evicted chunks that are still being written there.
        """
        with self._lock:
            self._remote, self._dram.outbox, self._dram.spare = remote, outbox, spare

    def acquire(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Lease:
        """Pin the longest cached prefix. With `prefix=False` (for sliding-window groups), pin all cached chunks.

        The caller may read the slots until it calls `release`. It must call `release` exactly once, also for an empty lease.
        If there is a remote store, the call waits for the chunks from there.
        """
        return self.acquire_soon(keys, prefix, use).result()

    def _acquire(self, keys: Sequence[bytes], prefix: bool, use: Use) -> tuple[Lease, Use]:
        """Return what DRAM has, and the use for the remote tier: a question that was counted before does not count there."""
        with self._lock, self.faults.are_misses():
            self._end_late_leases()
            lease = self._dram.acquire(keys, prefix, self._timed(use))
            if not use.counts_itself:
                new = self._counted.num_new(use.request, keys)
                hits = len(lease.keys)
                if new < len(keys):
                    hits = sum(map(set(keys[len(keys) - new :]).__contains__, lease.keys))
                self.counters.lookup_chunks += new
                self.counters.hit_chunks += hits
                self.observer.looked_up("dram", use.namespace, use.client, new, hits, use.counts_tokens)
                if self._remote is None:
                    self.observer.not_loaded("not_found", use.request, new - hits)
                if not new:
                    use = replace(use, counts_itself=True)
            return lease, use
        return NO_LEASE, use

    def count_lookups(self, lookups: int, hits: int) -> None:
        """See ChunkCache."""
        with self._lock:
            self.counters.lookup_chunks += lookups
            self.counters.hit_chunks += hits

    def acquire_soon(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Future[Lease]:
        """See ChunkCache. The result is there at once, unless chunks come from a remote store."""
        lease, use = self._acquire(keys, prefix, use or _UNKNOWN)
        if self._remote is None or len(lease.keys) == len(keys):
            return completed(lease)
        return self._remote.extend(lease, keys, prefix, use)

    def release(self, lease: Lease) -> int:
        """End a lease. Drops the chunks that the reader marked BAD, and returns their number."""
        with self._lock, self.faults.are_misses():
            return self._end_lease(lease)
        return 0

    def release_later(self, lease: Lease) -> None:
        """Put the lease aside. The next lookup or store ends it.

        For finalizers, which may run while their thread holds the lock.
        """
        self._late_leases.append(lease)

    def touch(self, keys: Sequence[bytes], use: Use | None = None) -> None:
        """Count these chunks as used. The engine hit them in its own cache."""
        with self._lock, self.faults.are_misses():
            self._dram.touch(keys, self._timed(use))

    def finish(self, use: Use, request_end: RequestEnd | None = None) -> None:
        """See ChunkCache."""
        if request_end is not None and request_end.prefill_tokens_s:
            self.note_prefill(request_end.prefill_tokens_s, use.client)
        self.touch((), use)

    def note_prefill(self, tokens_s: float, client: int = 0) -> None:
        """See ChunkCache. `client` is the number of a daemon's client."""
        if tokens_s > 0:
            self.observer.prefill(tokens_s, client)
        if self._remote is not None:
            self._remote.note_prefill(tokens_s, client)

    def forget_client(self, client: int) -> None:
        """Forget what a daemon's client that is gone has noted."""
        self.observer.prefill(0.0, client)
        if self._remote is not None:
            self._remote.forget_client(client)

    def reserve(
        self, chain: Sequence[bytes], wanted: Sequence[bytes], shape: ChunkShape, use: Use | None = None
    ) -> Reservation:
        """Reserve slots for the chunks of `wanted` that are neither cached nor being written. See DramTier.reserve."""
        with self._lock, self.faults.are_misses():
            self._end_late_leases()
            reservation = self._dram.reserve(chain, wanted, shape, self._timed(use))
            self.counters.dropped_chunks += reservation.dropped
            self.counters.declined_chunks += reservation.declined
            self.counters.evicted_chunks += len(reservation.evicted)
            return reservation
        return NO_RESERVATION

    @property
    def round_chunks(self) -> int:
        """See ChunkCache. No store needs a second round, which could evict what the first one stored."""
        return ONE_ROUND

    def room(self, wanted: Sequence[bytes]) -> int:
        """Return all: `reserve` never needs to wait for slots."""
        return len(wanted)

    def commit_soon(self, reservation: Reservation) -> Future[int]:
        """See ChunkCache. The result is there at once."""
        return completed(self.commit(reservation))

    def commit(self, reservation: Reservation) -> int:
        """Publish the chunks that every rank has written, and free the others. Returns how many were published."""
        with self._lock, self.faults.are_misses():
            stored = self._dram.commit(reservation)
            self._note_stored(reservation, stored)
            self.observer.stored("dram", b"", 0, stored, stored)  # an engine counts its tokens itself
            return stored
        return 0

    def abort(self, reservation: Reservation) -> None:
        """See ChunkCache."""
        with self._lock, self.faults.are_misses():
            self._dram.abort(reservation)

    def clear(self, namespace: bytes | None = None, fresh: Collection[int] = ()) -> int:
        """Forget all chunks, or those of a namespace (32-byte root). Returns how many. `fresh`: see DramTier.clear.

        A slot that is being read or written is freed when its lease or reservation ends.
        """
        with self._lock, self.faults.are_misses():
            count = self._dram.clear(namespace, fresh)
            self.counters.cleared_chunks += count
            return count
        return 0

    def clear_soon(self, namespace: bytes) -> Future[int]:
        """See ChunkCache. The result is there at once."""
        return completed(self.clear(namespace))

    def describe_namespace(self, root: bytes, fields: dict[str, str]) -> None:
        """Do nothing: an embedded cache serves one engine, and that engine knows its namespaces."""

    @property
    def shared(self) -> bool:
        """False: only one engine uses an embedded cache."""
        return False

    def close(self) -> None:
        """End the remote tier. Its waiting writes get at most DRAIN_S seconds. The owner of the arena closes the arena."""
        if self._remote is not None:
            self._remote.close(DRAIN_S)

    def drop(self, keys: Sequence[bytes]) -> int:
        """Forget these chunks. Returns how many were cached."""
        with self._lock, self.faults.are_misses():
            count = self._dram.drop(keys)
            self.counters.cleared_chunks += count
            return count
        return 0

    # -- for a tier above ------------------------------------------------------------------------------------------------

    def present_keys(self, keys: Sequence[bytes], writing: bool = False) -> set[bytes]:
        """Return the keys that are READY, and with `writing` also those being written. Pins and counts nothing."""
        with self._lock, self.faults.are_misses():
            return self._dram.present_keys(keys, writing)
        return set()

    # -- for the remote tier ---------------------------------------------------------------------------------------------

    def lease(self, keys: Sequence[bytes], prefix: bool = True, hit: bool = False) -> Lease:
        """Pin the longest READY prefix, or all READY chunks. Counts no lookup and no use, and hits only if `hit`."""
        with self._lock, self.faults.are_misses():
            lease = self._dram.lease(keys[: self._dram.contains(keys)] if prefix else keys)
            self.counters.hit_chunks += len(lease.keys) * hit
            return lease
        return NO_LEASE

    def promote(self, reservation: Reservation, namespace: bytes, use: Use | None, pin: bool, prefix: bool) -> Lease:
        """Publish chunks that came from a remote store. Returns a lease for their reader, empty without `pin`."""
        with self._lock, self.faults.are_misses():
            self._dram.publish(reservation, namespace, self._timed(use), computed=False)
            keys = reservation.keys if pin else ()
            lease = self._dram.lease(keys[: self._dram.contains(keys)] if prefix else keys)
            if use is None or not use.counts_itself:
                self.counters.hit_chunks += len(lease.keys)
            if self._grown_namespaces is not None:
                self._grown_namespaces.add(namespace)
            return lease
        return NO_LEASE

    def free_departed(self, slots: Sequence[int]) -> None:
        """Free the slots of evicted chunks that the outbox has written or given up."""
        with self._lock, self.faults.are_misses():
            self._dram.free_departed(slots)

    # -- for a daemon, whose clients are other processes --------------------------------------------------------------

    def grant(self, count: int) -> Reservation:
        """Reserve slots that a client fills and names. See DramTier.grant."""
        with self._lock, self.faults.are_misses():
            self._end_late_leases()
            reservation = self._dram.grant(count)
            self.counters.evicted_chunks += len(reservation.evicted)
            return reservation
        return NO_RESERVATION

    def publish(
        self, reservation: Reservation, namespace: bytes, use: Use | None = None, writer: int = 0
    ) -> list[bool]:
        """Make granted slots READY. See DramTier.publish."""
        with self._lock, self.faults.are_misses():
            published = self._dram.publish(reservation, namespace, self._timed(use), writer=writer)
            self._note_stored(reservation, sum(published))
            client, first_group = use.client if use is not None else 0, self._first_group(reservation.slots, published)
            self.observer.stored("dram", namespace, client, sum(published), first_group)
            return published
        return [False] * len(reservation.slots)

    def _first_group(self, slots: Sequence[int], published: Sequence[bool]) -> int:
        """Return how many of the published chunks are of the first KV group. What is in READY slots is recorded."""
        groups = self.records.rows["group"][slot_array(slots)].tolist()
        return sum(done and not group for done, group in zip(published, groups, strict=True))

    def _note_stored(self, reservation: Reservation, stored: int) -> None:
        known = stored
        if stored < len(reservation.keys):
            present = self._dram.present_keys(reservation.keys)
            known = sum(key in present for key in reservation.keys)
        self.counters.note_stored(len(reservation.slots), stored, known)

    def give_back(self, slots: Sequence[int]) -> None:
        """Free granted slots that come back unwritten. Call it when no writer can write them any more."""
        with self._lock, self.faults.are_misses():
            self._dram.give_back(slots)

    def adopt(self, alive: Callable[[int, int], bool]) -> AdoptionResult:
        """Take over the chunks that a former daemon left in the arena. See DramTier.adopt."""
        with self._lock:
            return self._dram.adopt(alive, self._timed(None))

    def trim(self, namespace: bytes, limit: int) -> None:
        """Evict chunks of a namespace until it has at most `limit` slots. See DramTier.trim."""
        with self._lock, self.faults.are_misses():
            evicted, above = self._dram.trim(namespace, limit)
            self.counters.evicted_chunks += evicted
            self.counters.trimmed_chunks += evicted
            if above and self._grown_namespaces is not None:
                self._grown_namespaces.add(namespace)

    def take_grown_namespaces(self) -> set[bytes]:
        """Return the namespaces to trim, and forget them.

        These are the namespaces that got chunks from a remote store since the last call, and those that leases kept above
        their limits. The first call starts the record.
        """
        with self._lock:
            grown, self._grown_namespaces = self._grown_namespaces or set(), set()
            return grown

    def pin_all(self) -> Lease:
        """Lease every chunk, because unknown processes may read them. Counts no lookup and no use."""
        with self._lock, self.faults.are_misses():
            return self._dram.acquire_all()
        return NO_LEASE

    @property
    def records(self) -> SlotRecords:
        """What the headers of complete slots said when they were published. A leased slot's record does not change."""
        return self._dram.records

    def track_changes(self) -> None:
        """Record from now on which chunks become cached and which are forgotten, for `take_changes`."""
        with self._lock:
            self._dram.changes = IndexChanges()

    def take_changes(self) -> IndexChanges:
        """Return the changes since the last call. Call it often: the record grows until then."""
        with self._lock:
            changes, self._dram.changes = self._dram.changes, IndexChanges()
            return changes or IndexChanges()

    def all_keys(self) -> list[bytes]:
        """Return the keys of all cached chunks."""
        with self._lock:
            return self._dram.all_keys()

    def keys_in(self, slots: range) -> list[bytes]:
        """Return the keys of the chunks in these slots, cached ones and some that are being written."""
        with self._lock:
            return self._dram.keys_in(slots)

    def describe_chunks(self, keys: Sequence[bytes]) -> list[dict[str, int | str]]:
        """Return the header fields of cached chunks, for operators."""
        with self._lock:
            return self._dram.describe_chunks(keys)

    def usage(self) -> dict[str, int]:
        """Return the number of slots and of free slots. The others are READY or being written."""
        with self._lock:
            return {"slots": self._dram.num_slots, "free_slots": self._dram.num_free}

    def num_ready(self) -> int:
        """Return how many chunks are cached."""
        with self._lock:
            return self._dram.num_ready

    def namespaces_of(self, slots: range) -> list[bytes]:
        """Return the namespace roots of the cached chunks in these slots."""
        with self._lock:
            return self._dram.namespaces_of(slots)

    @property
    def num_unused(self) -> int:
        """Number of free slots that no remote tier keeps free for itself."""
        with self._lock:
            return max(0, self._dram.num_free - self._dram.spare)

    @property
    def locked(self) -> AbstractContextManager[object]:
        """Context manager that holds the cache's lock, so that the policy does not change while its model is read."""
        return self._lock

    def _timed(self, use: Use | None) -> Use:
        return replace(use or _UNKNOWN, now_s=self._clock())

    def _end_late_leases(self) -> None:
        while self._late_leases:
            self._end_lease(self._late_leases.popleft())

    def _end_lease(self, lease: Lease) -> int:
        """Drop the chunks that the reader marked BAD, then end the lease. Returns their number."""
        if bad := self._dram.bad_slots(lease):
            logger.warning(
                "kvkern: %(chunks)d chunk(s) failed verification and are dropped: %(why)s If it happens again, check "
                "the host's memory, and who may use this cache",
                {"event": "chunks_bad", "chunks": len(bad), "why": self._dram.records.describe_bad(bad)},
            )  # fmt: skip
            self.counters.bad_chunks += self._dram.drop_bad(lease)
        self._dram.release(lease)
        return len(bad)
