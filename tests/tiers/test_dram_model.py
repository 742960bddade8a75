"""Random walks over the DRAM tier, compared with a model made of a few dictionaries."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvkern.arena.slots import SlotState
from kvkern.policy import POLICIES, make_policy
from kvkern.policy.base import EvictionPolicy, Keys, Use
from kvkern.policy.lru import LRU
from kvkern.policy.namespace_shares import NamespaceShares
from kvkern.tiers.base import Lease, Reservation
from kvkern.tiers.dram import DramTier
from tests.support import SHAPE, key, make_arena, put, write

SLOTS, RANKS = 5, 2
# Sequences are paths in a binary tree, so they share prefixes.
paths = st.lists(st.booleans(), min_size=1, max_size=6).map(tuple)


def chain_of(path: tuple[bool, ...]) -> list[bytes]:
    return [key(path[: i + 1]) for i in range(len(path))]


class Strict:
    """A policy that checks that the tier keeps to the protocol, and forwards every call to another policy."""

    def __init__(self, inner: EvictionPolicy) -> None:
        self.inner = inner
        self.pinned: dict[bytes, bool] = {}  # resident chunk -> is it pinned

    def access(self, chain: Keys, use: Use) -> None:
        self.inner.access(chain, use)

    def insert(self, keys: Keys, use: Use) -> None:
        assert self.pinned.keys().isdisjoint(keys)
        assert len(set(keys)) == len(keys)
        self.pinned.update(dict.fromkeys(keys, False))
        self.inner.insert(keys, use)

    def pin(self, keys: Keys) -> None:
        assert [self.pinned[key] for key in keys] == [False] * len(keys)
        self.pinned.update(dict.fromkeys(keys, True))
        self.inner.pin(keys)

    def unpin(self, keys: Keys) -> None:
        assert [self.pinned[key] for key in keys] == [True] * len(keys)
        self.pinned.update(dict.fromkeys(keys, False))
        self.inner.unpin(keys)

    def remove(self, keys: Keys) -> None:
        for chunk in keys:
            self.pinned.pop(chunk, None)
        self.inner.remove(keys)

    def victims(self, count: int) -> list[bytes]:
        named = self.inner.victims(count)
        assert not any(self.pinned.pop(chunk) for chunk in named)
        return named


class Contrary(LRU):
    """Evicts the chunks that were used last, and sometimes fewer than it was asked for."""

    def victims(self, count: int) -> list[bytes]:
        chosen = list(reversed(self._order))[: count - count // 3]
        self.remove(chosen)
        return chosen


@dataclass
class Writer:
    """A reservation, and the ranks that have written each of its chunks."""

    reservation: Reservation
    epoch: int
    written: list[set[int]] = field(default_factory=list)  # per chunk: the ranks that have written it


class Walk(RuleBasedStateMachine):
    """`ready` and `writing` are the model. All other expected values follow from them."""

    writers: Bundle[Writer] = Bundle("writers")
    leases: Bundle[Lease] = Bundle("leases")
    make: Callable[[], EvictionPolicy] = LRU

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.arena = make_arena(Path(self.folder.name), slots=SLOTS, part_nbytes=64, world_size=RANKS)
        self.policy = Strict(self.make())
        self.tier = DramTier(self.arena, self.policy)
        self.ready: dict[bytes, int] = {}
        self.writing: dict[int, bytes | None] = {}  # slot -> key, None once cleared
        self.pins: dict[int, int] = {}
        self.doomed: set[int] = set()
        self.epoch = 0

    def teardown(self) -> None:
        self.arena.close()
        self.folder.cleanup()

    def prefix(self, chain: list[bytes]) -> list[bytes]:
        out = []
        for k in chain:
            if k not in self.ready:
                break
            out.append(k)
        return out

    def forget(self, k: bytes) -> None:
        """READY -> FREE, or doomed while pinned."""
        slot = self.ready.pop(k)
        if self.pins.get(slot):
            self.doomed.add(slot)

    @rule(target=writers, path=paths, first=st.integers(0, 5))
    def reserve(self, path: tuple[bool, ...], first: int) -> Writer:
        chain = chain_of(path)
        present = {*self.ready, *(k for k in self.writing.values() if k)}
        missing = [k for k in chain[first:] if k not in present]
        idle = [k for k, slot in self.ready.items() if not self.pins.get(slot)]
        free = self.tier.num_free
        got = self.tier.reserve(chain, chain[first:], SHAPE)
        fits = missing[: free + len(idle)]
        assert len(got.keys) + got.declined + got.dropped == len(missing)
        assert [k for k in missing if k in got.keys] == list(got.keys)
        assert set(got.evicted) <= set(idle)
        assert len(got.keys) <= free + len(got.evicted)
        if self.make is LRU:  # a chunk is never dropped while an unleased chunk can go
            others = [k for k in idle if k not in chain]
            least = max(0, len(fits) - free - len(others))
            tail = [k for k in reversed(chain) if k in idle or k in fits][:least]
            assert got.keys == tuple(k for k in fits if k not in tail)
            assert (got.dropped, got.declined) == (len(missing) - len(fits), sum(k in fits for k in tail))
            assert [k for k in got.evicted if k in chain] == [k for k in tail if k in idle]
            assert len(got.evicted) == max(0, len(fits) - free) - got.declined
        for k in got.evicted:
            del self.ready[k]
        taken = {*self.ready.values(), *self.writing, *self.doomed}
        assert taken.isdisjoint(got.slots)
        assert len(set(got.slots)) == len(got.slots)
        self.writing |= dict(zip(got.slots, got.keys, strict=True))
        return Writer(got, self.epoch, [set() for _ in got.slots])

    @rule(writer=writers, rank=st.integers(0, RANKS - 1))
    def write_all(self, writer: Writer, rank: int) -> None:
        if set(writer.reservation.slots) <= set(self.writing):
            write(self.arena, writer.reservation, [rank])
            for ranks in writer.written:
                ranks.add(rank)

    @rule(writer=consumes(writers))
    def commit(self, writer: Writer) -> None:
        got = writer.reservation
        published = [
            (slot, k)
            for slot, k, ranks in zip(got.slots, got.keys, writer.written, strict=True)
            if len(ranks) == RANKS and writer.epoch == self.epoch
        ]
        assert self.tier.commit(got) == len(published)
        for slot in got.slots:
            del self.writing[slot]
        self.ready |= {k: slot for slot, k in published}

    @rule(writer=consumes(writers))
    def abort(self, writer: Writer) -> None:
        self.tier.abort(writer.reservation)
        for slot in writer.reservation.slots:
            del self.writing[slot]

    @rule(target=leases, path=paths)
    def acquire(self, path: tuple[bool, ...]) -> Lease:
        want = self.prefix(chain_of(path))
        assert self.tier.contains(chain_of(path)) == len(want)
        return self.pinned(self.tier.acquire(chain_of(path)), want)

    @rule(target=leases, path=paths)
    def acquire_window(self, path: tuple[bool, ...]) -> Lease:
        want = [k for k in chain_of(path) if k in self.ready]
        return self.pinned(self.tier.acquire(chain_of(path), prefix=False), want)

    def pinned(self, lease: Lease, want: list[bytes]) -> Lease:
        assert lease.keys == tuple(want)
        assert lease.slots == tuple(self.ready[k] for k in want)
        for slot in lease.slots:
            self.pins[slot] = self.pins.get(slot, 0) + 1
        return lease

    @rule(lease=consumes(leases), bad=st.sets(st.integers(0, 5)))
    def release(self, lease: Lease, bad: set[int]) -> None:
        marked = [slot for i, slot in enumerate(lease.slots) if i in bad]
        self.arena.mark_bad(np.array(marked, dtype=np.int64))
        self.tier.drop_bad(lease)
        for k in [k for k, slot in self.ready.items() if slot in marked]:
            self.forget(k)
        self.tier.release(lease)
        for slot in lease.slots:
            self.pins[slot] -= 1
            if not self.pins[slot]:
                self.doomed.discard(slot)

    @rule(path=paths)
    def touch(self, path: tuple[bool, ...]) -> None:
        self.tier.touch(chain_of(path))

    @rule()
    def clear(self) -> None:
        assert self.tier.clear() == len(self.ready) + sum(1 for k in self.writing.values() if k)
        for k in list(self.ready):
            self.forget(k)
        self.writing = dict.fromkeys(self.writing)
        self.epoch += 1

    @invariant()
    def no_slot_is_lost_or_leaked(self) -> None:
        assert self.tier.num_free + len(self.ready) + len(self.writing) + len(self.doomed) == SLOTS
        assert len(self.tier) == len(self.ready) + len(self.doomed)

    @invariant()
    def everything_is_bounded_by_the_slots(self) -> None:
        assert len(self.tier._index) == len(self.ready)
        assert len(self.tier._writing) == sum(1 for k in self.writing.values() if k)
        assert self.tier._num_leased == sum(1 for slot in self.ready.values() if self.pins.get(slot))

    @invariant()
    def the_policy_knows_what_may_go(self) -> None:
        ready = {k: bool(self.pins.get(slot)) for k, slot in self.ready.items()}
        assert self.policy.pinned == ready | {k: True for k in self.writing.values() if k}

    @invariant()
    def headers_say_the_same(self) -> None:
        state = self.arena.headers["state"]
        for k, slot in self.ready.items():
            assert bytes(self.arena.headers["key"][slot]) == k
            assert state[slot] in (SlotState.READY, SlotState.BAD)
        used = {*self.ready.values(), *self.writing, *self.doomed}
        assert all(state[slot] == SlotState.FREE for slot in range(SLOTS) if slot not in used)


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


class ContraryWalk(Walk):
    """No slot is lost, leased or written twice, whatever chunks the policy names."""

    make = Contrary


TestContraryWalk = ContraryWalk.TestCase
TestContraryWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("shares", [False, True], ids=["whole", "shares"])
@pytest.mark.parametrize("name", POLICIES)
def test_tier_and_policies_keep_to_the_protocol(name: str, shares: bool) -> None:
    def one() -> EvictionPolicy:
        return make_policy(name, SLOTS)

    class PolicyWalk(Walk):
        make = staticmethod(lambda: NamespaceShares(one) if shares else one())

    run_state_machine_as_test(PolicyWalk, settings=settings(max_examples=20, stateful_step_count=40, deadline=None))


@settings(max_examples=200, deadline=None, database=None, print_blob=False)
@given(st.lists(st.tuples(st.sampled_from(["store", "read"]), paths), max_size=30))
def test_eviction_never_breaks_a_prefix(steps: list[tuple[str, tuple[bool, ...]]]) -> None:
    """If engines store and read whole prefixes, one at a time, then every ancestor of a resident chunk is resident."""
    with tempfile.TemporaryDirectory() as folder:
        arena = make_arena(Path(folder), slots=SLOTS, part_nbytes=64)
        tier = DramTier(arena, LRU())
        seen: set[tuple[bool, ...]] = set()
        for step, path in steps:
            chain = chain_of(path)
            if step == "store":
                put(tier, arena, chain)
            else:
                tier.release(tier.acquire(chain))
            seen |= {path[: i + 1] for i in range(len(path))}
            for node in seen:
                if key(node) in tier._index and len(node) > 1:
                    assert key(node[:-1]) in tier._index, f"{node} is resident without its parent"
        arena.close()
