"""The DRAM tier under a daemon: slots that clients fill and name, and the arena of a daemon that has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from kvkern.arena.file import Arena, ArenaSpec, create_or_attach
from kvkern.arena.slots import PAGE, SlotGeometry, SlotState
from kvkern.kernels import layout as L
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.policy.lru import LRU
from kvkern.tiers.base import AdoptionResult, ChunkShape, IndexChanges, Reservation
from kvkern.tiers.dram import DramTier
from kvkern.tiers.slot_headers import begin_slots
from kvkern.transfer.base import ChunkBatch
from kvkern.transfer.host import HostCopier
from tests.support import NAMESPACE, SHAPE, chain_keys, key, make_arena, write

SLOTS, RANKS, PER_CHUNK, NUM_BLOCKS = 8, 2, 2, 24
OTHER = ChunkShape(bytes(31) + b"\1", group=0, chunk_tokens=16)
WRITER = (4711, 99)  # pid and start time


def none_alive(pid: int, start: int) -> bool:
    return False


def all_alive(pid: int, start: int) -> bool:
    return True


def named(granted: Reservation, chain: Sequence[bytes]) -> Reservation:
    """Return granted slots with the keys of a sequence."""
    return Reservation(tuple(chain), granted.slots, granted.generations, chain=tuple(chain))


def begin(arena: Arena, reservation: Reservation, shape: ChunkShape = SHAPE) -> None:
    slots = np.array(reservation.slots, dtype=np.int64)
    generations = np.array(reservation.generations, dtype=np.uint64)
    begin_slots(arena, slots, generations, reservation.keys, shape, reservation.chain, WRITER)


def grant(tier: DramTier, arena: Arena, chain: Sequence[bytes], shape: ChunkShape = SHAPE) -> Reservation:
    """Grant slots, name the chunks in the headers, and mark them written."""
    granted = named(tier.grant(len(chain)), chain)
    begin(arena, granted, shape)
    write(arena, granted)
    return granted


def states(arena: Arena, slots: Sequence[int]) -> set[int]:
    return set(arena.headers["state"][list(slots)].tolist())


def paged(seed: int, layers: int) -> PagedTensors:
    """Make a KV group with `layers` layers of random bytes, 512 bytes per block and plane."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, NUM_BLOCKS, 4, 2, 64)
    tensors = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(layers)]
    views = [tensor.view(torch.bfloat16) for tensor in tensors]
    return PagedTensors.bind(L.flash_attention(views), views)


class Engines:
    """A tier over an arena, and a real copier for every rank, with two KV groups of different sizes."""

    def __init__(self, folder: Path) -> None:
        groups = [[paged(10 * rank + group, layers=2 - group) for group in range(2)] for rank in range(RANKS)]
        part_nbytes = max(group.layout.part_nbytes(PER_CHUNK) for group in groups[0])
        planes = max(len(group.layout.planes) for group in groups[0])
        self.arena = create_or_attach(ArenaSpec(SlotGeometry(part_nbytes, planes, RANKS), SLOTS), folder / "arena")
        self.tier = DramTier(self.arena, LRU())
        self.transfers = [HostCopier(groups[rank], self.arena, rank, PER_CHUNK, 1) for rank in range(RANKS)]

    def put(self, name: object, chunks: int, group: int = 0) -> Reservation:
        """Grant slots, name the chunks, store them on every rank from blocks 0, 1, ..., and publish."""
        keys = chain_keys(name, chunks)
        granted = named(self.tier.grant(chunks), keys)
        begin(self.arena, granted, ChunkShape(NAMESPACE, group, 16))
        batch = ChunkBatch(
            group,
            np.arange(PER_CHUNK * chunks, dtype=np.int32).reshape(-1, PER_CHUNK),
            np.array(granted.slots, dtype=np.int64),
            np.array(granted.generations, dtype=np.uint64),
            np.frombuffer(b"".join(keys), dtype="V32"),
            NAMESPACE,
        )
        for transfer in self.transfers:
            assert transfer.store([batch]).wait().ok.all()
        assert self.tier.publish(granted, NAMESPACE) == [True] * chunks
        return granted

    def restart(self, alive: Callable[[int, int], bool] = none_alive) -> AdoptionResult:
        """Start a new tier on the same arena, as a restarted daemon does."""
        self.tier = DramTier(self.arena, LRU())
        return self.tier.adopt(alive)


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    engines = Engines(tmp_path)
    yield engines
    for transfer in engines.transfers:
        transfer.close()
    engines.arena.close()


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    arena = make_arena(tmp_path, slots=SLOTS, world_size=RANKS)
    yield arena
    arena.close()


