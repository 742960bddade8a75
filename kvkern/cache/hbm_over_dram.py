"""HBM above DRAM: one cache of chunks over both tiers. Slots [0, n) are in DRAM, slots from n on are in HBM.

    reserve    new chunks take HBM's free slots first, in prefix order; the rest goes to DRAM at once. No call waits for room
    acquire    each chunk from its tier, HBM first; the prefix ends at the first chunk that is in neither tier
    spill      in the background, whenever fewer than an eighth of HBM's slots is free: copies the least recently used chunks
               down, publishes them in DRAM, then drops them in HBM, so each chunk is always in one of the tiers. A chunk that
               DRAM has already is only dropped. A chunk that DRAM has no room for stays
    promote    in the background, when a lease ends: copies its chunks from DRAM up, as far as HBM has room

A chunk that moves is read under a lease. `clear` and the start of a move exclude each other. So either the move finds that
its chunk is gone, or the clear finds the slot that is being written, and that slot is never published. This module knows
keys, not devices.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import numpy.typing as npt

from ..arena.file import Slots
from ..arena.process_identity import process_start
from ..arena.slots import SlotState
from ..errors import KvkernError
from ..metrics import CacheCounters
from ..policy.base import Use
from ..tiers.base import ChunkShape, Lease, Reservation, slot_array
from ..tiers.hbm import HbmTier, SlotMover, begin_moved_slots, finish_moved_slots
from .base import NO_LEASE, NO_RESERVATION, ONE_ROUND, Faults, RequestEnd, completed
from .manager import Cache

logger = logging.getLogger("kvkern")

MOVE_SLOTS = 32  # most slots of one move: bounds how long they are leased, not the work
_SLOTS_PER_SPARE = 8  # one slot in eight is kept free


@dataclass(frozen=True, slots=True)
class HbmOverDramLease(Lease):
    """Read rights to slots of both tiers."""

    hbm: Lease = NO_LEASE
    dram: Lease = NO_LEASE


@dataclass(frozen=True, slots=True)
class HbmOverDramReservation(Reservation):
    """Write rights to slots of both tiers."""

    hbm: Reservation = NO_RESERVATION
    dram: Reservation = NO_RESERVATION


@dataclass(slots=True)
class HbmCounters:
    """Counts of chunks in HBM."""

    hbm_hit_chunks: int = 0  # of the hits, those found in HBM
    hbm_stored_chunks: int = 0  # of the stored chunks, those stored in HBM
    hbm_spilled_chunks: int = 0  # copied down to DRAM
    hbm_promoted_chunks: int = 0  # copied up to HBM
    hbm_lost_chunks: int = 0  # dropped from HBM because the copy down failed


@dataclass(slots=True)
class HbmOverDramCounters(CacheCounters):
    """The counters that the engine sees. `snapshot` adds the faults and the remote counters of the two tiers."""

    others: tuple[CacheCounters, ...] = field(default=())

    def snapshot(self) -> dict[str, int | float]:
        """See CacheCounters."""
        own = {found.name: getattr(self, found.name) for found in fields(CacheCounters)}
        for name in own:
            if name.startswith("remote_") or name == "faults":
                own[name] += sum(getattr(other, name) for other in self.others)
        return {**own, "hit_ratio": self.hit_ratio}


class HbmManager(Cache):
    """The manager of the slots in HBM."""

    def __init__(self, tier: HbmTier) -> None:
        super().__init__(tier)
        self._tier = tier

    @property
    def num_free(self) -> int:
        """Number of free slots. It may change at any time."""
        return self._tier.num_free

    def pin_least_recent(self, count: int) -> Lease:
        """See HbmTier.pin_least_recent."""
        with self._lock, self.faults.are_misses():
            return self._tier.pin_least_recent(count)
        return NO_LEASE


class HbmCache:
    """`ChunkCache` of one engine, with HBM above the engine's own DRAM cache. Thread-safe."""

    def __init__(
        self,
        hbm: HbmManager,
        hbm_slots: Slots,
        dram: Cache,
        dram_slots: Slots,
        mover: SlotMover,
    ) -> None:
        self._hbm, self._dram = hbm, dram
        self._hbm_slots, self._dram_slots = hbm_slots, dram_slots
        self._mover = mover
        self.first_slot = dram_slots.spec.num_slots  # first slot of HBM
        self.spare = max(1, hbm_slots.spec.num_slots // _SLOTS_PER_SPARE)
        self.counters: CacheCounters = HbmOverDramCounters(others=(hbm.counters, dram.counters))
        self.hbm_counters = HbmCounters()
        self.faults: Faults = dram.faults
        self._lock = threading.Lock()  # guards the counters and the next two fields
        self._to_promote: dict[bytes, None] = {}  # chunks to promote, the newest last; at most as many as HBM's slots
        self._scheduled = False
        self._closed = threading.Event()
        self._moving = threading.Lock()  # see `clear`
        self._owner = (os.getpid(), process_start(os.getpid()))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvkern-spill")

    # -- what engines call ---------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> int:
        """See ChunkCache."""
        here = self._hbm.present_keys(keys)
        below = iter(range(self._dram.lookup([key for key in keys if key not in here])))
        return next((i for i, key in enumerate(keys) if key not in here and next(below, None) is None), len(keys))

    def acquire(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Lease:
        """See ChunkCache."""
        return self.acquire_soon(keys, prefix, use).result()

    def acquire_soon(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Future[Lease]:
        """See ChunkCache."""
        hbm = self._hbm.acquire(keys, prefix=False, use=use)
        here = set(hbm.keys)
        result: Future[Lease] = Future()

        def joined(below: Future[Lease]) -> None:
            if (error := below.exception()) is not None:
                self._hbm.release(hbm)
                result.set_exception(error)
            else:
                result.set_result(self._join_leases(keys, prefix, hbm, below.result()))

        try:
            if here:
                self._dram.touch(keys, use)  # so DRAM's policy learns of the whole sequence
            self._dram.acquire_soon([key for key in keys if key not in here], prefix, use).add_done_callback(joined)
        except BaseException:
            self._hbm.release(hbm)
            raise
        return result

    def count_lookups(self, lookups: int, hits: int) -> None:
        """See ChunkCache."""
        with self._lock:
            self.counters.lookup_chunks += lookups
            self.counters.hit_chunks += hits

    def release(self, lease: Lease) -> int:
        """See ChunkCache."""
        if not isinstance(lease, HbmOverDramLease):
            return 0
        bad = self._hbm.release(lease.hbm) + self._dram.release(lease.dram)
        with self._lock:
            self.counters.bad_chunks += bad
            if not bad:
                self._queue_for_promotion(lease.dram.keys)
        self._schedule_moves()
        return bad

    def release_later(self, lease: Lease) -> None:
        """See ChunkCache."""
        if isinstance(lease, HbmOverDramLease):
            self._hbm.release_later(lease.hbm)
            self._dram.release_later(lease.dram)

    def reserve(
        self, chain: Sequence[bytes], wanted: Sequence[bytes], shape: ChunkShape, use: Use | None = None
    ) -> Reservation:
        """See ChunkCache."""
        have = self._hbm.present_keys(wanted, writing=True) | self._dram.present_keys(wanted, writing=True)
        fresh = [key for key in dict.fromkeys(wanted) if key not in have]
        hbm = self._hbm.reserve(chain, fresh[: self._hbm.num_free], shape, use)
        here = self._hbm.present_keys(fresh, writing=True)
        rest = [key for key in fresh if key not in here]
        try:
            dram = self._dram.reserve(chain, rest, shape, use) if rest else NO_RESERVATION
        except BaseException:
            self._hbm.abort(hbm)
            raise
        with self._lock:
            self.counters.dropped_chunks += dram.dropped
            self.counters.declined_chunks += dram.declined
            self.counters.evicted_chunks += len(dram.evicted)
        return HbmOverDramReservation(
            keys=(*hbm.keys, *dram.keys),
            slots=(*(slot + self.first_slot for slot in hbm.slots), *dram.slots),
            generations=(*hbm.generations, *dram.generations),
            dropped=dram.dropped,
            declined=dram.declined,
            evicted=dram.evicted,
            chain=tuple(chain),
            hbm=hbm,
            dram=dram,
        )

    @property
    def round_chunks(self) -> int:
        """See ChunkCache. No store needs a second round, which could evict what the first one stored."""
        return ONE_ROUND

    def room(self, wanted: Sequence[bytes]) -> int:
        """Return all: `reserve` never needs to wait for slots."""
        return len(wanted)

    def commit(self, reservation: Reservation) -> int:
        """See ChunkCache."""
        if not isinstance(reservation, HbmOverDramReservation):
            return 0
        above, below = self._hbm.commit(reservation.hbm), self._dram.commit(reservation.dram)
        keys, known = reservation.keys, above + below
        if known < len(keys):
            known = len(self._hbm.present_keys(keys) | self._dram.present_keys(keys))
        with self._lock:
            self.counters.note_stored(len(reservation.slots), above + below, known)
            self.hbm_counters.hbm_stored_chunks += above
        self._schedule_moves()
        return above + below

    def commit_soon(self, reservation: Reservation) -> Future[int]:
        """See ChunkCache. The result is there at once."""
        return completed(self.commit(reservation))

    def abort(self, reservation: Reservation) -> None:
        """See ChunkCache."""
        if isinstance(reservation, HbmOverDramReservation):
            self._hbm.abort(reservation.hbm)
            self._dram.abort(reservation.dram)

    def finish(self, use: Use, request_end: RequestEnd | None = None) -> None:
        """See ChunkCache."""
        self._hbm.finish(use)
        self._dram.finish(use, request_end)

    def note_prefill(self, tokens_s: float) -> None:
        """See ChunkCache."""
        self._dram.note_prefill(tokens_s)

    def clear(self, namespace: bytes | None = None) -> int:
        """See ChunkCache. A chunk in both tiers counts twice."""
        with self._moving:
            count = self._hbm.clear(namespace) + self._dram.clear(namespace)
        with self._lock:
            self.counters.cleared_chunks += count
        return count

    def clear_soon(self, namespace: bytes) -> Future[int]:
        """See ChunkCache. The result is there at once."""
        return completed(self.clear(namespace))

    def describe_namespace(self, root: bytes, fields: dict[str, str]) -> None:
        """See ChunkCache."""
        self._dram.describe_namespace(root, fields)

    def usage(self) -> dict[str, int]:
        """Return the slots of DRAM and of HBM, and the counts of HbmCounters."""
        hbm = self._hbm.usage()
        with self._lock:
            moved = asdict(self.hbm_counters)
        return {**self._dram.usage(), "hbm_slots": hbm["slots"], "hbm_free_slots": hbm["free_slots"], **moved}

    @property
    def shared(self) -> bool:
        """False: only one engine uses this cache."""
        return False

    def wait_for_moves(self) -> None:
        """Wait until no chunk is left to spill or promote."""
        while self._scheduled:
            with suppress(RuntimeError):  # closed meanwhile
                self._pool.submit(lambda: None).result()

    def close(self) -> None:
        """End after the present move. Chunks that are only in HBM are lost. The owner of DRAM's manager closes it."""
        self._closed.set()
        with suppress(RuntimeError):  # closed before
            self._pool.submit(self._mover.close)
        self._pool.shutdown(wait=True)

    # -- leases of both tiers ------------------------------------------------------------------------------------------

    def _join_leases(self, keys: Sequence[bytes], prefix: bool, hbm: Lease, dram: Lease) -> HbmOverDramLease:
        """Join two leases into one, in the order of `keys`. Releases HBM's chunks behind the end of the prefix."""
        here, there = set(hbm.keys), set(dram.keys)
        from_hbm, from_dram = iter(hbm.slots), iter(dram.slots)
        found: list[tuple[bytes, int]] = []
        num_hbm = 0
        for key in keys:
            if key in here:
                found.append((key, next(from_hbm) + self.first_slot))
                num_hbm += 1
            elif key in there and (slot := next(from_dram, None)) is not None:
                found.append((key, slot))
            elif prefix:
                break
        if num_hbm < len(hbm.slots):
            self._hbm.release(Lease(hbm.keys[num_hbm:], hbm.slots[num_hbm:]))
            hbm = Lease(hbm.keys[:num_hbm], hbm.slots[:num_hbm])
        with self._lock:
            self.counters.lookup_chunks += len(keys)
            self.counters.hit_chunks += len(found)
            self.hbm_counters.hbm_hit_chunks += num_hbm
        return HbmOverDramLease(tuple(key for key, _ in found), tuple(slot for _, slot in found), hbm=hbm, dram=dram)

    # -- moves, on this object's own thread ----------------------------------------------------------------------------

    def _queue_for_promotion(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._to_promote.pop(key, None)
            self._to_promote[key] = None
        while len(self._to_promote) > self._hbm_slots.spec.num_slots:
            del self._to_promote[next(iter(self._to_promote))]

    def _schedule_moves(self) -> None:
        """Start the moves on the background thread if there are any and none is running."""
        with self._lock:
            if self._scheduled or self._closed.is_set() or not (self._to_promote or self._hbm.num_free < self.spare):
                return
            self._scheduled = True
        with suppress(RuntimeError):  # closed meanwhile
            self._pool.submit(self._run_moves)

    def _run_moves(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                wanted, self._to_promote = list(self._to_promote), {}
            try:
                with self.faults.are_misses():
                    for at in range(0, len(wanted), MOVE_SLOTS):
                        self._promote(wanted[at : at + MOVE_SLOTS])
                with self.faults.are_misses():
                    self._make_room()
            except KvkernError as error:  # no caller waits for this thread
                logger.warning(
                    "kvkern: some chunks were not moved between HBM and DRAM: %(error)s. Chunks that are not in DRAM "
                    "are computed again. Leave the option `hbm` out if this happens again",
                    {"event": "hbm_chunks_lost", "error": error},
                )
                with self._lock:
                    self.counters.faults += 1
            with self._lock:
                if not self._to_promote:
                    self._scheduled = False
                    return

    def _make_room(self) -> None:
        """Spill until the spare slots are free, or no chunk can go. The next release or commit tries again."""
        while (short := self.spare - self._hbm.num_free) > 0 and not self._closed.is_set():
            if not self._spill(min(short, MOVE_SLOTS)):
                return

    def _spill(self, count: int) -> bool:
        """Free up to `count` slots of HBM. Returns True if any slot became free. Chunks that DRAM has no room for stay."""
        before = self._hbm.num_free
        lease = self._hbm.pin_least_recent(count)
        moved, gone = 0, set(lease.keys)  # after a failed copy all go, so that no chunk is tried forever
        try:
            moved = self._copy_between_tiers(lease, self._hbm_slots, self._dram, self._dram_slots, self._down)
            gone = self._dram.present_keys(lease.keys)
        except BaseException:
            with self._lock:
                self.hbm_counters.hbm_lost_chunks += len(gone - self._dram.present_keys(lease.keys))
            raise
        finally:
            self._hbm.drop([key for key in lease.keys if key in gone])
            self._hbm.release(lease)
            with self._lock:
                self.hbm_counters.hbm_spilled_chunks += moved
        return self._hbm.num_free > before

    def _promote(self, keys: list[bytes]) -> None:
        lease = self._dram.lease(keys[: self._hbm.num_free], prefix=False)
        try:
            moved = self._copy_between_tiers(lease, self._dram_slots, self._hbm, self._hbm_slots, self._up)
        finally:
            self._dram.release(lease)
        with self._lock:
            self.hbm_counters.hbm_promoted_chunks += moved

    def _down(self, at: npt.NDArray[np.int64], to: npt.NDArray[np.int64]) -> None:
        self._mover.copy_down(at, to)

    def _up(self, at: npt.NDArray[np.int64], to: npt.NDArray[np.int64]) -> None:
        self._mover.copy_up(to, at)

    def _copy_between_tiers(
        self,
        lease: Lease,  # in `source`
        source: Slots,
        other: Cache,
        target: Slots,  # of `other`
        copy: Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], None],
    ) -> int:
        """Copy to the other tier the chunks that it lacks and has room for, heads first. Returns how many were published.

        Chunks that were cleared meanwhile are not copied.
        """
        with self._moving:
            known = other.present_keys(lease.keys)
            slots = slot_array(lease.slots)
            ready = (source.headers["state"][slots] == SlotState.READY).tolist()
            at = slots[[ok and key not in known for key, ok in zip(lease.keys, ready, strict=True)]]
            at = at[np.argsort(source.headers["position"][at], kind="stable")]  # heads first, as policies expect
            grant = other.grant(len(at))
            count = len(grant.slots)
            at = at[:count]
            to, generations = slot_array(grant.slots), np.array(grant.generations, dtype=np.uint64)
            begin_moved_slots(source, at, target, to, generations, self._owner)
        try:
            copy(at, to)
        except BaseException:
            other.give_back(grant.slots)
            raise
        finish_moved_slots(source, at, target, to, generations)
        published = 0
        namespaces = target.headers["namespace"][to]
        for namespace in dict.fromkeys(bytes(root) for root in namespaces):
            of = np.flatnonzero(namespaces == np.void(namespace))
            keys = tuple(bytes(key) for key in target.headers["key"][to[of]])
            part = Reservation(keys, tuple(to[of].tolist()), tuple(generations[of].tolist()))
            published += sum(other.publish(part, namespace))
        with self._lock:
            self.counters.evicted_chunks += len(grant.evicted)
        return published
