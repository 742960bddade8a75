"""The DRAM tier: states of slots, leases, reservations and eviction. test_dram_model.py has the random walk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvkern.arena.file import Arena
from kvkern.arena.slots import MAGIC, VERSION, SlotState
from kvkern.policy.base import Keys, Stop, Use
from kvkern.policy.lru import LRU
from kvkern.tiers.base import Lease, Reservation
from kvkern.tiers.dram import DramTier
from tests.support import NAMESPACE, SHAPE, chain_keys, key, make_arena, put, write


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    arena = make_arena(tmp_path, slots=8, world_size=2)
    yield arena
    arena.close()


@pytest.fixture
def tier(arena: Arena) -> DramTier:
    return DramTier(arena, LRU())


def states(arena: Arena, slots: tuple[int, ...]) -> set[int]:
    return set(arena.headers["state"][list(slots)].tolist())


def fill(tier: DramTier, arena: Arena, *names: str, chunks: int = 4) -> None:
    for name in names:
        assert put(tier, arena, chain_keys(name, chunks)) == chunks


def test_free_writing_ready_free(tier: DramTier, arena: Arena) -> None:
    chain = chain_keys("a", 3)
    reservation = tier.reserve(chain, chain, SHAPE)
    assert (reservation.keys, reservation.dropped, reservation.evicted) == (tuple(chain), 0, ())
    assert len(set(reservation.slots)) == 3
    assert states(arena, reservation.slots) == {SlotState.WRITING}
    assert (tier.contains(chain), tier.num_free, len(tier)) == (0, 5, 0)
    write(arena, reservation)
    assert tier.contains(chain) == 0  # not before the commit
    assert tier.commit(reservation) == 3
    assert states(arena, reservation.slots) == {SlotState.READY}
    assert (tier.contains(chain), tier.num_free, len(tier)) == (3, 5, 3)
    assert tier.clear() == 3
    assert states(arena, reservation.slots) == {SlotState.FREE}
    assert (tier.contains(chain), tier.num_free, len(tier)) == (0, 8, 0)


def test_the_header_says_what_the_slot_holds(tier: DramTier, arena: Arena) -> None:
    chain = chain_keys("a", 2)
    reservation = tier.reserve(chain, chain, SHAPE)
    for chunk, slot in zip(chain, reservation.slots, strict=True):
        header = arena.headers[slot]
        assert (int(header["magic"]), int(header["version"])) == (MAGIC, VERSION)
        assert (bytes(header["key"]), bytes(header["namespace"])) == (chunk, NAMESPACE)
        geometry = arena.spec.geometry
        assert int(header["payload_nbytes"]) == 2 * geometry.part_nbytes
        assert (int(header["world_size"]), int(header["planes"])) == (2, 2)
        assert (int(header["group"]), int(header["chunk_tokens"])) == (0, 16)
        assert int(header["generation"]) == reservation.generations[reservation.slots.index(slot)]


@pytest.mark.parametrize("ranks", [(), (0,), (1,)])
def test_commit_before_every_rank_has_written_publishes_nothing(
    tier: DramTier, arena: Arena, ranks: tuple[int, ...]
) -> None:
    chain = chain_keys("a", 3)
    reservation = tier.reserve(chain, chain, SHAPE)
    write(arena, reservation, ranks)
    assert tier.commit(reservation) == 0
    assert (tier.contains(chain), tier.num_free) == (0, 8)


def test_only_the_chunks_all_ranks_wrote_are_published(tier: DramTier, arena: Arena) -> None:
    chain = chain_keys("a", 3)
    reservation = tier.reserve(chain, chain, SHAPE)
    write(arena, reservation)
    arena.headers["written"][reservation.slots[1], 1] -= 1  # rank 1 is one behind
    assert tier.commit(reservation) == 2
    assert tier.contains(chain) == 1
    assert tier.num_free == 6
    assert put(tier, arena, chain) == 1  # the hole is filled by the next store
    assert tier.contains(chain) == 3


def test_a_key_is_never_written_twice(tier: DramTier, arena: Arena) -> None:
    """A key gets no second slot while it is being written or after it is READY."""
    chain = chain_keys("a", 4)
    first = tier.reserve(chain, chain[:2], SHAPE)
    second = tier.reserve(chain, chain, SHAPE)
    assert second.keys == tuple(chain[2:])
    for reservation in (first, second):
        write(arena, reservation)
        tier.commit(reservation)
    assert tier.reserve(chain, chain, SHAPE).slots == ()
    assert tier.num_free == 4


def test_a_key_named_twice_gets_one_slot(tier: DramTier, arena: Arena) -> None:
    a = key("a")
    reservation = tier.reserve([a, a], [a, a], SHAPE)
    assert reservation.keys == (a,)
    write(arena, reservation)
    assert tier.commit(reservation) == 1
    lease = tier.acquire([a, a])
    assert len(lease.slots) == 2
    tier.release(lease)
    assert tier.reserve(chain_keys("b", 8), chain_keys("b", 8), SHAPE).dropped == 0


def test_abort_gives_everything_back(tier: DramTier, arena: Arena) -> None:
    chain = chain_keys("a", 8)
    tier.abort(tier.reserve(chain, chain, SHAPE))
    assert (tier.num_free, tier.contains(chain)) == (8, 0)
    assert not arena.headers["state"].any()
    assert put(tier, arena, chain) == 8


def test_empty_batches(tier: DramTier) -> None:
    assert tier.contains([]) == 0
    lease = tier.acquire([])
    assert lease == Lease((), ())
    tier.release(lease)
    assert tier.drop_bad(lease) == 0
    reservation = tier.reserve([], [], SHAPE)
    assert (reservation.slots, reservation.dropped) == ((), 0)
    assert tier.commit(reservation) == 0
    assert tier.commit(Reservation((), (), ())) == 0
    tier.abort(reservation)
    tier.touch([])
    assert tier.clear() == 0


def test_a_hole_ends_the_prefix(tier: DramTier, arena: Arena) -> None:
    chain = chain_keys("a", 5)
    put(tier, arena, [chain[0], chain[1], chain[3], chain[4]])
    assert tier.contains(chain) == 2
    lease = tier.acquire(chain)
    assert lease.keys == tuple(chain[:2])
    windowed = tier.acquire(chain, prefix=False)
    assert windowed.keys == (chain[0], chain[1], chain[3], chain[4])
    tier.release(windowed)
    tier.release(lease)


def test_eviction_takes_the_oldest_sequence_from_its_tail(tier: DramTier, arena: Arena) -> None:
    fill(tier, arena, "old", "new")
    reservation = tier.reserve(chain_keys("x", 3), chain_keys("x", 3), SHAPE)
    assert reservation.evicted == tuple(reversed(chain_keys("old", 4)[1:]))
    assert tier.contains(chain_keys("old", 4)) == 1
    assert tier.contains(chain_keys("new", 4)) == 4


def test_a_used_sequence_is_not_the_oldest(tier: DramTier, arena: Arena) -> None:
    for use in ("acquire", "touch", "reserve"):
        tier.clear()
        fill(tier, arena, "old", "new")
        old = chain_keys("old", 4)
        if use == "acquire":
            tier.release(tier.acquire(old))
        elif use == "touch":
            tier.touch(old)
        else:
            tier.reserve(old, old, SHAPE)
        put(tier, arena, chain_keys("x", 3))
        assert tier.contains(old) == 4, use
        assert tier.contains(chain_keys("new", 4)) == 1, use


def test_growing_a_sequence_never_evicts_its_own_prefix(tier: DramTier, arena: Arena) -> None:
    fill(tier, arena, "a", "b")
    longer = chain_keys("a", 12)
    assert put(tier, arena, longer) == 4
    assert tier.contains(longer) == 8
    again = tier.reserve(longer, longer, SHAPE)  # all slots hold chunks of this sequence
    assert (again.keys, again.evicted, again.declined, again.dropped) == ((), (), 4, 0)


def test_a_grown_sequence_leaves_from_its_new_tail(tier: DramTier, arena: Arena) -> None:
    """Two turns of one conversation, then eviction: the first turn is worth more than the second."""
    put(tier, arena, chain_keys("a", 4))
    put(tier, arena, chain_keys("a", 8))
    put(tier, arena, chain_keys("x", 2))
    assert tier.contains(chain_keys("a", 8)) == 6


def test_pinned_chunks_stay_and_chunks_without_a_slot_are_dropped(tier: DramTier, arena: Arena) -> None:
    fill(tier, arena, "a", "b")
    lease = tier.acquire(chain_keys("a", 4)[:3])
    x = chain_keys("x", 6)
    reservation = tier.reserve(x, x, SHAPE)
    assert reservation.keys == tuple(x[:5])  # the first chunks get the slots
    assert reservation.dropped == 1
    assert tier.contains(chain_keys("a", 4)) == 3
    assert set(lease.slots).isdisjoint(reservation.slots)
    tier.abort(reservation)
    tier.release(lease)
    assert put(tier, arena, x) == 6


def test_leases_count(tier: DramTier, arena: Arena) -> None:
    fill(tier, arena, "a", chunks=8)
    chain, x = chain_keys("a", 8), chain_keys("x", 8)
    first, second = tier.acquire(chain), tier.acquire(chain)
    tier.release(first)
    assert tier.reserve(x, x, SHAPE).dropped == 8
    tier.release(second)
    assert tier.reserve(x, x, SHAPE).dropped == 0


def test_clear_during_a_lease(tier: DramTier, arena: Arena) -> None:
    """A leased chunk stays readable after the clear, is no hit any more, and its slot is freed with the last lease."""
    fill(tier, arena, "a")
    chain = chain_keys("a", 4)
    first, second = tier.acquire(chain), tier.acquire(chain[:2])
    assert tier.clear() == 4
    assert (tier.contains(chain), tier.num_free) == (0, 4)
    again = tier.reserve(chain, chain, SHAPE)
    assert set(again.slots).isdisjoint(first.slots)
    tier.abort(again)
    tier.release(first)
    assert tier.num_free == 6
    tier.release(second)
    assert tier.num_free == 8
    assert not arena.headers["state"].any()


def test_clear_while_writing(tier: DramTier, arena: Arena) -> None:
    """The old writer keeps its slots until its commit, which publishes nothing. A new writer gets other slots."""
    chain = chain_keys("a", 3)
    old = tier.reserve(chain, chain, SHAPE)
    assert tier.clear() == 3
    new = tier.reserve(chain, chain, SHAPE)
    assert set(new.slots).isdisjoint(old.slots)
    write(arena, old)
    assert tier.commit(old) == 0
    assert (tier.num_free, tier.contains(chain)) == (5, 0)
    write(arena, new)
    assert tier.commit(new) == 3
    assert tier.contains(chain) == 3


def test_a_late_writer_of_an_old_generation_changes_nothing(tier: DramTier, arena: Arena) -> None:
    chain, other = chain_keys("a", 8), chain_keys("b", 8)
    late = tier.reserve(chain, chain, SHAPE)
    tier.abort(late)
    new = tier.reserve(other, other, SHAPE)
    assert set(new.slots) == set(late.slots)
    assert set(zip(new.slots, new.generations, strict=True)).isdisjoint(zip(late.slots, late.generations, strict=True))
    write(arena, late)  # it marks the slot written under the old generation
    assert tier.commit(new) == 0
    assert tier.num_free == 8


def test_bad_slots_are_dropped_with_their_lease(tier: DramTier, arena: Arena) -> None:
    fill(tier, arena, "a")
    chain = chain_keys("a", 4)
    lease, reader = tier.acquire(chain), tier.acquire(chain)
    arena.mark_bad(np.array([lease.slots[1]]))
    assert tier.drop_bad(lease) == 1
    tier.release(lease)
    assert (tier.contains(chain), tier.num_free) == (1, 4)  # the other reader still has it
    tier.release(reader)
    assert tier.num_free == 5
    assert arena.headers["state"][lease.slots[1]] == SlotState.FREE
    assert put(tier, arena, chain) == 1
    assert tier.contains(chain) == 4


def test_a_bad_slot_is_counted_once(tier: DramTier, arena: Arena) -> None:
    fill(tier, arena, "a")
    first, second = tier.acquire(chain_keys("a", 4)), tier.acquire(chain_keys("a", 4))
    arena.mark_bad(np.array([first.slots[0]]))
    counts = []
    for lease in (first, second):
        counts.append(tier.drop_bad(lease))
        tier.release(lease)
    assert counts == [1, 0]


def test_generations_go_on_in_an_arena_that_was_used_before(arena: Arena) -> None:
    """A restarted manager over the same file must reject the writers of the former manager."""
    chain = chain_keys("a", 8)
    before = DramTier(arena, LRU()).reserve(chain, chain, SHAPE)
    after = DramTier(arena, LRU()).reserve(chain, chain, SHAPE)
    assert set(before.slots) == set(after.slots)
    assert min(after.generations) > max(before.generations)


@pytest.mark.parametrize("bad", [b"", b"short", bytes(33)], ids=len)
def test_keys_of_another_length_leak_nothing(tier: DramTier, arena: Arena, bad: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # LayoutError and ConfigError are ValueErrors too
        tier.reserve([bad], [bad], SHAPE)
    assert tier.num_free == 8
    assert tier._policy.victims(9) == []
    assert put(tier, arena, chain_keys("a", 8)) == 8


# -- the policy: its answers, and the calls it gets ----------------------------------------------------------------------


class Toy(LRU):
    """Declines the chunks in `unwanted`, and records the calls it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.unwanted: set[bytes] = set()
        self.uses: list[tuple[list[bytes], Use]] = []

    def access(self, chain: Keys, use: Use) -> None:
        self.uses.append((list(chain), use))
        super().access(chain, use)

    def insert(self, keys: Keys, use: Use) -> None:
        self.uses.append((list(keys), use))
        super().insert(keys, use)

    def victims(self, count: int) -> list[bytes]:
        first = [key for key in self._order if key in self.unwanted][:count]
        self.remove(first)
        return first + super().victims(count - len(first))


