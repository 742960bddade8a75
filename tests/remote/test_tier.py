"""The tier over a real cache and arena, and a store in memory: reads, writes, and the cost of faults."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from kvkern.arena.slots import SlotGeometry, SlotState
from kvkern.errors import ConfigError
from kvkern.policy.base import Use
from kvkern.policy.persist_modes import Persist
from kvkern.remote import cost_model
from kvkern.remote import tier as tier_module
from kvkern.remote.circuit_breaker import FAILURES
from kvkern.tiers.base import ChunkShape
from tests.node.conftest import GEOMETRY, eventually, read_verified, write_payload
from tests.remote.nodes import USE, Node, node, nodes
from tests.remote.stores.memory import MemoryStore
from tests.support import NAMESPACE, SHAPE, chain_keys

A, B, C = chain_keys("a", 6), chain_keys("b", 6), chain_keys("c", 6)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long waits, however little time the machine gives these threads."""
    monkeypatch.setattr(cost_model, "FIRST_WAIT_S", 30.0)
    monkeypatch.setattr(cost_model, "LEAST_WAIT_S", 30.0)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


# -- reading -----------------------------------------------------------------------------------------------------------


def test_another_node_loads_what_one_has_computed(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store) as (one, two):
        assert one.compute(A) == 6
        one.settle()
        assert sorted(store.values) == sorted(A)
        assert two.hits(A + B) == 6
        two.settle()
        assert two.cache.lookup(A) == 6  # it is in DRAM now
        assert two.counters["remote_hit_chunks"] == two.counters["hit_chunks"] == 6
        assert two.counters["remote_lookup_chunks"] == 12
        calls = len(two.store.calls)
        assert two.hits(A) == 6
        assert len(two.store.calls) == calls
        assert two.counters["remote_written_chunks"] == two.counters["stored_chunks"] == 0
        assert one.counters["remote_written_chunks"] == 6


def test_a_request_that_asks_again_counts_once(tmp_path: Path, store: MemoryStore) -> None:
    use = replace(USE, request=7)
    with nodes(tmp_path, store) as (one, two):
        one.compute(A)
        one.settle()
        for _ in range(5):
            two.cache.release(two.cache.acquire(A + B, use=use))
            two.settle()
            two.cache.drop(A)
        counters = two.counters
        assert (counters["lookup_chunks"], counters["hit_chunks"], counters["remote_lookup_chunks"]) == (12, 6, 12)
        two.cache.release(two.cache.acquire(A, use=replace(USE, request=8, counts_itself=True)))
        assert two.counters["hit_chunks"] == 6


def test_what_dram_has_is_extended(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store) as (one, two):
        one.compute(A)
        one.settle()
        assert two.compute(A[:2]) == 2
        assert two.hits(A) == 6
        assert two.counters["remote_hit_chunks"] == 4


