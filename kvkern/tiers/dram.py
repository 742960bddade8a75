"""The DRAM tier: which chunk is in which slot of the arena. Allocates, evicts and publishes; never touches payload.

    FREE -> WRITING   reserve: a writer owns the slot, the index already knows the key (so nobody writes it twice)
    WRITING -> READY  commit: every rank has marked its part written under this generation
    WRITING -> FREE   abort, or the cache was cleared meanwhile
    READY -> FREE     eviction (never while pinned), drop, clear

Not thread-safe: `Cache` holds the lock. Every structure is bounded by the number of slots.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..arena import Arena, process_start
from ..errors import ConfigError
from ..keys import KEY_NBYTES
from ..policy.base import EvictionPolicy
from ..slots import HEAD, SlotState

Keys = Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Lease:
    """Read rights to the slots of a prefix. They stay as they are until `release`; release exactly once."""

    keys: tuple[bytes, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Write rights to free slots for chunks nobody has. Ends with `commit` or `abort`, exactly once."""

    keys: tuple[bytes, ...]
    slots: tuple[int, ...]
    generations: tuple[int, ...]  # what each rank writes into the header's `written`
    dropped: int = 0  # chunks that found no room: everything else is leased or being written
    evicted: tuple[bytes, ...] = ()
    chain: tuple[bytes, ...] = field(default=(), repr=False)  # the sequence from its first chunk on
    epoch: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """Header fields that are the same for every chunk of a KV group; the sizes are the arena's."""

    namespace: bytes  # 32-byte root
    group: int
    chunk_tokens: int


