"""A node for tests of the remote tier: a real cache, arena and tier over any store, and checks of who owns which slot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from kvkern.arena.file import Arena, ArenaSpec, create_or_attach
from kvkern.arena.slots import SlotGeometry, SlotState
from kvkern.cache.manager import Cache
from kvkern.policy.base import Use
from kvkern.policy.grit import Grit
from kvkern.policy.lru import LRU
from kvkern.policy.persist_modes import Persist
from kvkern.remote.stores.base import RemoteStore
from kvkern.remote.tier import RemoteTier
from kvkern.tiers.base import Lease
from kvkern.tiers.dram import DramTier
from tests.node.conftest import GEOMETRY, eventually, read_verified, write_payload
from tests.remote.stores.memory import MemoryStore
from tests.support import NAMESPACE, SHAPE, chain_keys

A, B, C = chain_keys("a", 6), chain_keys("b", 6), chain_keys("c", 6)
USE = Use(namespace=NAMESPACE)


class Node:
    """A cache of few slots with a store behind it."""

    def __init__(
        self, folder: Path, store: RemoteStore, mode: Persist = Persist.ALL, slots: int = 16,
        geometry: SlotGeometry = GEOMETRY, predict: bool = False, queue_slots: int = 100, timeout_s: float = 5.0,
    ) -> None:  # fmt: skip
        self.arena: Arena = create_or_attach(ArenaSpec(geometry, slots), folder / f"arena-{token_hex(8)}")
        self.cache = Cache(DramTier(self.arena, Grit(slots) if predict else LRU()))
        self.store = store
        self.tier = RemoteTier(
            store, "memory://", self.arena, self.cache, self.cache.counters, self.cache.faults, mode,
            queue_slots * geometry.slot_nbytes, timeout_s,
        )  # fmt: skip
        self.tier.start()
        self.cache.attach_remote(self.tier, self.tier.outbox, self.tier.spare)

    @property
    def counters(self) -> dict[str, float]:
        return self.cache.counters.snapshot()

    def compute(self, chain: Sequence[bytes], seed: int = 0, wanted: Sequence[bytes] | None = None) -> int:
        """Store chunks as an engine does. Returns how many."""
        reservation = self.cache.reserve(chain, chain if wanted is None else wanted, SHAPE, USE)
        write_payload(self.arena, reservation, seed)
        return self.cache.commit(reservation)

    def acquire(self, chain: Sequence[bytes], prefix: bool = True) -> Lease:
        return self.cache.acquire(chain, prefix, USE)

    def hits(self, chain: Sequence[bytes], seed: int = 0) -> int:
        """Return how many chunks an engine would load, verified as its worker does."""
        lease = self.acquire(chain)
        assert lease.keys == tuple(chain[: len(lease.keys)])
        assert read_verified(self.arena, lease, seed)
        self.cache.release(lease)
        return len(lease.keys)

    def settle(self) -> None:
        """Wait until nothing is under way any more."""
        eventually(lambda: self.tier.idle and not self.cache._dram._departing, "an empty outbox")
        eventually(lambda: not any(self.cache._dram._pins) and not self.tier.reader.num_waiting, "no reader")

    def whole(self) -> bool:
        """Return True if nothing leaks: every slot is free or belongs to a findable chunk, and nobody holds any."""
        dram, state = self.cache._dram, self.arena.headers["state"]
        used, free = list(dram._index.values()), dram._free
        return (
            Counter([*used, *free]) == Counter(range(dram.num_slots))
            and not (dram._writing or dram._granted or dram._stale or dram._departing or dram._doomed)
            and not any(dram._pins)
            and not dram._num_leased
            and all(dram._key_of[slot] == key for key, slot in dram._index.items())
            and bool((state[used] == SlotState.READY).all() and (state[free] == SlotState.FREE).all())
            and (not isinstance(dram._policy, LRU) or set(dram._policy._order) == set(dram._index))
        )

    def close(self) -> None:
        self.tier.close()
        assert self.whole()
        left = [self.tier.reader._being_read, self.tier._tasks, self.tier.reader.num_waiting, len(self.tier.outbox)]
        assert not any(left), left
        self.arena.close()


@contextmanager
def node(folder: Path, store: RemoteStore, **options: object) -> Iterator[Node]:
    made = Node(folder, store, **options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


@contextmanager
def nodes(folder: Path, store: MemoryStore, **options: object) -> Iterator[tuple[Node, Node]]:
    """Yield two nodes that share the values of a store."""
    with node(folder, store, **options) as one, node(folder, MemoryStore(store.values), **options) as two:
        yield one, two