@pytest.fixture
def tier(arena: Arena) -> DramTier:
    return DramTier(arena, LRU())


# -- grant, publish, give back ------------------------------------------------------------------------------------------


def test_a_granted_slot_becomes_ready(tier: DramTier, arena: Arena) -> None:
    chain = chain_keys("a", 3)
    granted = grant(tier, arena, chain)
    assert (granted.dropped, granted.evicted, tier.num_free) == (0, (), SLOTS - 3)
    assert states(arena, granted.slots) == {SlotState.WRITING}
    assert tier.contains(chain) == 0
    assert tier.publish(granted, NAMESPACE) == [True] * 3
    assert states(arena, granted.slots) == {SlotState.READY}
    assert (tier.contains(chain), tier.num_free) == (3, SLOTS - 3)


@pytest.mark.parametrize("count", [0, 1, 3, SLOTS, SLOTS + 3])
def test_grant_gives_at_most_the_slots_that_can_be_freed(tier: DramTier, arena: Arena, count: int) -> None:
    granted = tier.grant(count)
    assert len(set(granted.slots)) == len(granted.generations) == min(count, SLOTS)
    assert granted.dropped == max(0, count - SLOTS)
    tier.give_back(granted.slots)
    assert tier.num_free == SLOTS
    assert states(arena, range(SLOTS)) == {SlotState.FREE}


def test_publishing_an_empty_reservation(tier: DramTier) -> None:
    assert tier.publish(Reservation((), (), ()), NAMESPACE) == []


def test_grant_evicts_tails_and_spares_leases(tier: DramTier, arena: Arena) -> None:
    chain = chain_keys("a", 5)
    tier.publish(grant(tier, arena, chain), NAMESPACE)
    lease = tier.acquire(chain[:2])
    granted = tier.grant(SLOTS)
    assert set(granted.evicted) == set(chain[2:])
    assert set(granted.slots).isdisjoint(lease.slots)
    assert granted.dropped == 2
    assert tier.contains(chain) == 2


def test_a_former_owner_cannot_complete_a_slot(tier: DramTier, arena: Arena) -> None:
    old = named(tier.grant(1), [key("old")])
    begin(arena, old)
    tier.give_back(old.slots)
    new = named(tier.grant(1), [key("new")])
    assert new.slots == old.slots
    assert new.generations > old.generations
    begin(arena, new)
    write(arena, old)  # the late writer
    assert tier.publish(new, NAMESPACE) == [False]
    assert tier.num_free == SLOTS


def spoil_rank(arena: Arena, granted: Reservation) -> None:
    arena.headers["written"][granted.slots[1], 1] = 0


def spoil_key(arena: Arena, granted: Reservation) -> None:
    arena.headers["key"][granted.slots[1]] = np.void(key("another"))


def spoil_namespace(arena: Arena, granted: Reservation) -> None:
    arena.headers["namespace"][granted.slots[1]] = np.void(bytes(32))


def spoil_generation(arena: Arena, granted: Reservation) -> None:
    arena.headers["generation"][granted.slots[1]] += np.uint64(1)


def spoil_sizes(arena: Arena, granted: Reservation) -> None:
    arena.headers["part_nbytes"][granted.slots[1]] -= np.uint64(1)


@pytest.mark.parametrize("spoil", [spoil_rank, spoil_key, spoil_namespace, spoil_generation, spoil_sizes])
def test_a_slot_whose_header_differs_is_not_published(
    tier: DramTier, arena: Arena, spoil: Callable[[Arena, Reservation], None]
) -> None:
    chain = chain_keys("a", 3)
    granted = grant(tier, arena, chain)
    spoil(arena, granted)
    assert tier.publish(granted, NAMESPACE) == [True, False, True]
    assert (tier.contains(chain), tier.contains(chain[2:])) == (1, 1)
    assert states(arena, granted.slots[1:2]) == {SlotState.FREE}
    assert tier.num_free == SLOTS - 2


