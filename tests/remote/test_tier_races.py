"""The tier while something else happens at the same time: reads, writes, clears, a close, faults."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvkern.errors import ConfigError
from kvkern.policy.persist_modes import Persist
from kvkern.remote import cost_model
from kvkern.remote import tier as tier_module
from kvkern.remote.stores.base import Got, Parts, RemoteError
from tests.node.conftest import GEOMETRY, eventually, read_verified, write_payload
from tests.remote.nodes import USE, A, B, C, Node, node
from tests.remote.stores.memory import MemoryStore
from tests.support import NAMESPACE, SHAPE, chain_keys

Step = Callable[[Sequence[bytes]], Awaitable[None]]


class Scripted(MemoryStore):
    """A store that runs a step of the test before or after a call."""

    def __init__(self, values: dict[bytes, bytes]) -> None:
        super().__init__(values)
        self.before: dict[str, Step] = {}
        self.after: dict[str, Step] = {}

    async def _scripted(self, what: str, keys: Sequence[bytes], call: Awaitable[object]) -> object:
        try:
            if what in self.before:
                await self.before[what](keys)
        except BaseException:
            call.close()  # type: ignore[attr-defined]
            raise
        result = await call
        if what in self.after:
            await self.after[what](keys)
        return result

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> list[bool]:
        return await self._scripted("exists", keys, super().exists(keys, timeout_s))  # type: ignore[return-value]

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
        return await self._scripted("get", keys, super().get(keys, into, timeout_s))  # type: ignore[return-value]

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> list[bool]:
        return await self._scripted("put", keys, super().put(keys, values, timeout_s))  # type: ignore[return-value]

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        await self._scripted("delete", keys, super().delete(keys, timeout_s))


class Gate:
    """A step that waits until the test lets it go, or ends."""

    def __init__(self) -> None:
        self._open, self._reached = threading.Event(), threading.Event()

    async def __call__(self, keys: Sequence[bytes]) -> None:
        self._reached.set()
        await asyncio.to_thread(self._open.wait)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()

    def wait(self) -> None:
        assert self._reached.wait(30)

    def open(self) -> None:
        self._open.set()


def fails(error: BaseException) -> Step:
    async def step(keys: Sequence[bytes]) -> None:
        raise error

    return step


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long waits, however little time the machine gives these threads."""
    monkeypatch.setattr(cost_model, "FIRST_WAIT_S", 30.0)
    monkeypatch.setattr(cost_model, "LEAST_WAIT_S", 30.0)


@pytest.fixture
def values(tmp_path: Path) -> dict[bytes, bytes]:
    """A store that holds A, B and C."""
    store = MemoryStore()
    with node(tmp_path, store, slots=32) as one:
        for chain in (A, B, C):
            assert one.compute(chain) == 6
        one.settle()
    return store.values


