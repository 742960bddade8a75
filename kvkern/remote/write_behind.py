"""The queue of chunks to write, the most valuable first. Bounded. Filled under the cache's lock, emptied by the tier's loop.

    worth    P(use) if the policy predicts it, else 0; among equals heads before tails, since a tail needs its heads
    full     the chunks that are worth least are dropped and counted

There are two kinds of entries. In the modes all and hot, the chunk is cached; it is leased when its turn comes, if it is
still there. In the modes evicted and predicted, the entry owns the slot of an evicted chunk; the queue gives such slots
back unwritten when the DRAM tier needs them.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ..metrics import CacheCounters
from ..policy.base import EvictionPolicy, Keys
from ..policy.persist_modes import Persist
from ..tiers.slot_records import SlotRecords
from .cost_model import PROBE_CHUNKS, CostModel

NO_SLOT = -1


@runtime_checkable
class Predicts(Protocol):
    """A policy that predicts how likely a chunk is used again."""

    def chances(self, keys: Keys, horizon_s: float) -> list[float]:
        """Return for each key the probability that it is used within `horizon_s`."""


@dataclass(frozen=True, slots=True)
class PendingWrite:
    """A chunk to write."""

    key: bytes
    slot: int  # owned by the queue; NO_SLOT: the chunk is cached
    worth: tuple[float, int]  # (chance, -position)


class WriteBehind:
    """`Outbox` of kvkern/tiers/base.py."""

    def __init__(
        self,
        records: SlotRecords,
        mode: Persist,
        limit: int,  # cached chunks that may wait
        costs: CostModel,
        counters: CacheCounters,
        store_works: Callable[[], bool],  # False: the store takes nothing now
        wake: Callable[[], None],
    ) -> None:
        self._positions, self._private = records.rows["position"], records.rows["private"]
        self._tokens, self._namespaces = records.rows["chunk_tokens"], records.rows["namespace"]
        self._mode, self._limit, self._costs, self._counters = mode, limit, costs, counters
        self._store_works, self._wake = store_works, wake
        self._lock = threading.Lock()
        self._entries: dict[bytes, PendingWrite] = {}
        self._was_hit = np.zeros(len(records.rows), dtype=np.bool_)  # since the slot's chunk was stored
        self._chances: dict[bytes, float] = {}  # of the keys that `choose` returned last
        self.chunk_tokens = 0  # tokens per chunk of the chunks seen last

    def __len__(self) -> int:
        return len(self._entries)

    # -- called by the DRAM tier -----------------------------------------------------------------------------------------

    def stored(self, keys: Keys, slots: Sequence[int]) -> None:
        """See Outbox."""
        if slots:
            self.chunk_tokens = int(self._tokens[slots[0]])
        self._was_hit[list(slots)] = False
        if self._mode is Persist.ALL:
            private = self._private[list(slots)].tolist()
            stored = zip(keys, slots, private, strict=True)
            self._add(self._entry(key, NO_SLOT, slot) for key, slot, is_private in stored if not is_private)

    def hit(self, keys: Keys, slots: Sequence[int]) -> None:
        """See Outbox."""
        if slots:
            self.chunk_tokens = int(self._tokens[slots[0]])
        if self._mode is not Persist.HOT or not slots:
            return
        fresh = np.flatnonzero(~self._was_hit[list(slots)] & (self._private[list(slots)] == 0)).tolist()
        self._was_hit[list(slots)] = True
        self._add(self._entry(keys[row], NO_SLOT, slots[row]) for row in fresh)

    def admit(self, keys: Keys, policy: EvictionPolicy) -> list[bytes]:
        """See Outbox."""
        if self._mode is Persist.ALL:
            return list(keys) if self._store_works() else []
        return self.choose(keys, policy)

    def choose(self, keys: Keys, policy: EvictionPolicy) -> list[bytes]:
        """See Outbox."""
        if self._mode not in (Persist.EVICTED, Persist.PREDICTED) or not keys:
            return []
        if not self._store_works():
            self.count_dropped(len(keys))
            return []
        if self._mode is Persist.EVICTED or not isinstance(policy, Predicts):
            self._chances = {}
            return list(keys)
        threshold = self._costs.write_threshold(self.chunk_tokens)
        chances = policy.chances(keys, self._costs.residency_s)
        self._chances = {key: chance for key, chance in zip(keys, chances, strict=True) if chance > threshold}
        if not self._chances and self._costs.write_probe_is_due():
            hoped = self._costs.write_threshold(self.chunk_tokens, as_if_fast=True)
            likely = heapq.nlargest(PROBE_CHUNKS, zip(chances, keys, strict=True))
            self._chances = {key: chance for chance, key in likely if chance > hoped}
        return list(self._chances)

    def depart(self, keys: Keys, slots: Sequence[int]) -> list[int]:
        """See Outbox."""
        waiting = [
            key in self._entries for key in keys
        ]  # an older copy waits: evicted before, and computed again since
        leaving = zip(keys, slots, waiting, strict=True)
        self._add(self._entry(key, slot, slot) for key, slot, twice in leaving if not twice)
        return [slot for slot, twice in zip(slots, waiting, strict=True) if twice]

    def lost(self, keys: Keys) -> None:
        """See Outbox."""
        if self._mode in (Persist.EVICTED, Persist.PREDICTED):
            self.count_dropped(len(keys))

    def recall(self, count: int) -> list[int]:
        """See Outbox."""
        with self._lock:
            idle = (entry for entry in self._entries.values() if entry.slot != NO_SLOT)
            given_up = heapq.nsmallest(count, idle, key=_worth)
            self._drop(given_up)
        return [entry.slot for entry in given_up]

    def forget(self, keys: Keys, namespace: bytes | None) -> list[int]:
        """See Outbox."""
        cleared = set(keys)

        def is_gone(entry: PendingWrite) -> bool:
            owned = entry.slot != NO_SLOT
            alike = owned and (namespace is None or bytes(self._namespaces[entry.slot]) == namespace)
            return alike or entry.key in cleared

        with self._lock:
            gone = [entry for entry in self._entries.values() if is_gone(entry)]
            self._drop(gone)
        return [entry.slot for entry in gone if entry.slot != NO_SLOT]

    # -- called on the remote tier's loop --------------------------------------------------------------------------------

    def take(self, count: int) -> list[PendingWrite]:
        """Take out up to `count` entries, the most valuable and heads first. The caller owns them and their slots."""
        with self._lock:
            taken = heapq.nlargest(count, self._entries.values(), key=_worth)
            for entry in taken:
                del self._entries[entry.key]
        return taken

    def count_dropped(self, count: int) -> None:
        """Count chunks that will not be written after all. Call it from any thread."""
        with self._lock:
            self._counters.remote_dropped_chunks += count

    # -- inside --------------------------------------------------------------------------------------------------------

    def _entry(self, key: bytes, owned: int, slot: int) -> PendingWrite:
        return PendingWrite(key, owned, (self._chances.get(key, 0.0), -int(self._positions[slot])))

    def _add(self, entries: Iterable[PendingWrite]) -> None:
        with self._lock:
            for entry in entries:
                self._entries.setdefault(entry.key, entry)
            resident = [entry for entry in self._entries.values() if entry.slot == NO_SLOT]
            if len(resident) > self._limit:
                self._drop(heapq.nsmallest(len(resident) - self._limit, resident, key=_worth))
        self._wake()

    def _drop(self, entries: Iterable[PendingWrite]) -> None:
        for entry in entries:
            del self._entries[entry.key]
            self._counters.remote_dropped_chunks += 1


def _worth(entry: PendingWrite) -> tuple[float, int]:
    return entry.worth