def test_the_second_writer_of_a_chunk_publishes_nothing(tier: DramTier, arena: Arena) -> None:
    chain = chain_keys("a", 2)
    first, second = grant(tier, arena, chain), grant(tier, arena, chain)
    assert tier.publish(second, NAMESPACE) == [True, True]
    assert tier.publish(first, NAMESPACE) == [False, False]
    assert tier.acquire(chain).slots == second.slots
    assert tier.num_free == SLOTS - 2


def test_one_publish_names_a_chunk_twice(tier: DramTier, arena: Arena) -> None:
    granted = tier.grant(2)
    twice = Reservation((key("a"),) * 2, granted.slots, granted.generations)
    begin(arena, twice)
    write(arena, twice)
    assert tier.publish(twice, NAMESPACE) == [True, False]
    assert tier.num_free == SLOTS - 1


def test_only_granted_slots_are_given_back(tier: DramTier, arena: Arena) -> None:
    chain = chain_keys("a", 2)
    ready = grant(tier, arena, chain)
    tier.publish(ready, NAMESPACE)
    tier.give_back([*ready.slots, *range(SLOTS)])
    assert (tier.contains(chain), tier.num_free) == (2, SLOTS - 2)


# -- clear, drop, changes, info ------------------------------------------------------------------------------------------


def test_clear_of_a_namespace_leaves_the_others(tier: DramTier, arena: Arena) -> None:
    mine, theirs = chain_keys("a", 2), chain_keys("b", 2)
    tier.publish(grant(tier, arena, mine), NAMESPACE)
    tier.publish(grant(tier, arena, theirs, OTHER), OTHER.namespace)
    assert tier.clear(OTHER.namespace) == 2
    assert (tier.contains(mine), tier.contains(theirs), tier.num_free) == (2, 0, SLOTS - 2)
    assert tier.clear() == 2
    assert tier.num_free == SLOTS


@pytest.mark.parametrize("namespace", [NAMESPACE, None])
def test_what_is_being_written_is_not_published_after_a_clear(
    tier: DramTier, arena: Arena, namespace: bytes | None
) -> None:
    granted = grant(tier, arena, chain_keys("a", 2))
    other = grant(tier, arena, chain_keys("b", 1), OTHER)
    tier.clear(namespace)
    assert tier.num_free == SLOTS - 3  # the writers still own three slots
    assert tier.publish(granted, NAMESPACE) == [False, False]
    assert tier.publish(other, OTHER.namespace) == [namespace is not None]
    again = grant(tier, arena, chain_keys("a", 2))
    assert tier.publish(again, NAMESPACE) == [True, True]


def test_a_slot_granted_and_not_yet_named_is_of_no_namespace(tier: DramTier, arena: Arena) -> None:
    tier.publish(grant(tier, arena, chain_keys("a", SLOTS)), NAMESPACE)
    granted = named(tier.grant(SLOTS), chain_keys("b", SLOTS))  # their headers said NAMESPACE a moment ago
    tier.clear(NAMESPACE)
    begin(arena, granted)
    write(arena, granted)
    assert tier.publish(granted, NAMESPACE) == [True] * SLOTS


def test_drop_counts_what_was_there_and_waits_for_leases(tier: DramTier, arena: Arena) -> None:
    chain = chain_keys("a", 3)
    tier.publish(grant(tier, arena, chain), NAMESPACE)
    lease = tier.acquire(chain)
    assert tier.drop([chain[1], chain[1], key("nobody's")]) == 1
    assert (tier.contains(chain), tier.num_free) == (1, SLOTS - 3)
    tier.release(lease)
    assert tier.num_free == SLOTS - 2
    assert tier.drop([]) == 0


def test_changes_tell_the_index_in_order(tier: DramTier, arena: Arena) -> None:
    tier.publish(grant(tier, arena, chain_keys("early", 1)), NAMESPACE)  # changes are not recorded yet
    tier.changes = IndexChanges()
    chain = chain_keys("a", SLOTS - 1)
    tier.publish(grant(tier, arena, chain), NAMESPACE)
    evicted = tier.grant(1).evicted
    tier.drop(chain[:1])
    assert tier.changes.added == chain[1:]
    assert tier.changes.removed == [*evicted, chain[0]]
    known = ({*chain_keys("early", 1)} | set(tier.changes.added)) - set(tier.changes.removed)
    assert known == set(tier.all_keys())