@pytest.mark.parametrize("unwanted", [{2, 3}, {0}, {1}, {0, 1, 2, 3}], ids=repr)
def test_declined_chunks_get_no_slot_and_evict_nothing(arena: Arena, unwanted: set[int]) -> None:
    policy = Toy()
    tier = DramTier(arena, policy)
    fill(tier, arena, "old", "new")
    x = chain_keys("x", 4)
    policy.unwanted = {x[i] for i in unwanted}
    kept = tuple(chunk for chunk in x if chunk not in policy.unwanted)
    reservation = tier.reserve(x, x, SHAPE)
    assert (reservation.keys, reservation.declined, reservation.dropped) == (kept, len(unwanted), 0)
    assert reservation.evicted == tuple(reversed(chain_keys("old", 4)))[: len(kept)]
    write(arena, reservation)
    assert tier.commit(reservation) == len(kept)
    policy.unwanted = set()
    assert put(tier, arena, x) == len(unwanted)  # offered again, taken now
    assert tier.contains(x) == 4


def test_nothing_is_declined_while_there_is_room(arena: Arena) -> None:
    policy = Toy()
    policy.unwanted = set(chain_keys("a", 8))
    assert put(DramTier(arena, policy), arena, chain_keys("a", 8)) == 8


def test_declined_and_dropped_are_told_apart(arena: Arena) -> None:
    policy = Toy()
    tier = DramTier(arena, policy)
    fill(tier, arena, "a", "b")
    lease = tier.acquire([*chain_keys("a", 4), *chain_keys("b", 2)])
    x = chain_keys("x", 4)
    policy.unwanted = {x[1]}
    reservation = tier.reserve(x, x, SHAPE)  # two chunks of b could go, so two of x are offered
    assert (reservation.keys, reservation.declined, reservation.dropped) == ((x[0],), 1, 2)
    tier.abort(reservation)
    tier.release(lease)