@pytest.fixture
def store(values: dict[bytes, bytes]) -> Scripted:
    return Scripted(values)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of two chunks."""
    limit = 2 * GEOMETRY.slot_nbytes
    monkeypatch.setattr(tier_module, "WINDOW_NBYTES", (limit, limit))


# -- prefixes ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("how", ["gone", "spoiled"])
def test_nothing_behind_a_hole_is_handed_out(tmp_path: Path, store: Scripted, how: str) -> None:
    """Two windows are read at a time: the second has come when the first turns out to miss a chunk."""

    async def meanwhile(keys: Sequence[bytes]) -> None:
        if how == "gone":
            store.values.pop(A[1], None)
        elif A[1] in store.values:
            value = bytearray(store.values[A[1]])
            value[GEOMETRY.header_nbytes] ^= 1
            store.values[A[1]] = bytes(value)

    store.after["exists"] = meanwhile
    with node(tmp_path, store) as one:
        lease = one.acquire(A)
        assert lease.keys == tuple(A[:1])
        assert read_verified(one.arena, lease)
        assert one.counters["hit_chunks"] == 1
        one.cache.release(lease)
        one.settle()
        assert one.cache.lookup(A[2:4]) == 2  # read in vain, but kept in DRAM


@pytest.mark.usefixtures("small_windows")
def test_a_window_that_found_no_room_ends_the_prefix(tmp_path: Path, store: Scripted) -> None:
    with node(tmp_path, store, slots=8) as one:
        assert one.compute(B) == 6
        held = [one.acquire(B[:5]), one.acquire(B[:6])]

        async def meanwhile(keys: Sequence[bytes]) -> None:  # slots become free between the grants of two windows
            if len(held) == 2:
                one.cache.release(held.pop())

        granted = one.cache.grant(1)  # one slot is left for the first window
        store.before["get"] = meanwhile
        lease = one.acquire(A)
        assert lease.keys == tuple(A[: len(lease.keys)])
        assert read_verified(one.arena, lease)
        store.before.clear()
        for each in (lease, *held):
            one.cache.release(each)
        one.cache.give_back(granted.slots)
        one.settle()


def test_a_key_twice_in_a_request(tmp_path: Path, store: Scripted) -> None:
    chain = [A[0], A[0], A[1], A[1], A[0], A[2]]
    for prefix in (True, False):
        with node(tmp_path, Scripted(store.values)) as one:
            one.compute(A[:1])
            for _ in range(2):
                lease = one.acquire(chain, prefix)
                assert sorted(lease.keys) == sorted(chain)
                if prefix:
                    assert list(lease.keys) == chain
                assert read_verified(one.arena, lease)
                assert one.cache.release(lease) == 0
            one.settle()
            assert one.whole()


def test_hits_by_somebody_else_s_read_count(tmp_path: Path, store: Scripted) -> None:
    with node(tmp_path, store) as one, Gate() as gate:
        store.before["get"] = gate
        first = one.cache.acquire_soon(A, True, USE)
        gate.wait()
        second = one.cache.acquire_soon(A, True, USE)
        gate.open()
        for answer in (first, second):
            lease = answer.result(30)
            assert lease.keys == tuple(A)
            one.cache.release(lease)
        assert one.counters["hit_chunks"] == one.counters["remote_lookup_chunks"] == 12
        assert one.counters["remote_hit_chunks"] == 6


def test_what_another_request_has_read_meanwhile_is_not_read_again(tmp_path: Path, store: Scripted) -> None:
    with node(tmp_path, store) as one, Gate() as gate:

        async def first_asks_long(keys: Sequence[bytes]) -> None:
            if [what for what, _ in store.calls].count("exists") == 1:
                await gate(keys)

        store.after["exists"] = first_asks_long
        first = one.cache.acquire_soon(A, True, USE)
        gate.wait()
        assert one.hits(A) == 6
        gate.open()
        lease = first.result(30)
        assert lease.keys == tuple(A)
        one.cache.release(lease)
        assert sum(count for what, count in store.calls if what == "get") == one.counters["remote_hit_chunks"] == 6


# -- who else has the chunk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_an_engine_computes_what_is_being_read(tmp_path: Path, store: Scripted, end: str) -> None:
    """A request stops waiting and writes the chunks itself; then the chunks of the store come."""
    with node(tmp_path, store) as one, Gate() as gate:
        store.before["get"] = gate
        one.tier.costs.note_prefill(1e9)
        one.tier.outbox.chunk_tokens = 16
        assert one.hits(A) == 0
        gate.wait()
        reservation = one.cache.reserve(A, A, SHAPE, USE)
        assert len(reservation.slots) == 6
        write_payload(one.arena, reservation)
        gate.open()
        eventually(lambda: one.cache.lookup(A) == 6, "the late chunks")
        lease = one.acquire(A)
        assert read_verified(one.arena, lease)
        if end == "commit":
            one.cache.commit(reservation)
        else:
            one.cache.abort(reservation)
        assert read_verified(one.arena, lease)
        one.cache.release(lease)
        assert one.counters["faults"] == 0
        assert one.hits(A) == 6
        for chain in (B, C, chain_keys("d", 6), chain_keys("e", 16)):  # every slot can be used again
            one.settle()  # chunks that are being written are leased
            assert one.whole()
            assert one.compute(chain) == len(chain)
        one.settle()


@pytest.mark.parametrize("what", ["namespace", "all", "other", "drop"])
def test_a_clear_while_chunks_come(tmp_path: Path, store: Scripted, what: str) -> None:
    with node(tmp_path, store) as one, Gate() as gate:
        store.before["get"] = gate
        answer = one.cache.acquire_soon(A, True, USE)
        gate.wait()
        if what == "drop":
            one.cache.drop(A)
        else:
            one.cache.clear({"namespace": NAMESPACE, "all": None, "other": bytes(32)[:31] + b"o"}[what])
        gate.open()
        lease = answer.result(30)
        assert len(lease.keys) == (0 if what in ("namespace", "all") else 6)
        assert read_verified(one.arena, lease)
        one.cache.release(lease)
        one.settle()
        assert one.whole()
        assert one.hits(A) == 6  # the clear did not clear the store


def test_a_clear_with_a_writer_of_the_same_chunks(tmp_path: Path, store: Scripted) -> None:
    """After a clear, a node stores the chunks behind one that the clear has overtaken on its way."""
    with node(tmp_path, store, slots=24) as one, Gate() as gate:
        store.before["get"] = gate
        answer = one.cache.acquire_soon(A, True, USE)
        gate.wait()
        one.cache.clear(NAMESPACE)
        assert one.compute(A, wanted=A[1:]) == 5
        gate.open()
        lease = answer.result(30)
        assert lease.keys == ()
        one.cache.release(lease)
        one.settle()


def test_slots_that_have_departed_are_called_back(tmp_path: Path) -> None:
    """Chunks are evicted, written, cleared, dropped, asked for, computed again: each slot has one owner at a time."""
    store = Scripted({})
    with node(tmp_path, store, mode=Persist.EVICTED, slots=16) as one, Gate() as gate:
        store.before["put"] = gate
        for chain in (A, B, C, chain_keys("d", 6), A, B):
            assert one.compute(chain) == 6
            assert one.hits(chain) == 6
        assert one.cache._dram._departing
        one.cache.clear(NAMESPACE)
        assert one.compute(C) == 6
        one.cache.drop(C)
        assert one.compute(chain_keys("e", 12)) >= 8  # all but the slots under the call
        gate.open()
        one.settle()
        assert one.whole()
        written, dropped = one.counters["remote_written_chunks"], one.counters["remote_dropped_chunks"]
        assert written + dropped <= one.counters["evicted_chunks"]
        assert one.counters["faults"] == 0


def test_recall_and_take_share_no_slot(tmp_path: Path) -> None:
    """Several engines evict while the loop writes as fast as it can: no slot is freed twice."""
    with node(tmp_path, MemoryStore(), mode=Persist.EVICTED, slots=24, queue_slots=4) as one:

        def engine(number: int) -> None:
            for turn in range(60):
                chain = chain_keys((number, turn % 7), 5)
                one.hits(chain)
                one.compute(chain)
                if turn % 20 == 19:
                    one.cache.clear(NAMESPACE)

        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(engine, number) for number in range(3)]:
                done.result()
        one.settle()
        assert one.whole()
        assert one.counters["faults"] == 0


# -- calls that fail ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("error", [RemoteError("on purpose"), ValueError("a bug"), ConfigError("mend it")], ids=type)
@pytest.mark.parametrize("call", range(8))
def test_any_call_may_fail(tmp_path: Path, store: Scripted, call: int, error: Exception) -> None:
    """The n-th call fails, whatever call it is: a miss, and every slot and writer is as before."""
    count = 0

    async def counted(keys: Sequence[bytes]) -> None:
        nonlocal count
        count += 1
        if count == call + 1:
            raise error

    store.before = dict.fromkeys(("exists", "get", "put", "delete"), counted)
    value = bytearray(store.values[A[5]])
    value[-1 - GEOMETRY.part_stride + GEOMETRY.part_nbytes] ^= 1
    store.values[A[5]] = bytes(value)
    with node(tmp_path, store, slots=8) as one:
        for chain in (A, B, chain_keys("new", 4), A, B):
            one.hits(chain)
            one.compute(chain)
            one.settle()
            assert one.whole()
        store.before.clear()
        assert one.compute(chain_keys("newer", 6)) == 6
        one.settle()
        assert chain_keys("newer", 6)[5] in store.values  # the writers still run
        assert len(one.tier._tasks) == 1


def test_a_delete_that_fails_costs_nothing_that_was_good(tmp_path: Path, store: Scripted) -> None:
    store.values[A[4]] = store.values[A[4]][:-1]
    store.before["delete"] = fails(RemoteError("no right to delete"))
    with node(tmp_path, store) as one:
        assert one.hits(A) == 4
        assert one.counters["remote_failures"] == one.counters["remote_bad_chunks"] == 1


def test_a_store_that_answers_too_little(tmp_path: Path, store: Scripted) -> None:
    class Short(MemoryStore):
        async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
            return (await super().get(keys, into, timeout_s))[:-1]

    class Liar(MemoryStore):
        async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
            return [Got.HIT] * len(keys)  # but it has read nothing

    class Silent(MemoryStore):
        async def exists(self, keys: Sequence[bytes], timeout_s: float) -> list[bool]:
            return []

    with node(tmp_path, Silent(dict(store.values))) as one:
        assert one.hits(A) == 0
    for kind in (Short, Liar):
        with node(tmp_path, kind(dict(store.values))) as one:
            assert one.hits(A) == (5 if kind is Short else 0)
            assert one.hits(A) <= 5
            one.settle()
            assert one.whole()


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [Persist.ALL, Persist.EVICTED])
def test_the_end_while_calls_hang(tmp_path: Path, store: Scripted, mode: Persist) -> None:
    """Closing waits only for the calls under way. A request for a prefix of many windows gets the chunks that have come."""

    async def slow(keys: Sequence[bytes]) -> None:
        await asyncio.sleep(0.3)

    one = Node(tmp_path, store, mode=mode, slots=16)
    for chain in (chain_keys("x", 6), chain_keys("y", 6)):
        one.compute(chain)
    one.settle()
    store.before = dict.fromkeys(("exists", "get", "put"), slow)
    answers = [one.cache.acquire_soon(chain, True, USE) for chain in (A, B, C)]
    for name in "pqr":
        one.compute(chain_keys(name, 6))
    began = time.monotonic()
    one.tier.close()
    assert time.monotonic() - began < 10  # a request would wait 30 s
    for answer in answers:
        assert answer.done()
        one.cache.release(answer.result())
    assert one.whole()
    one.arena.close()


@pytest.mark.usefixtures("small_windows")
def test_the_end_begins_no_further_windows(tmp_path: Path, store: Scripted) -> None:
    with node(tmp_path, store) as one, Gate() as gate:
        store.before["get"] = gate
        answer = one.cache.acquire_soon(A, True, USE)
        gate.wait()
        threading.Timer(0.2, gate.open).start()
        one.tier.close()
        lease = answer.result(0)
        assert lease.keys in (tuple(A[:2]), tuple(A[:4]))
        assert read_verified(one.arena, lease)
        one.cache.release(lease)


def test_requests_and_the_end_at_once(tmp_path: Path, values: dict[bytes, bytes]) -> None:
    """Every request is answered, whenever the tier is closed."""
    for turn in range(15):
        one = Node(tmp_path, MemoryStore(values), slots=32)
        begun = threading.Barrier(4)

        def ask(one: Node = one, begun: threading.Barrier = begun) -> None:
            begun.wait()
            for chain in (A, B, C, *(chain_keys(("absent", i), 2) for i in range(20))):
                lease = one.cache.acquire_soon(chain, True, USE).result(20)
                one.cache.release(lease)
                one.compute(chain)

        with ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(ask) for _ in range(3)]
            begun.wait()
            time.sleep(0.001 * turn)
            one.tier.close()
            for done in asking:
                done.result(30)
        assert one.counters["faults"] == 0
        assert one.whole()
        one.arena.close()


def test_who_waits_cannot_cancel(tmp_path: Path, store: Scripted) -> None:
    """Nobody would own the lease of a cancelled future."""
    with node(tmp_path, store) as one:
        one.compute(A[:2])
        gate = store.before["get"] = Gate()
        answer = one.cache.acquire_soon(A, True, USE)
        gate.wait()
        assert not answer.cancel()
        gate.open()
        one.cache.release(answer.result(30))


def test_what_is_read_long_after_it_was_written(tmp_path: Path) -> None:
    with node(tmp_path, MemoryStore()) as one:
        one.compute(A)
        one.settle()
        one.tier.costs.note_gone(0.0)
        one.tier.presence.written_at[A[3]] -= 1000
        one.cache.drop(A)
        assert one.hits(A) == 6
        assert one.tier.costs.residency_s == pytest.approx(50, rel=0.1)