def test_describe_chunks_returns_the_header_fields(tier: DramTier, arena: Arena) -> None:
    chain = chain_keys("a", 2)
    granted = grant(tier, arena, chain)
    tier.publish(granted, NAMESPACE)
    tier.acquire(chain[1:])
    rows = tier.describe_chunks([key("nobody's"), chain[1]])
    assert rows == [{
        "key": chain[1].hex(), "namespace": NAMESPACE.hex(), "slot": granted.slots[1], "generation": 1, "group": 0,
        "chunk_tokens": 16, "position": 1, "payload_nbytes": RANKS * 256, "leases": 1,
    }]  # fmt: skip
    assert tier.describe_chunks([]) == []


# -- adoption ------------------------------------------------------------------------------------------------------------


def test_an_arena_is_adopted_with_every_group_on_every_rank(engines: Engines) -> None:
    first, second = engines.put("a", 3), engines.put("b", 2, group=1)  # fewer planes than a slot has room for
    assert engines.restart() == AdoptionResult(5, 0, {}, ())
    assert engines.tier.acquire(chain_keys("a", 3)).slots == first.slots
    assert engines.tier.acquire(chain_keys("b", 2)).slots == second.slots
    assert (len(engines.tier), engines.tier.num_free) == (5, SLOTS - 5)
    engines.put("c", 3)


def test_a_new_arena_is_adopted(tier: DramTier) -> None:
    assert tier.adopt(all_alive) == AdoptionResult(0, 0, {}, ())
    assert tier.num_free == SLOTS


def tear_payload(arena: Arena, slot: int, rank: int) -> None:
    arena.parts(rank)[slot, 777] ^= 1


def tear_checksum(arena: Arena, slot: int, rank: int) -> None:
    arena.headers["checksum"][slot, rank, 1] ^= np.uint64(1)


def tear_key(arena: Arena, slot: int, rank: int) -> None:
    arena.headers["key"][slot] = np.void(key("another"))


def tear_magic(arena: Arena, slot: int, rank: int) -> None:
    arena.headers["magic"][slot] ^= np.uint64(1)


def tear_part_nbytes(arena: Arena, slot: int, rank: int) -> None:
    arena.headers["part_nbytes"][slot] += np.uint64(64)


def tear_codec(arena: Arena, slot: int, rank: int) -> None:
    arena.headers["codec"][slot] = 1


def tear_written(arena: Arena, slot: int, rank: int) -> None:
    arena.headers["written"][slot, rank] -= np.uint64(1)


def tear_generation(arena: Arena, slot: int, rank: int) -> None:
    arena.headers["generation"][slot] += np.uint64(1)


def tear_both_generations(arena: Arena, slot: int, rank: int) -> None:
    arena.headers["generation"][slot] += np.uint64(1)
    arena.headers["written"][slot] += np.uint64(1)


def no_sizes(arena: Arena, slot: int, rank: int) -> None:
    arena.headers["plane_nbytes"][slot, rank] = 0


def first_size_gone(arena: Arena, slot: int, rank: int) -> None:
    arena.headers["plane_nbytes"][slot, rank, 0] = 0


def sizes_beyond_the_slot(arena: Arena, slot: int, rank: int) -> None:
    arena.headers["plane_nbytes"][slot, rank, -1] = (1 << 32) - 64


def odd_size(arena: Arena, slot: int, rank: int) -> None:
    arena.headers["plane_nbytes"][slot, rank, 0] -= np.uint32(1)


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("tear", [
    tear_payload, tear_checksum, tear_key, tear_magic, tear_part_nbytes, tear_codec, tear_written, tear_generation,
    tear_both_generations, no_sizes, first_size_gone, sizes_beyond_the_slot, odd_size,
])  # fmt: skip
def test_a_torn_chunk_is_not_adopted(engines: Engines, tear: Callable[[Arena, int, int], None], rank: int) -> None:
    granted = engines.put("a", 3)
    tear(engines.arena, granted.slots[1], rank)
    assert engines.restart(all_alive) == AdoptionResult(2, 1, {}, ())
    assert engines.tier.contains(chain_keys("a", 3)) == 1
    assert engines.tier.num_free == SLOTS - 2
    assert states(engines.arena, granted.slots[1:2]) == {SlotState.FREE}