def test_a_policy_that_names_too_much_costs_no_bytes(arena: Arena) -> None:
    """A chunk that is leased, being written, unknown or named twice is not freed because the policy names it."""

    class Wrong(LRU):
        def victims(self, count: int) -> list[bytes]:
            return [*chain_keys("leased", 2), *chain_keys("begun", 2), key("nobody's"), *2 * super().victims(count)]

    tier = DramTier(arena, Wrong())
    fill(tier, arena, "leased", "idle", chunks=2)
    lease = tier.acquire(chain_keys("leased", 2))
    begun = tier.reserve(chain_keys("begun", 4), chain_keys("begun", 4), SHAPE)
    x = chain_keys("x", 2)
    new = tier.reserve(x, x, SHAPE)
    assert new.evicted == tuple(reversed(chain_keys("idle", 2)))
    assert len({*lease.slots, *begun.slots, *new.slots}) == 8
    for reservation in (begun, new):
        write(arena, reservation)
        assert tier.commit(reservation) == len(reservation.slots)
    assert tier.contains(chain_keys("leased", 2)) == 2


def test_chunks_being_written_are_pinned_and_then_older_than_their_ancestors(tier: DramTier, arena: Arena) -> None:
    chain = chain_keys("a", 6)
    put(tier, arena, chain[:2])
    begun = tier.reserve(chain, chain, SHAPE)
    put(tier, arena, chain_keys("b", 2))
    x = chain_keys("x", 8)
    late = tier.reserve(x, x, SHAPE)  # all chunks that are not being written may go
    assert (len(late.slots), late.dropped, set(begun.slots) & set(late.slots)) == (4, 4, set())
    tier.abort(late)
    put(tier, arena, chain[:2])
    write(arena, begun)
    assert tier.commit(begun) == 4
    put(tier, arena, chain_keys("c", 6))
    assert tier.contains(chain) == 2  # the tail went first, although its ancestors were used before it was published


