"""What every remote store has to do. The test file of a store subclasses `Conformance` and says how to make one.

class TestMine(Conformance):
    @pytest.fixture
    def make(self) -> MakeStore: ...     # makes unopened stores that see the same values

The test of a store over many servers, of which one may fail, subclasses `PartConformance` too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pytest

from kvkern.remote.stores.base import Got, Parts, RemoteError, RemoteStore

T = TypeVar("T")
MakeStore = Callable[[], RemoteStore]

HEADER_NBYTES = 4096
TIMEOUT_S = 30.0  # generous: a call that takes this long hangs
HIT, MISS, WRONG_SIZE, UNKNOWN = Got.HIT, Got.MISS, Got.WRONG_SIZE, Got.UNKNOWN


def key_of(number: int) -> bytes:
    """Return a key. Keys of different numbers differ in the first bytes and in the last."""
    return number.to_bytes(4, "little") * 8


class Memory:
    """Page-aligned memory as the tier passes it, in one piece that a store may register. Values lie in it one by one."""

    def __init__(self, count: int, payload_nbytes: int) -> None:
        stride = HEADER_NBYTES + -(-payload_nbytes // 4096) * 4096
        raw = np.zeros(count * stride + 4096, dtype=np.uint8)
        start = -raw.ctypes.data % 4096
        self._payload_nbytes = payload_nbytes
        self.bytes = raw[start : start + count * stride].reshape(count, stride)

    def parts(self, row: int) -> Parts:
        """Return header and payload of a value."""
        whole = memoryview(self.bytes[row])
        return whole[:HEADER_NBYTES], whole[HEADER_NBYTES : HEADER_NBYTES + self._payload_nbytes]

    def fill(self, row: int, seed: int) -> Parts:
        """Fill a value with noise and return its `parts`."""
        self.bytes[row] = np.random.default_rng(seed).integers(0, 256, self.bytes.shape[1], dtype=np.uint8)
        return self.parts(row)

    @property
    def whole(self) -> memoryview:
        """The memory to register."""
        return memoryview(self.bytes).cast("B")

    def holds(self, row: int, other: Parts) -> bool:
        """Return True if value `row` and `other` are equal, bit for bit."""
        return all(bytes(mine) == bytes(theirs) for mine, theirs in zip(self.parts(row), other, strict=True))


class Bench:
    """A loop, one opened store on it, and memory: values are written from the first half and read into the second."""

    def __init__(self, make: MakeStore, count: int = 8, payload_nbytes: int = 70_000) -> None:
        self.make = make
        self.count = count
        self.memory = Memory(2 * count, payload_nbytes)
        self.runner = asyncio.Runner()
        self._opened: list[RemoteStore] = []
        self.store = self.another()

    def another(self, memory: Memory | None = None) -> RemoteStore:
        """Open one more store, with this memory."""
        store = self.make()
        self._opened.append(store)
        self.run(store.open())
        self.run(store.register((memory or self.memory).whole))
        return store

    def run(self, call: Awaitable[T]) -> T:
        """Return the result of a call, which must end."""

        async def bounded() -> T:
            return await asyncio.wait_for(call, 2 * TIMEOUT_S)

        return self.runner.run(bounded())

    def values(self, seed: int = 1) -> list[Parts]:
        """Return values to write, with new noise."""
        return [self.memory.fill(row, seed * 1000 + row) for row in range(self.count)]

    def into(self) -> list[Parts]:
        """Return zeroed buffers to read into."""
        self.memory.bytes[self.count :] = 0
        return [self.memory.parts(row) for row in range(self.count, 2 * self.count)]

    def put(
        self, keys: Sequence[bytes], values: Sequence[Parts], store: RemoteStore | None = None
    ) -> list[bool | None]:
        return list(self.run((store or self.store).put(keys, values, TIMEOUT_S)))

    def get(self, keys: Sequence[bytes], into: Sequence[Parts], store: RemoteStore | None = None) -> list[Got]:
        return list(self.run((store or self.store).get(keys, into, TIMEOUT_S)))

    def exists(self, keys: Sequence[bytes], store: RemoteStore | None = None) -> list[bool | None]:
        return list(self.run((store or self.store).exists(keys, TIMEOUT_S)))

    def read(self, row: int) -> bool:
        """Return True if buffer `row` holds the bytes of value `row`."""
        return self.memory.holds(self.count + row, self.memory.parts(row))

    def close(self) -> None:
        for store in self._opened:
            self.run(store.close())
        self.runner.close()


@dataclass
class Part:
    """A store over several servers, one of which is about to fail. All keys have values."""

    bench: Bench
    living: list[bytes]  # on servers that go on; known once one has failed
    failing: list[bytes]
    fail: Callable[[], object]
    heal: Callable[[], object] | None = None
    timeout_s: float = TIMEOUT_S
    exists_fails: bool = True  # False: another server answers `exists`, and it goes on

    def mixed(self) -> list[bytes]:
        """Return living and failing keys, in turns."""
        return [key for pair in zip(self.living, self.failing, strict=False) for key in pair]


class PartConformance:
    """Subclass it and define `part`: keys of a failed server are unknown, and the answers for all other keys are true."""

    @pytest.fixture
    def part(self) -> Iterator[Part]:
        raise NotImplementedError

    def test_a_server_of_many_that_fails(self, part: Part) -> None:
        bench, store, timeout_s = part.bench, part.bench.store, part.timeout_s
        part.fail()
        keys = part.mixed()
        count = len(keys)
        assert count >= 4
        assert list(bench.run(store.exists(keys, timeout_s))) == [True, None if part.exists_fails else True] * (
            count // 2
        )
        assert list(bench.run(store.get(keys, bench.into()[:count], timeout_s))) == [HIT, UNKNOWN] * (count // 2)
        backwards = list(bench.run(store.get(keys[::-1], bench.into()[:count], timeout_s)))  # the first key fails
        assert backwards == [UNKNOWN, HIT] * (count // 2)
        for call in (
            store.get(part.failing, bench.into()[: len(part.failing)], timeout_s),
            *([store.exists(part.failing, timeout_s)] if part.exists_fails else []),
        ):
            with pytest.raises(RemoteError):
                bench.run(call)
        if part.exists_fails:
            taken = list(bench.run(store.put(keys, bench.values()[:count], timeout_s)))
            assert taken == [True, None] * (count // 2)
            with pytest.raises(RemoteError):
                bench.run(store.delete(keys, timeout_s))
        if part.heal is not None:
            part.heal()
            assert bench.put(keys, bench.values()[:count]) == [True] * count
            assert bench.get(keys, bench.into()[:count]) == [HIT] * count
            assert all(bench.read(row) for row in range(count))


class Conformance:
    """Subclass it and define `make`."""

    @pytest.fixture
    def make(self) -> MakeStore:
        raise NotImplementedError

    @pytest.fixture
    def bench(self, make: MakeStore) -> Any:
        bench = Bench(make)
        yield bench
        bench.close()

    def test_what_was_put_comes_back(self, bench: Bench) -> None:
        keys, values = [key_of(i) for i in range(bench.count)], bench.values()
        assert bench.exists(keys) == [False] * bench.count
        assert bench.put(keys, values) == [True] * bench.count
        assert bench.exists(keys) == [True] * bench.count
        assert bench.get(keys, bench.into()) == [HIT] * bench.count
        assert all(bench.read(row) for row in range(bench.count))

    def test_values_of_every_size(self, make: MakeStore) -> None:
        for payload_nbytes in (0, 1, 4095, 4096, 65_536, 2 << 20, (2 << 20) + 777):
            bench = Bench(make, count=2, payload_nbytes=payload_nbytes)
            keys, values = [key_of(900 + payload_nbytes), key_of(1_000_000 + payload_nbytes)], bench.values()
            assert bench.put(keys, values) == [True, True]
            assert bench.get(keys, bench.into()) == [HIT, HIT]
            assert bench.read(0)
            assert bench.read(1)
            bench.close()

    def test_misses(self, bench: Bench) -> None:
        keys, values = [key_of(i) for i in range(6)], bench.values()
        assert bench.get(keys[:1], bench.into()[:1]) == [MISS]
        assert bench.put([keys[0], keys[1], keys[3]], values[:3]) == [True] * 3
        assert bench.exists(keys) == [True, True, False, True, False, False]
        got = bench.get(keys, bench.into()[:6])
        assert got[:3] == [HIT, HIT, MISS]
        assert got[3] in (HIT, MISS)  # keys behind the first miss need not be read
        assert got[4:] == [MISS, MISS]
        assert bench.read(0)
        assert bench.read(1)

    def test_order_is_the_caller_s(self, bench: Bench) -> None:
        keys, values = [key_of(i) for i in range(bench.count)], bench.values()
        bench.put(keys, values)
        assert bench.get(keys[::-1], bench.into()) == [HIT] * bench.count
        for row in range(bench.count):
            assert bench.memory.holds(bench.count + row, values[bench.count - 1 - row])
        assert bench.get([keys[3]] * 3, bench.into()[:3]) == [HIT] * 3
        assert all(bench.memory.holds(bench.count + row, values[3]) for row in range(3))

    def test_nothing_beside_the_buffers_is_written(self, bench: Bench) -> None:
        keys, values = [key_of(i) for i in range(2)], bench.values()
        bench.put(keys, values[:2])
        into = bench.into()
        bench.memory.bytes[bench.count :] = 0xAB
        assert bench.get(keys, into[:2]) == [HIT, HIT]
        used = HEADER_NBYTES + len(into[0][1])
        assert (bench.memory.bytes[bench.count : bench.count + 2, used:] == 0xAB).all()
        assert (bench.memory.bytes[bench.count + 2 :] == 0xAB).all()

    def test_put_again(self, bench: Bench) -> None:
        """A value that is there stays or is replaced, and is whole in both cases."""
        key, values = key_of(1), bench.values()
        assert bench.put([key], values[:1]) == [True]
        assert bench.put([key], values[1:2]) == [True]
        assert bench.get([key], bench.into()[:1]) == [HIT]
        assert bench.memory.holds(bench.count, values[0]) or bench.memory.holds(bench.count, values[1])

    def test_a_value_of_another_size_is_none(self, make: MakeStore) -> None:
        bench, longer = Bench(make), Memory(2, 80_000)
        key = key_of(1)
        other = bench.another(longer)
        assert bench.put([key, key_of(2)], bench.values()[:2]) == [True, True]
        assert bench.put([key_of(3)], [longer.fill(0, 5)], store=other) == [True]
        assert bench.get([key], [longer.parts(1)], store=other) == [WRONG_SIZE]
        got = bench.get([key_of(3), key_of(2)], bench.into()[:2])  # the next value is still read correctly
        assert got[0] == WRONG_SIZE
        assert got[1] in (HIT, MISS)
        if got[1] == HIT:
            assert bench.read(1)
        assert bench.get([key_of(2)], bench.into()[1:2]) == [HIT]
        assert bench.read(1)
        bench.close()

    def test_delete(self, bench: Bench) -> None:
        keys, values = [key_of(i) for i in range(4)], bench.values()
        bench.put(keys, values[:4])
        bench.run(bench.store.delete([keys[1], keys[2], key_of(99)], TIMEOUT_S))
        assert bench.exists(keys) == [True, False, False, True]
        assert bench.get(keys[1:2], bench.into()[:1]) == [MISS]
        assert bench.put(keys[1:2], values[1:2]) == [True]
        assert bench.get(keys[1:2], bench.into()[1:2]) == [HIT]
        assert bench.read(1)

    def test_empty_batches(self, bench: Bench) -> None:
        assert bench.put([], []) == []
        assert bench.get([], []) == []
        assert bench.exists([]) == []
        bench.run(bench.store.delete([], TIMEOUT_S))

    def test_large_batches(self, make: MakeStore) -> None:
        bench = Bench(make, count=600, payload_nbytes=1000)
        keys, values = [key_of(i) for i in range(600)], bench.values()
        assert bench.put(keys, values) == [True] * 600
        assert bench.exists([*keys, key_of(700)]) == [*([True] * 600), False]
        assert bench.get(keys, bench.into()) == [HIT] * 600
        assert all(bench.read(row) for row in range(600))
        bench.close()

    def test_calls_overlap(self, bench: Bench) -> None:
        keys, values = [key_of(i) for i in range(bench.count)], bench.values()
        half = bench.count // 2
        bench.put(keys[:half], values[:half])
        into = bench.into()

        async def all_at_once() -> list[Any]:
            store = bench.store
            gets = [store.get([keys[i]], [into[i]], TIMEOUT_S) for i in range(half)]
            puts = [store.put([keys[i]], [values[i]], TIMEOUT_S) for i in range(half, bench.count)]
            return await asyncio.gather(*gets, *puts, *(store.exists(keys[:half], TIMEOUT_S) for _ in range(4)))

        answers = bench.run(all_at_once())
        assert answers[:half] == [[HIT]] * half
        assert answers[half : bench.count] == [[True]] * (bench.count - half)
        assert answers[bench.count :] == [[True] * half] * 4
        assert all(bench.read(row) for row in range(half))
        assert bench.exists(keys) == [True] * bench.count

    def test_stores_of_other_nodes_see_it(self, bench: Bench) -> None:
        keys, values = [key_of(i) for i in range(3)], bench.values()
        other = bench.another()
        assert bench.put(keys, values[:3]) == [True] * 3
        assert bench.exists(keys, store=other) == [True] * 3
        assert bench.get(keys, bench.into()[:3], store=other) == [HIT] * 3
        assert all(bench.read(row) for row in range(3))

    def test_the_same_key_from_two_nodes_at_once(self, bench: Bench) -> None:
        """A reader sees one of the two values, never a mixture."""
        key, values, other = key_of(1), bench.values(), bench.another()
        into = bench.into()

        async def race() -> list[Any]:
            return await asyncio.gather(
                bench.store.put([key], [values[0]], TIMEOUT_S), other.put([key], [values[1]], TIMEOUT_S),
                bench.store.get([key], [into[0]], TIMEOUT_S), other.get([key], [into[1]], TIMEOUT_S),
            )  # fmt: skip

        for _ in range(5):
            _, _, *got = bench.run(race())
            for row, (outcome,) in enumerate(got):
                if outcome == HIT:
                    assert any(bench.memory.holds(bench.count + row, value) for value in values[:2])
            bench.run(bench.store.delete([key], TIMEOUT_S))

    def test_a_cancelled_call_is_done_with_the_memory(self, bench: Bench) -> None:
        """After the await has ended, in whatever way, nothing is written into the buffers any more."""
        keys, values = [key_of(i) for i in range(bench.count)], bench.values()
        bench.put(keys, values)
        into = bench.into()

        async def give_up() -> None:
            call = asyncio.ensure_future(bench.store.get(keys, into, TIMEOUT_S))
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait({call})
            bench.memory.bytes[bench.count :] = 0xCD
            await asyncio.sleep(0.1)

        bench.run(give_up())
        assert (bench.memory.bytes[bench.count :] == 0xCD).all()
        assert bench.get(keys, bench.into()) == [HIT] * bench.count  # and the store works as before
        assert all(bench.read(row) for row in range(bench.count))