def test_a_chunk_that_lies_in_two_slots_is_adopted_once(engines: Engines) -> None:
    first, second = engines.put("a", 1), engines.put("b", 1)
    arena, size = engines.arena, engines.arena.spec.geometry.slot_nbytes
    at = [PAGE + slot * size for slot in (first.slots[0], second.slots[0])]
    arena.bytes[at[1] : at[1] + size] = arena.bytes[at[0] : at[0] + size]
    assert engines.restart() == AdoptionResult(1, 1, {}, ())
    assert engines.tier.num_free == SLOTS - 1


def test_tails_are_evicted_before_heads_after_a_restart(engines: Engines) -> None:
    one, other = chain_keys("a", 4), chain_keys("b", 4)
    for name in ("a", "b"):
        engines.put(name, 4)
    engines.restart()
    order = [engines.tier.grant(1).evicted[0] for _ in range(SLOTS)]
    for chain in (one, other):
        assert [k for k in order if k in chain] == chain[::-1]
    assert order[:2] in ([one[3], other[3]], [other[3], one[3]])


def test_unwritten_slots_stay_with_a_living_writer(tier: DramTier, arena: Arena) -> None:
    named_slots = named(tier.grant(2), chain_keys("a", 2))
    begin(arena, named_slots)
    tier.grant(1)  # the header names no owner
    write(arena, named_slots, [0])
    new = DramTier(arena, LRU())
    adopted = new.adopt(lambda pid, start: (pid, start) == WRITER)
    assert adopted == AdoptionResult(0, 0, dict.fromkeys(sorted(named_slots.slots), WRITER), ())
    assert new.num_free == SLOTS - 2
    write(arena, named_slots)
    assert new.publish(named_slots, NAMESPACE) == [False, False]  # its reservation ended with the old daemon
    assert new.num_free == SLOTS


def test_unwritten_slots_without_a_living_writer_are_free(tier: DramTier, arena: Arena) -> None:
    begin(arena, named(tier.grant(2), chain_keys("a", 2)))
    tier.grant(1)
    new = DramTier(arena, LRU())
    assert new.adopt(none_alive) == AdoptionResult(0, 0, {}, ())
    assert new.num_free == SLOTS
    assert states(arena, range(SLOTS)) == {SlotState.FREE}


def test_granted_slots_are_kept_while_a_process_lives(tier: DramTier, arena: Arena) -> None:
    """A client may begin to write a granted slot while the daemon dies."""
    stock = tier.grant(2)
    new = DramTier(arena, LRU())
    assert set(new.adopt(all_alive).unfinished) == set(stock.slots)
    assert set(new.grant(SLOTS).slots).isdisjoint(stock.slots)
    new.give_back(stock.slots)
    assert set(new.grant(SLOTS).slots) == set(stock.slots)


@pytest.mark.parametrize("alive", [none_alive, all_alive])
@pytest.mark.parametrize("how", ["clear", "drop", "bad"])
def test_a_chunk_forgotten_while_it_was_read_is_not_served_again(
    engines: Engines, how: str, alive: Callable[[int, int], bool]
) -> None:
    granted, chain = engines.put("a", 2), chain_keys("a", 2)
    lease = engines.tier.acquire(chain)
    if how == "clear":
        engines.tier.clear(NAMESPACE)
    elif how == "drop":
        engines.tier.drop(chain)
    else:
        engines.arena.mark_bad(np.array(lease.slots, dtype=np.int64))
    adopted = engines.restart(alive)
    assert (adopted.ready, adopted.torn, adopted.unfinished) == (0, 0, {})
    assert engines.tier.contains(chain) == 0
    kept = set(granted.slots) if alive is all_alive else set()  # a process may still read it
    assert set(adopted.unserved) == kept
    assert set(engines.tier.grant(SLOTS).slots).isdisjoint(kept)
    engines.tier.give_back(range(SLOTS))
    assert engines.tier.num_free == SLOTS


def test_a_second_crash_finds_what_the_first_left(engines: Engines) -> None:
    ready = engines.put("a", 2)
    writing = named(engines.tier.grant(1), chain_keys("b", 1))
    begin(engines.arena, writing)
    for _ in range(3):
        adopted = engines.restart(all_alive)
        assert (adopted.ready, set(adopted.unfinished)) == (2, set(writing.slots))
        assert engines.tier.acquire(chain_keys("a", 2)).slots == ready.slots
