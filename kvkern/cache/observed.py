"""An engine's cache, measured: how long it waits for leases and publications, and how many tokens it stores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future

from ..bounded_dict import BoundedDict
from ..metrics import CacheCounters, Meter
from ..policy.base import Use
from ..tiers.base import ChunkShape, Lease, Reservation
from .base import ChunkCache, Faults

MAX_STORES = 4096  # under way at the same time; an engine has a few hundred


class ObservedCache:
    """A `ChunkCache` around another one. What it does not measure goes straight to that one."""

    def __init__(self, inner: ChunkCache, meter: Meter) -> None:
        self.inner, self._meter = inner, meter
        self._stores: BoundedDict[tuple[int, int], tuple[float, int]] = BoundedDict(MAX_STORES)  # see `_name_of`
        self.counters: CacheCounters = inner.counters
        self.faults: Faults = inner.faults
        # Bound here and not looked up at each call: these are on an engine's step.
        self.lookup, self.release, self.release_later = inner.lookup, inner.release, inner.release_later
        self.count_lookups, self.room, self.abort = inner.count_lookups, inner.room, inner.abort
        self.finish, self.note_prefill, self.usage = inner.finish, inner.note_prefill, inner.usage
        self.clear, self.clear_soon, self.close = inner.clear, inner.clear_soon, inner.close
        self.describe_namespace = inner.describe_namespace

    @property
    def round_chunks(self) -> int:
        """See ChunkCache."""
        return self.inner.round_chunks

    @property
    def shared(self) -> bool:
        """See ChunkCache."""
        return self.inner.shared

    def acquire(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Lease:
        """See ChunkCache."""
        return self.acquire_soon(keys, prefix, use).result()

    def acquire_soon(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Future[Lease]:
        """See ChunkCache. Measures the time until the lease is there."""
        began = time.perf_counter()
        found = self.inner.acquire_soon(keys, prefix, use)
        found.add_done_callback(lambda _: self._meter.observe("acquire_seconds", time.perf_counter() - began))
        return found

    def reserve(
        self, chain: Sequence[bytes], wanted: Sequence[bytes], shape: ChunkShape, use: Use | None = None
    ) -> Reservation:
        """See ChunkCache. Chunks of the first KV group count as tokens; the other groups hold the same tokens."""
        began = time.perf_counter()
        reservation = self.inner.reserve(chain, wanted, shape, use)
        if reservation.slots:
            tokens = 0 if shape.group else shape.chunk_tokens
            self._stores.put(_name_of(reservation), (began, tokens))
        return reservation

    def commit(self, reservation: Reservation) -> int:
        """See ChunkCache."""
        return self.commit_soon(reservation).result()

    def commit_soon(self, reservation: Reservation) -> Future[int]:
        """See ChunkCache. Measures the publication, and the whole store."""
        began = time.perf_counter()
        stored = self.inner.commit_soon(reservation)
        if reservation.slots and (known := self._stores.pop(_name_of(reservation), None)) is not None:
            reserved, tokens = known
            stored.add_done_callback(lambda done: self._note_stored(began, reserved, tokens * done.result()))
        return stored

    def _note_stored(self, began: float, reserved: float, tokens: int) -> None:
        now = time.perf_counter()
        self._meter.observe("publish_seconds", now - began)
        self._meter.observe("update_seconds", now - reserved)
        if tokens:
            self._meter.add("stored_tokens", tokens)
            self._meter.observe("update_tokens", tokens)


def _name_of(reservation: Reservation) -> tuple[int, int]:
    """Return what names a reservation: no slot is reserved twice under one generation."""
    return reservation.slots[0], reservation.generations[0]
