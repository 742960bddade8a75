"""The DRAM tier: which chunk is in which slot of the arena. It allocates, evicts and publishes, and never touches payload.

    FREE -> WRITING   reserve: a writer owns the slot; the key is known at once, so that no chunk is written twice
                      grant: a client in another process owns the slot and names the chunk later, in the header
    WRITING -> READY  commit or publish: every rank has marked its part written under this generation
    WRITING -> FREE   abort, or the namespace was cleared meanwhile
    READY -> FREE     eviction (never while pinned), drop, clear

The policy knows the chunks that are READY and those that `reserve` gave a slot. They are pinned in it while they are leased
or being written. The policy learns of a granted chunk when the chunk is published.

Not thread-safe: `Cache` holds the lock. Every structure is bounded by the number of slots.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from msgspec.structs import replace

from ..arena.file import Slots
from ..arena.process_identity import process_start
from ..arena.slots import SlotState
from ..errors import ConfigError
from ..keys import KEY_NBYTES
from ..policy.base import EvictionPolicy, Keys, Use
from ..policy.namespace_shares import NamespaceShares
from .base import AdoptionResult, ChunkShape, IndexChanges, Lease, Outbox, Reservation, prefix_length, slot_array
from .slot_headers import begin_slots, find_left_slots
from .slot_records import SlotRecords

_UNKNOWN = Use()


class DramTier:
    """Index, free list and leases over one arena."""

    def __init__(self, arena: Slots, policy: EvictionPolicy) -> None:
        num_slots = arena.spec.num_slots
        self._arena = arena
        self._policy = policy
        self.records = SlotRecords(arena)
        self._index: dict[bytes, int] = {}  # READY
        self._writing: dict[bytes, int] = {}  # WRITING
        self._key_of: list[bytes | None] = [None] * num_slots
        self._state: list[SlotState] = [SlotState.FREE] * num_slots
        self._pins: list[int] = [0] * num_slots
        self._num_leased = 0  # slots of `_index` that are pinned
        self._doomed: set[int] = set()  # pinned slots of dropped chunks; freed with their last lease
        self._free: list[int] = list(range(num_slots - 1, -1, -1))
        self._granted: set[int] = set()  # WRITING slots whose chunk is named only in their header
        self._stale: set[int] = set()  # WRITING slots whose chunk was cleared meanwhile: never published
        self._owner = (os.getpid(), process_start(os.getpid()))
        self.changes: IndexChanges | None = None  # if set, it records the keys that become READY or cease to be
        self.outbox: Outbox | None = None
        self.spare = 0  # number of slots that are free or departing; evicted chunks are written from departing slots
        self._departing: set[int] = set()  # slots that the outbox owns

    def __len__(self) -> int:
        return sum(1 for state in self._state if state is SlotState.READY)

    @property
    def num_slots(self) -> int:
        """Capacity in chunks."""
        return len(self._state)

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    @property
    def num_ready(self) -> int:
        """Number of READY slots whose chunks can be found."""
        return len(self._index)

    def namespaces_of(self, slots: range) -> list[bytes]:
        """Return the namespace roots of the READY chunks in these slots."""
        ready = [slot for slot in slots if self._state[slot] is SlotState.READY]
        return [bytes(name) for name in self.records.rows["namespace"][ready]]

    def contains(self, keys: Keys) -> int:
        """Return the length of the longest READY prefix of `keys`. No side effect."""
        return prefix_length(keys, self._index)

    def present_keys(self, keys: Keys, writing: bool = False) -> set[bytes]:
        """Return the keys that are READY, and with `writing` also those being written. No side effect."""
        return {key for key in keys if key in self._index or (writing and key in self._writing)}

    def acquire(self, keys: Keys, prefix: bool = True, use: Use = _UNKNOWN) -> Lease:
        """Pin the longest READY prefix of `keys`. With `prefix=False` (sliding windows), pin every READY key.

        All of `keys` count as used, because policies learn from misses too.
        """
        self._policy.access(keys, use)
        lease = self._lease(keys[: self.contains(keys)]) if prefix else self.lease(keys)
        if self.outbox is not None:
            self.outbox.hit(lease.keys, lease.slots)
        return lease

    def acquire_all(self) -> Lease:
        """Pin every READY chunk. This counts as no use."""
        return self._lease(self.all_keys())

    def release(self, lease: Lease) -> None:
        """End a lease. Its slots become evictable again, or free if their chunks were dropped meanwhile."""
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
            self._free_slots(list(dead))
        self._num_leased -= len(idle)
        if idle:
            self._policy.unpin(self._keys_of(idle))

    def touch(self, keys: Keys, use: Use = _UNKNOWN) -> None:
        """Count the keys as used: an engine hit them in its own cache. Without keys, `use` says how a request ended."""
        self._policy.access(keys, use)

    def reserve(self, chain: Keys, wanted: Keys, shape: ChunkShape, use: Use = _UNKNOWN) -> Reservation:
        """Reserve slots for the chunks of `wanted` that are neither READY nor WRITING. Evicts other chunks if necessary.

        `chain` is the sequence from its first chunk, and counts as used. The policy is offered the new chunks that could
        get a slot, and names the victims: cached chunks, or some of the new chunks, which are then declined. If leases
        leave too few slots, the first chunks of `wanted` get them.
        """
        for key in wanted:
            if len(key) != KEY_NBYTES:
                raise ConfigError(f"a key has {len(key)} bytes; a chunk key has {KEY_NBYTES}; use PagedCache.keys")
        use = replace(use, namespace=shape.namespace)
        self._policy.access(chain, use)
        missing = [key for key in dict.fromkeys(wanted) if key not in self._index and key not in self._writing]
        offered = missing[: len(self._free) + len(self._index) - self._num_leased]
        if offered:
            self._policy.insert(offered, use)
        evicted, declined = self._make_room(len(offered), offered)
        if declined and self.outbox is not None and not shape.private:
            # these are written to the remote store from a spare slot; the policy names them as victims again
            room = len(self._free) - len(offered) + len(declined)
            admitted = self.outbox.admit([key for key in offered if key in declined], self._policy)[: max(0, room)]
            if admitted:
                self._policy.insert(admitted, use)
                declined.difference_update(admitted)
        kept = [key for key in offered if key not in declined] if declined else offered
        granted, left = kept[: len(self._free)], kept[len(self._free) :]
        if left:  # the policy named fewer victims than it was asked for
            self._policy.remove(left)
        if granted:
            self._policy.pin(granted)
        slots = [self._free.pop() for _ in granted]
        generations = self._begin_writing(granted, slots, shape, chain)
        return Reservation(
            tuple(granted), tuple(slots), tuple(generations), dropped=len(missing) - len(granted) - len(declined),
            declined=len(declined), evicted=tuple(evicted), chain=tuple(chain),
        )  # fmt: skip

    def commit(self, reservation: Reservation) -> int:
        """Publish the chunks that every rank has written, and free the others. Returns how many were published."""
        slots = slot_array(reservation.slots)
        written = self.records.complete(slots, np.array(reservation.generations, dtype=np.uint64)).tolist()
        good = [ok and slot not in self._stale for slot, ok in zip(reservation.slots, written, strict=True)]
        ready = [slot for slot, ok in zip(reservation.slots, good, strict=True) if ok]
        keys = [key for key, ok in zip(reservation.keys, good, strict=True) if ok]
        self._make_ready(ready, keys)
        self._unpin_with_ancestors(keys, reservation.chain)
        if self.outbox is not None:
            self.outbox.stored(keys, ready)
        self._free_slots([slot for slot, ok in zip(reservation.slots, good, strict=True) if not ok])
        return len(ready)

    def grant(self, count: int) -> Reservation:
        """Reserve up to `count` slots that a client fills and names. Evicts if necessary. The result has no keys."""
        evicted, _ = self._make_room(count, ())
        slots = [self._free.pop() for _ in range(min(count, len(self._free)))]
        for slot in slots:
            self._state[slot] = SlotState.WRITING
        self._granted.update(slots)
        generations = self.records.begin_grant(slot_array(slots))
        dropped = count - len(slots)
        return Reservation((), tuple(slots), tuple(generations.tolist()), dropped, evicted=tuple(evicted))

    def publish(
        self,
        reservation: Reservation,
        namespace: bytes,
        use: Use = _UNKNOWN,
        computed: bool = True,  # False: a remote store has them already
        writer: int = 0,  # pid of the process that has named them, for messages
    ) -> list[bool]:
        """Make granted slots READY if their header names the given key and every rank has written them. Free the others.

        Returns for each chunk whether it was published. A chunk that another writer published meanwhile is not. A writer
        that has reserved one of the published chunks is disowned: its slot is never published. The reservation's chain
        counts as used.
        """
        slots = slot_array(reservation.slots)
        generations = np.array(reservation.generations, dtype=np.uint64)
        keys = np.frombuffer(b"".join(reservation.keys), dtype="V32")
        good = self.records.complete_as(slots, generations, keys, namespace, writer)
        result = []
        for key, slot, ok in zip(reservation.keys, reservation.slots, good.tolist(), strict=True):
            fresh = ok and slot in self._granted and slot not in self._stale and key not in self._index
            result.append(fresh)
            if fresh:
                self._granted.discard(slot)
                self._disown_writers([self._writing[key]] if key in self._writing else [])
                self._make_ready([slot], [key])
            else:
                self.give_back([slot])
        use = replace(use, namespace=namespace)
        self._policy.access(reservation.chain, use)
        if published := [key for key, fresh in zip(reservation.keys, result, strict=True) if fresh]:
            self._policy.insert(published, use)
            if self.outbox is not None and computed:
                self.outbox.stored(published, [self._index[key] for key in published])
        return result

    def give_back(self, slots: Iterable[int]) -> None:
        """Free granted slots. Call it when no writer can write them any more."""
        mine = self._granted.intersection(slots)
        self._granted -= mine
        self._free_slots(sorted(mine))

    def abort(self, reservation: Reservation) -> None:
        """Free reserved slots. Call it when no writer can write them any more."""
        self._free_slots(reservation.slots)

    def bad_slots(self, lease: Lease) -> list[int]:
        """Return the slots of this lease that a reader marked BAD and whose chunks are still known."""
        slots = slot_array(lease.slots)
        bad: list[int] = slots[self._arena.headers["state"][slots] == SlotState.BAD].tolist()
        return [slot for slot in bad if self._key_of[slot] is not None] if bad else bad

    def drop_bad(self, lease: Lease) -> int:
        """Forget the chunks of `bad_slots`. Returns how many. Their slots are freed with their last lease."""
        return self._drop_slots(self.bad_slots(lease))

    def clear(self, namespace: bytes | None = None, fresh: Collection[int] = ()) -> int:
        """Forget all chunks, or those of a namespace. Returns how many.

        Chunks that are being written are never published. Granted slots in `fresh` are the exception: their writer says
        that it began them after it asked for this clear.
        """
        ready, writing = list(self._index.values()), list(self._writing.values())
        granted = np.array(list(self._granted.difference(fresh)), dtype=np.int64)
        # Nothing is recorded of granted slots yet. Those that name no chunk yet have zeros there.
        names, no_name = self._arena.headers["namespace"][granted], np.void(bytes(32))
        begun = granted[(names != no_name) & (names == (names if namespace is None else np.void(namespace)))].tolist()
        if namespace is not None:
            ready, writing = (self._slots_of_namespace(slots, namespace) for slots in (ready, writing))
        self._disown_writers(writing)  # a new writer of the same key gets a slot of its own
        self._stale.update(begun)
        if self.outbox is not None:
            self.free_departed(self.outbox.forget(self._keys_of(ready), namespace))
        return len(writing) + self._drop_slots(ready)

    def _disown_writers(self, slots: Iterable[int]) -> None:
        """Take WRITING slots away from their chunks. What is being written there is never published."""
        for slot in slots:
            if (key := self._key_of[slot]) is not None:
                del self._writing[key]
                self._key_of[slot] = None
                self._policy.remove([key])
            self._stale.add(slot)

    def adopt(self, alive: Callable[[int, int], bool], use: Use = _UNKNOWN) -> AdoptionResult:
        """Take over the chunks in an arena whose daemon has ended. Call it once, before any other method.

        READY slots whose header and payload verify are served again. Slots whose writer is `alive(pid, start)` may still be
        written or read, so they are kept. All other slots are freed. To keep slots for readers, pass an `alive` that
        returns True for every writer.
        """
        headers = self._arena.headers
        num_ready, good, unfinished, unserved = find_left_slots(self._arena, alive, self.records)
        held = [*unfinished, *unserved]
        keep: dict[bytes, int] = {}
        for key, slot in good:
            keep.setdefault(key, slot)  # a chunk may be in two slots
        taken = {*keep.values(), *held}
        self._free = [slot for slot in self._free if slot not in taken]
        headers["state"][np.array(self._free, dtype=np.int64)] = SlotState.FREE
        for slot in held:
            self._state[slot] = SlotState.WRITING
        self._granted.update(held)
        self._stale.update(held)  # their writers' reservations ended with the old daemon
        self._make_ready(list(keep.values()), list(keep))
        found: dict[bytes, list[bytes]] = {}  # namespace -> keys
        for key, slot in keep.items():
            found.setdefault(bytes(self.records.rows["namespace"][slot]), []).append(key)
        for namespace, keys in found.items():
            self._policy.insert(keys, replace(use, namespace=namespace))
        return AdoptionResult(len(keep), num_ready - len(keep), unfinished, tuple(unserved))

    def describe_chunks(self, keys: Keys) -> list[dict[str, int | str]]:
        """Return what is recorded of these chunks, for operators. Leaves out chunks that are not READY."""
        geometry = self._arena.spec.geometry
        payload_nbytes = geometry.world_size * geometry.part_nbytes
        rows = []
        for key in keys:
            if (slot := self._index.get(key)) is not None:
                record = self.records.rows[slot]
                namespace = bytes(record["namespace"]).hex()
                row: dict[str, int | str] = {"key": key.hex(), "namespace": namespace, "slot": slot}
                row |= {name: int(record[name]) for name in ("generation", "group", "chunk_tokens", "position")}
                rows.append(row | {"payload_nbytes": payload_nbytes, "leases": self._pins[slot]})
        return rows

    def all_keys(self) -> list[bytes]:
        """Return the keys of all READY chunks."""
        return list(self._index)

    def keys_in(self, slots: range) -> list[bytes]:
        """Return the keys of the chunks in these slots. Some may not be READY."""
        return [key for key in self._key_of[slots.start : slots.stop] if key is not None]

    def trim(self, namespace: bytes, limit: int) -> tuple[int, bool]:
        """Evict chunks of a namespace until it has at most `limit` slots.

        Returns how many were evicted, and whether leases keep the namespace above the limit. Without NamespaceShares it
        evicts nothing.
        """
        if not isinstance(self._policy, NamespaceShares):
            return 0, False
        named = self._policy.victims_of(namespace, self._policy.size(namespace) - limit)
        return len(self._evict(named)), self._policy.size(namespace) > limit

    def drop(self, keys: Keys) -> int:
        """Forget these chunks. Returns how many were READY."""
        return self._drop_slots([self._index[key] for key in dict.fromkeys(keys) if key in self._index])

    def _lease(self, keys: Keys) -> Lease:
        """Pin these keys. All must be READY."""
        slots, pins = tuple(map(self._index.__getitem__, keys)), self._pins
        fresh = []
        for key, slot in zip(keys, slots, strict=True):
            if not pins[slot]:
                fresh.append(key)
            pins[slot] += 1
        self._num_leased += len(fresh)
        if fresh:
            self._policy.pin(fresh)
        return Lease(tuple(keys), slots)

    def lease(self, keys: Keys) -> Lease:
        """Pin those of the keys that are READY. This counts as no use."""
        return self._lease([key for key in keys if key in self._index])

    def free_departed(self, slots: Iterable[int]) -> None:
        """Free departed slots that the outbox does not need any more."""
        mine = self._departing.intersection(slots)
        self._departing -= mine
        self._free_slots(sorted(mine))

    def _slots_of_namespace(self, slots: list[int], namespace: bytes) -> list[int]:
        at = slot_array(slots)
        found: list[int] = at[self.records.rows["namespace"][at] == np.void(namespace)].tolist()
        return found

    def _make_ready(self, slots: Sequence[int], keys: Sequence[bytes]) -> None:
        """Put chunks with complete slots into the index. The state in the header is written last."""
        for key, slot in zip(keys, slots, strict=True):
            self._writing.pop(key, None)
            self._index[key] = slot
            self._key_of[slot] = key
            self._state[slot] = SlotState.READY
        if self.changes is not None:
            self.changes.note(keys, ready=True)
        self._arena.headers["state"][list(slots)] = SlotState.READY

    def _unpin_with_ancestors(self, keys: Sequence[bytes], chain: Keys) -> None:
        """Unpin written chunks, and keep the order that no ancestor is evicted before its descendants.

        For that, the idle chunks of the sequence are pinned and then unpinned together with them.
        """
        if not keys:
            return
        written, order = set(keys), dict.fromkeys([*chain, *keys])
        idle = [k for k in order if k not in written and k in self._index and not self._pins[self._index[k]]]
        if idle:
            self._policy.pin(idle)
        written.update(idle)
        self._policy.unpin([key for key in order if key in written])

    def _drop_slots(self, slots: Iterable[int]) -> int:
        """Remove READY slots from the index. Pinned slots are freed with their last lease. Returns how many were removed."""
        count = 0
        for slot in slots:
            key = self._key_of[slot]
            if key is None:
                continue  # it was dropped before and is still leased
            count += 1
            self._policy.remove([key])
            if self._pins[slot]:
                self._remove_from_index(key)
                self._key_of[slot] = None
                self._doomed.add(slot)
                self._num_leased -= 1
                # neither READY nor FREE: a restarted daemon must not serve it, and must not free it while it is read
                self._arena.headers["state"][slot] = SlotState.WRITING
            else:
                self._free_slots([slot])
        return count

    def _keys_of(self, slots: Iterable[int]) -> list[bytes]:
        return [key for slot in slots if (key := self._key_of[slot]) is not None]

    def _make_room(self, wanted: int, offered: Sequence[bytes]) -> tuple[list[bytes], set[bytes]]:
        """Evict chunks until there are `wanted` free slots. Returns the evicted chunks and the declined chunks of `offered`.

        `offered` are new chunks without a slot; the policy may name them as victims. A chunk that the outbox chooses frees
        its slot only when it is written. Until then, new chunks take the spare slots. If these are not enough, the outbox
        gives departed slots back. If that is not enough either, chunks are evicted without being written.
        """
        evicted: list[bytes] = []
        declined: set[bytes] = set()
        expected = len(self._free) + len(self._departing) - self.spare
        if wanted > expected:
            named = self._policy.victims(wanted - expected)
            declined = set(named).intersection(offered)
            evicted = self._evict(named)
        short = wanted - len(declined) - len(self._free)
        if short > 0 and self.outbox is not None:
            self.free_departed(self.outbox.recall(short))
            if (short := wanted - len(declined) - len(self._free)) > 0:
                named = self._policy.victims(short)
                declined.update(set(named).intersection(offered))
                evicted += self._evict(named, write=False)
        return evicted, declined

    def _evict(self, named: Iterable[bytes], write: bool = True) -> list[bytes]:
        """Evict those of the named chunks that are READY and not pinned. Returns them.

        If a policy names other chunks, the cache loses hits, never bytes.
        """
        index, pins = self._index, self._pins
        keys = [k for k in dict.fromkeys(named) if (slot := index.get(k)) is not None and not pins[slot]]
        chosen: list[bytes] = []
        if self.outbox is not None and keys:
            private = self.records.rows["private"][[index[key] for key in keys]].tolist()
            others = [key for key, is_private in zip(keys, private, strict=True) if not is_private]
            if write:
                chosen = self.outbox.choose(others, self._policy)
            else:
                self.outbox.lost(others)
        if chosen and self.outbox is not None:
            slots = [index[key] for key in chosen]
            for key, slot in zip(chosen, slots, strict=True):
                self._remove_from_index(key)
                self._key_of[slot] = None
                self._state[slot] = SlotState.WRITING
            self._arena.headers["state"][slots] = SlotState.WRITING  # a restarted daemon must not serve them
            self._departing.update(slots)
            self.free_departed(self.outbox.depart(chosen, slots))
        self._free_slots([slot for key in keys if (slot := index.get(key)) is not None])
        return keys

    def _remove_from_index(self, key: bytes) -> None:
        del self._index[key]
        if self.changes is not None:
            self.changes.note([key], ready=False)

    def _free_slots(self, slots: Sequence[int]) -> None:
        for slot in slots:
            key = self._key_of[slot]
            if key is not None:
                if self._state[slot] is SlotState.WRITING:
                    del self._writing[key]
                    self._policy.remove([key])
                else:
                    self._remove_from_index(key)
                self._key_of[slot] = None
            self._state[slot] = SlotState.FREE
        self._stale.difference_update(slots)
        self._arena.headers["state"][list(slots)] = SlotState.FREE
        self._free.extend(slots)

    def _begin_writing(self, keys: Sequence[bytes], slots: Sequence[int], shape: ChunkShape, chain: Keys) -> list[int]:
        """Write the headers of new WRITING slots. Returns their generations.

        A generation is one more than the slot's last one, so a late writer of the old chunk changes nothing.
        """
        for key, slot in zip(keys, slots, strict=True):
            self._writing[key] = slot
            self._key_of[slot] = key
            self._state[slot] = SlotState.WRITING
        at = slot_array(slots)
        generations = self.records.next_generations(at)
        if len(at):
            self.records.note_heads(at, begin_slots(self._arena, at, generations, keys, shape, chain, self._owner))
        return generations.tolist()  # type: ignore[no-any-return]