class DramTier:
    """Index, free list and leases over one arena."""

    def __init__(self, arena: Arena, policy: EvictionPolicy) -> None:
        num_slots = arena.spec.num_slots
        self._arena = arena
        self._policy = policy
        self._index: dict[bytes, int] = {}  # READY
        self._writing: dict[bytes, int] = {}  # WRITING
        self._key_of: list[bytes | None] = [None] * num_slots
        self._state: list[SlotState] = [SlotState.FREE] * num_slots
        self._pins: list[int] = [0] * num_slots
        self._doomed: set[int] = set()  # pinned slots that are freed with their last lease
        self._free: list[int] = list(range(num_slots - 1, -1, -1))
        self._epoch = 0
        self._owner = (os.getpid(), process_start(os.getpid()))

    def __len__(self) -> int:
        return sum(1 for state in self._state if state is SlotState.READY)

    @property
    def num_slots(self) -> int:
        """Capacity in chunks."""
        return len(self._state)

    @property
    def num_free(self) -> int:
        """Slots nobody owns."""
        return len(self._free)

    def contains(self, keys: Keys) -> int:
        """Length of the longest READY prefix of `keys`. No side effect."""
        hits = map(self._index.__contains__, keys)
        return next((count for count, hit in enumerate(hits) if not hit), len(keys))

    def acquire(self, keys: Keys, prefix: bool = True) -> Lease:
        """Pin the longest READY prefix of `keys`, or every READY one of them with `prefix=False` (sliding windows)."""
        if prefix:
            keys = keys[: self.contains(keys)]
        else:
            keys = [key for key in keys if key in self._index]
        slots, pins = tuple(map(self._index.__getitem__, keys)), self._pins
        fresh = []
        for slot in slots:
            if not pins[slot]:
                fresh.append(slot)
            pins[slot] += 1
        self._policy.pin(fresh)
        return Lease(tuple(keys), slots)

    def release(self, lease: Lease) -> None:
        """End a lease; its slots become evictable again, or free if they were dropped meanwhile."""
        pins, doomed = self._pins, self._doomed
        idle = []
        for slot in lease.slots:
            pins[slot] -= 1
            if pins[slot] == 0:
                idle.append(slot)
        if doomed:
            dead = doomed.intersection(idle)
            doomed -= dead
            idle = [slot for slot in idle if slot not in dead]
            self._recycle(list(dead))
        self._policy.unpin(idle)

    def touch(self, keys: Keys) -> None:
        """Used now, though nobody reads them here: an engine hit them in its own cache."""
        self._policy.touch(self._resident(keys))

    def reserve(self, chain: Keys, wanted: Keys, shape: ChunkShape) -> Reservation:
        """Slots for those of `wanted` that are neither READY nor WRITING, evicting others if need be.

        `chain` is the sequence from its first chunk: its resident chunks count as used now and are not evicted for
        `wanted`, so that ancestors stay longer than what hangs on them. If leases leave too little room, the first
        of `wanted` get it.
        """
        resident = self._resident(chain)
        self._policy.touch(resident)
        for key in wanted:
            if len(key) != KEY_NBYTES:
                raise ConfigError(f"a key has {len(key)} bytes; chunk keys have {KEY_NBYTES}")
        missing = [key for key in dict.fromkeys(wanted) if key not in self._index and key not in self._writing]
        evicted = self._evict(len(missing) - len(self._free), resident)
        granted = missing[: len(self._free)]
        slots = [self._free.pop() for _ in granted]
        generations = self._begin(granted, slots, shape)
        return Reservation(
            tuple(granted), tuple(slots), tuple(generations),
            len(missing) - len(granted), tuple(evicted), tuple(chain), self._epoch,
        )  # fmt: skip

    def commit(self, reservation: Reservation) -> int:
        """Publish what every rank has written; free the rest. Returns the number of chunks published."""
        headers = self._arena.headers
        slots = np.array(reservation.slots, dtype=np.int64)
        generations = np.array(reservation.generations, dtype=np.uint64)
        written = (headers["written"][slots] == generations[:, None]).all(axis=1)
        if reservation.epoch != self._epoch:
            written[:] = False
        ready = [slot for slot, ok in zip(reservation.slots, written, strict=True) if ok]
        headers["state"][ready] = SlotState.READY
        for slot in ready:
            self._state[slot] = SlotState.READY
            if (key := self._key_of[slot]) is not None:
                self._index[key] = self._writing.pop(key)
        self._policy.insert(ready)
        self._policy.touch(self._resident(reservation.chain))  # else a tail would be newer than its ancestors
        self._recycle([slot for slot, ok in zip(reservation.slots, written, strict=True) if not ok])
        return len(ready)

    def abort(self, reservation: Reservation) -> None:
        """Give the slots back. Only when no writer can still be writing them."""
        self._recycle(reservation.slots)

    def drop_bad(self, lease: Lease) -> int:
        """Forget the slots of this lease that a reader marked BAD; they are freed with their last lease. Returns the count."""
        slots = np.array(lease.slots, dtype=np.int64)
        bad: list[int] = slots[self._arena.headers["state"][slots] == SlotState.BAD].tolist()
        return self._drop(bad)

    def clear(self) -> int:
        """Forget everything. What is being written stays its writer's until commit or abort frees it. Returns the count."""
        self._epoch += 1
        for slot in self._writing.values():  # a new writer of the same key gets a slot of its own
            self._key_of[slot] = None
        count = len(self._writing) + self._drop(list(self._index.values()))
        self._writing.clear()
        return count

    def _drop(self, slots: Iterable[int]) -> int:
        """READY slots leave the index now; pinned ones are freed with their last lease. Returns how many were in it."""
        count = 0
        for slot in slots:
            key = self._key_of[slot]
            if key is None:
                continue  # dropped before, still leased
            count += 1
            if self._pins[slot]:
                del self._index[key]
                self._key_of[slot] = None
                self._doomed.add(slot)
            else:
                self._policy.remove([slot])
                self._recycle([slot])
        return count

    def _resident(self, keys: Keys) -> list[int]:
        get = self._index.get
        return [slot for key in keys if (slot := get(key)) is not None]

    def _evict(self, count: int, keep: Sequence[int]) -> list[bytes]:
        if count <= 0:
            return []
        victims = self._policy.victims(count, set(keep))
        keys = [key for slot in victims if (key := self._key_of[slot]) is not None]
        self._recycle(victims)
        return keys

    def _recycle(self, slots: Sequence[int]) -> None:
        for slot in slots:
            key = self._key_of[slot]
            if key is not None:
                del (self._writing if self._state[slot] is SlotState.WRITING else self._index)[key]
                self._key_of[slot] = None
            self._state[slot] = SlotState.FREE
        self._arena.headers["state"][list(slots)] = SlotState.FREE
        self._free.extend(slots)

    def _begin(self, keys: Sequence[bytes], slots: Sequence[int], shape: ChunkShape) -> list[int]:
        """Headers of new WRITING slots; the generation moves on, so a late writer of an old one changes nothing."""
        if not slots:
            return []
        for key, slot in zip(keys, slots, strict=True):
            self._writing[key] = slot
            self._key_of[slot] = key
            self._state[slot] = SlotState.WRITING
        at = np.array(slots, dtype=np.int64)
        generations: npt.NDArray[np.uint64] = self._arena.headers["generation"][at] + np.uint64(1)
        values = {
            "identity": self._arena.spec.geometry.identities(np.frombuffer(b"".join(keys), "V32"), shape.namespace),
            "generation": generations, "owner_pid": self._owner[0], "owner_start": self._owner[1],
            "state": SlotState.WRITING, "codec": 0, "group": shape.group, "chunk_tokens": shape.chunk_tokens,
        }  # fmt: skip
        heads = np.empty(len(at), dtype=HEAD)
        for name, value in values.items():
            heads[name] = value
        self._arena.heads[at] = heads.view(self._arena.heads.dtype)
        return generations.tolist()  # type: ignore[no-any-return]