def test_several_ranks_and_many_windows(tmp_path: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = SlotGeometry(part_nbytes=4608, max_planes=3, world_size=2)
    monkeypatch.setattr(tier_module, "WINDOW_NBYTES", (3 * geometry.slot_nbytes, 3 * geometry.slot_nbytes))
    long = chain_keys("long", 40)
    with nodes(tmp_path, store, slots=64, geometry=geometry) as (one, two):
        assert one.compute(long, seed=7) == 40
        one.settle()
        assert two.hits(long, seed=7) == 40
        assert [count for what, count in two.store.calls if what == "get"] == [*[3] * 12, 4]  # no call for one chunk


def test_a_hole_ends_the_prefix(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store) as (one, two):
        one.compute(A)
        one.settle()
        del store.values[A[3]]
        assert two.hits(A) == 3
        lease = two.acquire(A, prefix=False)  # a sliding window's group takes every chunk that is there
        assert sorted(lease.keys) == sorted([*A[:3], *A[4:]])
        assert read_verified(two.arena, lease)
        two.cache.release(lease)


def test_a_request_without_a_namespace_gets_what_dram_has(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store) as (one, two):
        one.compute(A)
        one.settle()
        lease = two.cache.acquire(A)
        assert not lease.keys
        two.cache.release(lease)


def test_what_was_just_absent_is_not_asked_for(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store) as (one, two):
        assert [two.hits(A) for _ in range(3)] == [0, 0, 0]
        assert [what for what, _ in two.store.calls].count("exists") == 1
        one.compute(A)
        one.settle()
        eventually(lambda: two.hits(A) == 6, "the end of ABSENT_S")


def test_behind_a_gap_little_is_asked_for(tmp_path: Path, store: MemoryStore) -> None:
    long = chain_keys("long", 100)
    with nodes(tmp_path, store, slots=128) as (one, two):
        assert two.hits(long) == 0
        assert [count for what, count in two.store.calls if what == "exists"] == [16]
        one.compute(long)
        one.settle()
        two.store.calls.clear()
        eventually(lambda: two.hits(long) == 100, "the end of ABSENT_S")
        assert [count for what, count in two.store.calls if what == "exists"] == [16, 64, 20]
        two.cache.clear()
        two.store.calls.clear()
        del store.values[long[50]]
        assert two.hits(long) == 50
        assert [count for what, count in two.store.calls if what == "exists"] == [16, 64]
        two.store.calls.clear()
        lease = two.acquire([*long[60:], *long[:50]], prefix=False)  # all chunks that are there: every key is asked for
        two.cache.release(lease)
        assert [count for what, count in two.store.calls if what == "exists"] == [40]


def test_two_requests_for_the_same_chunks_read_them_once(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store) as (one, two):
        one.compute(A)
        one.settle()
        two.store.delay_s = 0.05
        answers = [two.cache.acquire_soon(chain, True, USE) for chain in (A[:4], A, A[:2])]
        leases = [answer.result() for answer in answers]
        assert [len(lease.keys) for lease in leases] == [4, 6, 2]
        assert sum(count for what, count in two.store.calls if what == "get") == 6
        for lease in leases:
            assert read_verified(two.arena, lease)
            two.cache.release(lease)


def test_a_full_arena_of_leases_reads_what_it_has_room_for(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store, slots=8) as (one, two):
        one.compute(A)
        one.settle()
        two.compute(B[:5])
        held = two.acquire(B[:5])
        assert two.hits(A) == 3
        two.cache.release(held)
        eventually(lambda: two.hits(A) == 6)


# -- spoiled values ----------------------------------------------------------------------------------------------------


def spoil(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


HEADER = GEOMETRY.header_nbytes
FIELDS = {
    "magic": 0, "version": 8, "key": 16, "namespace": 48, "payload size": 80, "part size": 88, "generation": 104, "codec": 132,
    "written": 256, "checksum": 264, "plane size": 280, "payload": HEADER, "its end": HEADER + 255,
}  # fmt: skip


@pytest.mark.parametrize("at", FIELDS.values(), ids=FIELDS.keys())
def test_a_flipped_bit_is_a_miss_and_the_value_is_deleted(tmp_path: Path, store: MemoryStore, at: int) -> None:
    with nodes(tmp_path, store) as (one, two):
        one.compute(A)
        one.settle()
        store.values[A[2]] = spoil(store.values[A[2]], at)
        assert two.hits(A) == 2
        assert two.counters["remote_bad_chunks"] == 1
        assert A[2] not in store.values
        assert (
            two.compute(A) == 4
        )  # the keys behind it are missing too; the chunks that are computed anew are written anew
        two.settle()
        assert A[2] in store.values


def test_values_swapped_truncated_and_of_another_namespace(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store) as (one, two):
        for chain in (A, B, C):
            one.compute(chain[:2])
        one.settle()
        values = store.values
        values[A[0]], values[A[1]] = values[A[1]], values[A[0]]
        values[B[0]] = values[B[0]][:-1]
        assert two.hits(A[:2]) == 0
        assert two.hits(B[:2]) == 0
        lease = two.cache.acquire(C[:2], True, Use(namespace=bytes(31) + b"x"))
        assert not lease.keys
        two.cache.release(lease)
        assert two.counters["remote_bad_chunks"] == 5
        assert set(values) == {B[1]}


def test_a_spoiled_chunk_behind_a_good_one_costs_only_itself(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store) as (one, two):
        one.compute(A)
        one.settle()
        store.values[A[2]] = spoil(store.values[A[2]], HEADER + 9)
        lease = two.acquire(A, prefix=False)
        assert sorted(lease.keys) == sorted([*A[:2], *A[3:]])
        assert read_verified(two.arena, lease)
        two.cache.release(lease)


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_store_too_slow_to_pay_is_not_read_but_measured_now_and_then(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store, slots=64) as (one, two):
        for chain in (A, B, C):
            one.compute(chain)
        one.settle()
        two.compute(chain_keys("own", 1))
        two.tier.note_prefill(16 / 0.02)  # 20 ms a chunk
        two.tier.costs.note_read(1000, 1000 * 0.03)
        assert two.hits(A) == 0
        assert two.counters["remote_gated_chunks"] == 6
        two.tier.costs._read_at -= 100  # PROBE_S later
        assert two.hits(A) == 0  # no request waits for the measurement
        eventually(lambda: two.cache.lookup(A) == 2, "what was read for it in DRAM")
        assert two.counters["remote_late_chunks"] == 2
        for _ in range(10):  # it is fast now, and the tier finds that out
            two.tier.costs._read_at -= 100
            two.hits(B)
        two.tier.costs.note_read(1000, 1.0)
        assert two.hits(C) == 6


def test_a_broken_store_is_a_miss_and_soon_not_asked_any_more(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store) as (one, two):
        one.compute(A)
        one.settle()
        two.store.broken = True
        assert [two.hits(A) for _ in range(20)] == [0] * 20
        assert [what for what, _ in two.store.calls].count("exists") <= FAILURES + 1
        assert two.compute(B) == 6  # only the copy in the store is lost
        assert two.hits(B) == 6
        two.settle()
        assert two.counters["remote_dropped_chunks"] == 6
        two.store.broken = False
        eventually(lambda: two.hits(A) == 6, "recovery")


def test_a_store_that_does_not_answer_at_the_start(tmp_path: Path) -> None:
    store = MemoryStore()
    store.broken = True
    with node(tmp_path, store) as one:
        assert one.tier.breaker.is_open
        assert one.compute(A) == 6
        store.broken = False
        eventually(lambda: one.hits(B) == 0 and not one.tier.breaker.is_open, "the first trial")


def test_bad_configuration_at_the_start_is_an_error(tmp_path: Path) -> None:
    class Refusing(MemoryStore):
        async def open(self) -> None:
            raise ConfigError("wrong password; give the right one")

    threads = threading.active_count()
    with pytest.raises(ConfigError, match="wrong password"):
        Node(tmp_path, Refusing())
    assert threading.active_count() == threads


def test_a_bug_in_a_store_is_a_miss(tmp_path: Path, store: MemoryStore) -> None:
    class Buggy(MemoryStore):
        async def exists(self, keys: Sequence[bytes], timeout_s: float) -> list[bool]:
            raise IndexError("a bug")

    with node(tmp_path, Buggy()) as one:
        assert one.hits(A) == 0
        assert one.compute(A) == 6
        one.settle()
        assert one.counters["faults"] >= 2
        assert one.hits(A) == 6


def test_slots_under_a_call_that_hangs_are_nobody_else_s(tmp_path: Path, store: MemoryStore) -> None:
    """Nobody waits for the call any more, but it still owns its slots: nothing else uses them until it returns."""
    with nodes(tmp_path, store, slots=8) as (one, two):
        one.compute(A)
        one.settle()
        two.compute(B[:1])
        two.tier.note_prefill(1e6)  # it hardly waits
        gate = asyncio.Event()
        real = two.store.get

        async def hanging(*arguments: object) -> object:
            got = await real(*arguments)  # type: ignore[arg-type]
            await gate.wait()
            for _, payload in arguments[1]:  # type: ignore[attr-defined]
                payload[:] = bytes([9]) * len(payload)  # late, and wrong
            return got

        two.store.get = hanging  # type: ignore[method-assign,assignment]
        assert two.hits(A) == 0
        assert two.compute(C) == 2  # of 8 slots, 6 are under the call
        assert two.hits(C) == 2
        two.tier._loop.call_soon_threadsafe(gate.set)
        eventually(two.whole, "the end of the call")
        assert two.counters["remote_bad_chunks"] == 6  # what the call wrote in the end did not verify
        assert two.hits(C) == 2


# -- writing -----------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_written_again(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store) as (one, two):
        one.compute(A)
        one.settle()
        two.compute(A)
        two.settle()
        assert two.counters["remote_written_chunks"] == 0
        assert "put" not in [what for what, _ in two.store.calls]


def test_hot_writes_what_is_hit(tmp_path: Path, store: MemoryStore) -> None:
    with node(tmp_path, store, mode=Persist.HOT) as one:
        one.compute(A)
        one.compute(B)
        assert one.hits(A[:4]) == 4
        one.settle()
        assert sorted(store.values) == sorted(A[:4])
        assert [one.hits(A[:4]) for _ in range(3)] == [4, 4, 4]
        one.settle()
        assert one.counters["remote_written_chunks"] == 4


def test_evicted_writes_what_leaves_dram(tmp_path: Path, store: MemoryStore) -> None:
    with nodes(tmp_path, store, mode=Persist.EVICTED, slots=48) as (one, two):
        assert one.tier.spare == 6
        for chain in (A, B, C, *(chain_keys(name, 6) for name in "defg")):
            one.compute(chain)
        one.settle()
        assert not store.values  # 42 chunks, and 6 slots that stay free
        one.compute(chain_keys("h", 4))
        one.settle()
        assert set(store.values) == set(A[2:])  # tails go first
        assert two.hits(A) == 0  # its head was never evicted, so no other node has it
        one.compute(chain_keys("i", 4))
        one.settle()
        assert set(store.values) == {*A, *B[4:]}
        assert one.cache._dram.num_free == 6
        assert one.counters["remote_dropped_chunks"] == 0
        assert one.counters["evicted_chunks"] == one.counters["remote_written_chunks"] == 8
        assert one.hits(A) == 6  # it comes back
        eventually(lambda: two.hits(A) == 6, "the end of ABSENT_S")


def test_eviction_goes_on_when_the_store_hangs(tmp_path: Path, store: MemoryStore) -> None:
    """Waiting chunks are given up, the least valuable first, so that no engine waits."""
    with node(tmp_path, store, mode=Persist.EVICTED) as one:
        gate = asyncio.Event()
        store.gate = gate
        for chain in (A, B, C, chain_keys("d", 6), chain_keys("e", 6), chain_keys("f", 6)):
            assert one.compute(chain) == 6
        assert one.counters["remote_dropped_chunks"] > 0
        one.tier._loop.call_soon_threadsafe(gate.set)
        one.settle()
        assert len(store.values) >= 1
        written = one.counters["remote_written_chunks"] + one.counters["remote_dropped_chunks"]
        assert written <= one.counters["evicted_chunks"]
        for chain in (A, B, C):
            one.hits(chain)


def test_predicted_writes_what_probably_comes_back(tmp_path: Path, store: MemoryStore) -> None:
    with node(tmp_path, store, mode=Persist.PREDICTED, predict=True) as one:
        policy = one.cache._dram._policy
        likely: set[bytes] = set(A)
        asked: list[float] = []

        def chances(keys: Sequence[bytes], horizon_s: float) -> list[float]:
            asked.append(horizon_s)
            return [0.9 if key in likely else 0.0 for key in keys]

        policy.chances = chances  # type: ignore[attr-defined]
        for chain in (A, B, C, chain_keys("d", 6)):
            one.compute(chain)
        one.settle()
        assert asked
        assert set(store.values) <= likely
        assert one.counters["evicted_chunks"] > one.counters["remote_written_chunks"]


def test_a_full_queue_drops_tails_first(tmp_path: Path, store: MemoryStore) -> None:
    gate = asyncio.Event()
    with node(tmp_path, store, queue_slots=4) as one:
        store.gate = gate
        one.compute(A)
        eventually(lambda: len(one.tier.outbox) <= 4)
        one.compute(B)
        assert len(one.tier.outbox) <= 4
        dropped = one.counters["remote_dropped_chunks"]
        one.tier._loop.call_soon_threadsafe(gate.set)
        one.settle()
        assert dropped + len(store.values) == 12
        assert B[0] in store.values
        assert B[5] not in store.values


def evict(one: Node, keys: Sequence[bytes]) -> None:
    """Evict as a policy that names these keys would."""
    with one.cache._lock:
        one.cache._dram._policy.remove(keys)
        one.cache._dram._evict(keys)


def test_what_is_cleared_is_not_written_any_more(tmp_path: Path, store: MemoryStore) -> None:
    """Only the chunks of the cleared namespace are dropped. Values in the store stay."""
    gate, other = asyncio.Event(), ChunkShape(bytes(31) + b"x", group=0, chunk_tokens=16)
    first, mine, theirs = (chain_keys(name, 6) for name in ("first", "mine", "theirs"))
    with node(tmp_path, store, mode=Persist.EVICTED, slots=48) as one:
        one.tier._window_chunks = lambda chunk_s: 4  # type: ignore[method-assign]
        store.gate = gate
        for chain, shape in ((first, SHAPE), (mine, SHAPE), (theirs, other)):
            reservation = one.cache.reserve(chain, chain, shape, USE)
            write_payload(one.arena, reservation)
            assert one.cache.commit(reservation) == 6
        evict(one, first[:4])
        eventually(lambda: ("exists", 4) in store.calls, "the first window")
        evict(one, [*mine, *theirs])
        assert len(one.tier.outbox) == 12
        assert one.cache.clear(NAMESPACE) == 2
        assert len(one.tier.outbox) == 6
        assert one.counters["remote_dropped_chunks"] == 6
        one.tier._loop.call_soon_threadsafe(gate.set)
        one.settle()
        assert set(store.values) == {*first[:4], *theirs}


@pytest.mark.parametrize("mode", [Persist.ALL, Persist.HOT, Persist.EVICTED])
def test_what_nobody_else_can_name_is_not_written(tmp_path: Path, store: MemoryStore, mode: Persist) -> None:
    mine = ChunkShape(bytes(31) + b"x", group=0, chunk_tokens=16, private=True)
    with node(tmp_path, store, mode=mode) as one:
        for chain, shape in ((A, mine), (B[:2], SHAPE)):
            reservation = one.cache.reserve(chain, chain, shape, USE)
            write_payload(one.arena, reservation)
            assert one.cache.commit(reservation) == len(chain)
            assert one.hits(chain) == len(chain)
        one.settle()
        evict(one, [*A, *B[:2]])
        one.settle()
        assert set(store.values) == set(B[:2])
        assert one.counters["remote_dropped_chunks"] == 0


def test_a_store_without_room(tmp_path: Path, store: MemoryStore) -> None:
    store.full = True
    with node(tmp_path, store) as one:
        one.compute(A)
        one.settle()
        assert one.counters["remote_dropped_chunks"] == 6
        assert not one.tier.breaker.is_open


def test_the_end_writes_what_waits(tmp_path: Path, store: MemoryStore) -> None:
    one = Node(tmp_path, store)
    store.delay_s = 0.05
    one.compute(A)
    one.tier.close(drain_s=10.0)
    assert sorted(store.values) == sorted(A)
    assert store.calls[-1] == ("close", 0)
    assert one.cache.acquire(B, True, USE).keys == ()
    one.arena.close()


def test_the_end_gives_slots_back(tmp_path: Path, store: MemoryStore) -> None:
    one = Node(tmp_path, store, mode=Persist.EVICTED)
    store.delay_s = 0.1
    for chain in (A, B, C):
        one.compute(chain)
    one.close()
    assert (one.arena.headers["state"] != SlotState.WRITING).all()
