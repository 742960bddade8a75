"""Keys that a store could not answer for: they are neither there nor absent, in every kind of call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvkern.remote import cost_model, store_calls
from kvkern.remote.circuit_breaker import FAILURES
from kvkern.remote.cost_model import FOREVER_S
from kvkern.remote.stores.base import Got, Parts, RemoteError
from tests.node.conftest import eventually, read_verified
from tests.remote.nodes import A, B, C, Node, node
from tests.remote.stores.memory import MemoryStore
from tests.support import chain_keys


class Sharded(MemoryStore):
    """A store over servers that hold one key each: some are down, for some kinds of calls."""

    def __init__(self, values: dict[bytes, bytes]) -> None:
        super().__init__(values)
        self.down: set[bytes] = set()
        self.kinds = {"exists", "get", "put"}
        self.takes_s = 0.0  # seconds of a call that asks a server that is down

    async def _ask(self, what: str, keys: Sequence[bytes]) -> list[bool]:
        """Return for each key whether its server answers."""
        answered = [what not in self.kinds or key not in self.down for key in keys]
        if not all(answered):
            await asyncio.sleep(self.takes_s)
        if keys and not any(answered):
            raise RemoteError("all are down")
        return answered

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> list[bool | None]:  # type: ignore[override]
        there = await super().exists(keys, timeout_s)
        return [one if ok else None for one, ok in zip(there, await self._ask("exists", keys), strict=True)]

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
        got = await super().get(keys, into, timeout_s)
        return [one if ok else Got.UNKNOWN for one, ok in zip(got, await self._ask("get", keys), strict=True)]

    async def put(  # type: ignore[override]
        self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float
    ) -> list[bool | None]:
        answered = await self._ask("put", keys)
        rows = [row for row, ok in enumerate(answered) if ok]
        await super().put([keys[row] for row in rows], [values[row] for row in rows], timeout_s)
        return [ok or None for ok in answered]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long waits, however little time the machine gives these threads."""
    monkeypatch.setattr(cost_model, "FIRST_WAIT_S", 30.0)
    monkeypatch.setattr(cost_model, "LEAST_WAIT_S", 30.0)
    monkeypatch.setattr(store_calls, "LATE_SHARE", 100.0)  # an answer in part is soon enough, whenever it comes


@pytest.fixture
def store() -> Sharded:
    return Sharded({})


def written(one: Node) -> None:
    """A, B and C are in the store, written by this node, and not in its DRAM."""
    for chain in (A, B, C):
        assert one.compute(chain) == 6
        one.settle()
        one.cache.drop(chain)


def nothing_concluded(one: Node, keys: Sequence[bytes]) -> None:
    assert not set(keys) & set(one.tier.presence.absent)
    assert set(keys) <= set(one.tier.presence.written_at)
    assert one.tier.costs.residency_s == FOREVER_S
    assert one.counters["remote_bad_chunks"] == one.counters["faults"] == 0
    assert not [what for what, _ in one.store.calls if what == "delete"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["exists", "get"])
def test_a_key_that_is_not_answered_ends_the_prefix_and_is_not_absent(
    tmp_path: Path, store: Sharded, kind: str
) -> None:
    with node(tmp_path, store) as one:
        written(one)
        store.down, store.kinds = {A[3]}, {kind}
        for turn in range(10):
            assert one.hits(A) == 3
            one.cache.drop(A[:3])
            assert one.counters["remote_failures"] == turn + 1
        assert not one.tier.breaker.is_open
        nothing_concluded(one, A)
        store.down = set()
        assert one.hits(A) == 6  # at once: no key counts as absent


@pytest.mark.parametrize("kind", ["exists", "get"])
def test_what_is_behind_it_is_there_for_a_window_s_group(tmp_path: Path, store: Sharded, kind: str) -> None:
    with node(tmp_path, store) as one:
        written(one)
        store.down, store.kinds = {A[0], A[3]}, {kind}
        lease = one.acquire(A, prefix=False)
        assert sorted(lease.keys) == sorted([A[1], A[2], A[4], A[5]])
        assert read_verified(one.arena, lease)
        one.cache.release(lease)
        nothing_concluded(one, A)


@pytest.mark.parametrize("kind", ["exists", "get"])
def test_what_is_absent_beside_it_is_absent(tmp_path: Path, store: Sharded, kind: str) -> None:
    with node(tmp_path, store) as one:
        written(one)
        store.down, store.kinds = {A[1]}, {kind}
        del store.values[A[4]], one.tier.presence.written_at[A[4]]
        for _ in range(2):
            assert one.hits(A) == 1
            one.cache.drop(A[:1])
        nothing_concluded(one, A[1:2])
        assert A[4] in one.tier.presence.absent  # its server has said so


def test_the_first_key_is_not_answered(tmp_path: Path, store: Sharded) -> None:
    with node(tmp_path, store) as one:
        written(one)
        store.down = {A[0]}
        assert [one.hits(A) for _ in range(5)] == [0] * 5
        nothing_concluded(one, A)
        assert not one.tier.breaker.is_open
        store.down = set()
        assert one.hits(A) == 6


def test_no_key_is_answered(tmp_path: Path, store: Sharded) -> None:
    class Quiet(Sharded):
        async def _ask(self, what: str, keys: Sequence[bytes]) -> list[bool]:
            return [not self.down] * len(keys)  # and it does not raise, as it should

    for kind in (Sharded, Quiet):
        silent = kind({})
        with node(tmp_path, silent) as one:
            written(one)
            silent.down = {*A, *B}
            for _ in range(FAILURES):
                assert one.hits(A) == 0
            assert one.tier.breaker.is_open
            nothing_concluded(one, A)
            silent.down = set()
            eventually(lambda one=one: one.hits(A) == 6, "recovery")  # type: ignore[misc]


def test_a_server_that_hangs_closes_the_store(tmp_path: Path, store: Sharded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call waits for that server until its timeout: the keys of the other servers are not worth that."""
    monkeypatch.undo()
    with node(tmp_path, store, timeout_s=0.5) as one:
        written(one)
        one.tier.costs.note_ask(0.001)
        store.down, store.takes_s = {A[3]}, 0.5
        for _ in range(FAILURES):
            assert not one.tier.breaker.is_open
            assert one.hits(A) == 0  # the request has not waited so long
            eventually(lambda: not one.tier.reader.num_waiting, "the end of the call")
        assert one.tier.breaker.is_open
        assert one.counters["remote_failures"] == FAILURES
        nothing_concluded(one, A)
        store.down = set()
        eventually(lambda: one.hits(A) == 6, "recovery")


@pytest.mark.parametrize("kind", ["exists", "put"])
def test_writes_that_are_not_answered_are_dropped_and_the_others_are_not(
    tmp_path: Path, store: Sharded, kind: str
) -> None:
    with node(tmp_path, store) as one:
        chain = chain_keys("new", 6)
        store.down, store.kinds = {chain[1], chain[4]}, {kind}
        assert one.compute(chain) == 6
        one.settle()
        expected = {chain[0], chain[2], chain[3], chain[5]}
        assert set(store.values) == set(one.tier.presence.written_at) == expected
        assert one.counters["remote_written_chunks"] == 4
        assert one.counters["remote_dropped_chunks"] == 2
        assert not one.tier.presence.absent
        assert not one.tier.breaker.is_open