@pytest.mark.parametrize("end", ["abort", "commit unwritten", "clear, then commit"])
def test_unwritten_chunks_leave_the_policy(tier: DramTier, arena: Arena, end: str) -> None:
    chain = chain_keys("a", 3)
    reservation = tier.reserve(chain, chain, SHAPE)
    if end == "abort":
        tier.abort(reservation)
    elif end == "commit unwritten":
        assert tier.commit(reservation) == 0
    else:
        write(arena, reservation)
        tier.clear()
        assert put(tier, arena, chain) == 3  # by another writer
        assert tier.commit(reservation) == 0
        assert tier._policy.victims(9) == list(reversed(chain))
    assert tier._policy.victims(9) == []


def test_the_policy_is_told_of_every_request(arena: Arena) -> None:
    policy = Toy()
    tier = DramTier(arena, policy)
    chain, use = chain_keys("a", 3), Use(now_s=5.0, request=7, session=3)
    mine = Use(now_s=5.0, request=7, session=3, namespace=NAMESPACE)
    tier.commit(tier.reserve(chain, chain[1:], SHAPE, use))
    assert policy.uses == [(chain, mine), (chain[1:], mine)]
    policy.uses.clear()
    tier.release(tier.acquire(chain, use=use))
    end = Use(now_s=6.0, request=7, output_tokens=100, stop=Stop.END_TURN)
    tier.touch((), end)
    tier.release(tier.acquire_all())
    assert policy.uses == [(chain, use), ([], end)]
