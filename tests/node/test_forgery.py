"""What lies in shared memory is not believed: resealed slots, flipped bits in headers, headers of a former daemon's arena.

Every client of a daemon maps the arena and can write all of it. A mapping of the arena's file stands for such a client.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvkern
from kvkern.api import PagedCache
from kvkern.arena.file import Arena, read_spec
from kvkern.arena.slots import MAX_GENERATION, SlotState
from kvkern.node import protocol as p
from kvkern.node.client.cache_client import NodeClient
from kvkern.policy.persist_modes import Persist
from kvkern.tiers.base import Reservation
from kvkern.tiers.slot_headers import begin_slots
from tests.node.conftest import Daemon, MakeClient, eventually, hits, reseal, store, write_payload
from tests.remote.nodes import A, node
from tests.remote.stores.memory import MemoryStore
from tests.small_cache import CHUNK, ELSEWHERE, PER_CHUNK, TABLE, TOKENS, blocks_of, make_tensors, same
from tests.support import NAMESPACE, SHAPE, chain_keys


def open_cache(daemon: Daemon, seed: int = 0) -> tuple[PagedCache, list[Any]]:
    """Return an engine's cache behind the daemon, and its tensors."""
    tensors = make_tensors(seed)
    cache = kvkern.open_cache(
        kvkern.layout.flash_attention(tensors), tensors, model="m", weights="w", blocks_per_chunk=PER_CHUNK,
        socket=str(daemon.socket), threads=1,
    )  # fmt: skip
    return cache, tensors


def ready_slots(arena: Arena) -> list[int]:
    found: list[int] = np.flatnonzero(arena.headers["state"] == SlotState.READY).tolist()
    return found


# -- forged chunks -----------------------------------------------------------------------------------------------------


def test_a_resealed_chunk_is_a_miss(daemon: Daemon, make_client: MakeClient) -> None:
    """The daemon tells a reader what the header was when the chunk was published. The bytes of a forger reach no engine."""
    cache, tensors = open_cache(daemon)
    with closing(cache):
        assert cache.store(TOKENS, TABLE) == 3
        with cache.match(TOKENS) as hit:
            assert cache.load(hit, ELSEWHERE) == 3 * CHUNK
        assert same(blocks_of(tensors, ELSEWHERE[:6]), blocks_of(tensors, TABLE[:6]))
        other = _same_slots(daemon)
        with closing(other):
            (*_, last) = _slots_by_position(other.arena)
            reseal(other.arena, [last])
        with cache.match(TOKENS) as hit:
            assert hit.num_tokens == 3 * CHUNK
            assert cache.load(hit, ELSEWHERE) == 2 * CHUNK
        eventually(lambda: daemon.stat()["chunks"] == 2, "the daemon drops the chunk")
        assert daemon.stat()["bad_chunks"] == 1
        assert cache.store(TOKENS, TABLE) == 1  # it is stored again, and good
        with cache.match(TOKENS) as hit:
            assert cache.load(hit, ELSEWHERE) == 3 * CHUNK
    assert "1 of 1 with another header than when they were published" in daemon.log
    assert "They were stored by pid" in daemon.log


def _same_slots(daemon: Daemon) -> NodeClient:
    """Connect with the slot sizes that the daemon's arena has."""
    (path,) = daemon.arena_dir.glob("**/kvkern-node-*")
    spec = read_spec(path)
    assert spec is not None
    return daemon.client("forger", spec.geometry)


def _slots_by_position(arena: Arena) -> list[int]:
    return sorted(ready_slots(arena), key=lambda slot: int(arena.headers["position"][slot]))


def test_a_chunk_under_another_ones_name_is_a_miss(daemon: Daemon, make_client: MakeClient) -> None:
    """A whole slot, header and payload, copied over another one: right checksums, and a right name if it is changed too."""
    cache, _ = open_cache(daemon)
    with closing(cache):
        assert cache.store(TOKENS, TABLE) == 3
        with closing(_same_slots(daemon)) as other:
            arena = other.arena
            victim, _, source = _slots_by_position(arena)
            key, generation = arena.headers["key"][victim].copy(), arena.headers["generation"][victim].copy()
            nbytes, at = arena.spec.geometry.slot_nbytes, 4096
            arena.bytes[at + victim * nbytes :][:nbytes] = arena.bytes[at + source * nbytes :][:nbytes]
            arena.headers["key"][victim], arena.headers["generation"][victim] = key, generation
            arena.headers["written"][victim] = generation
            reseal(arena, [victim])
        with cache.match(TOKENS) as hit:
            assert cache.load(hit, ELSEWHERE) == 0


def test_a_restarted_daemon_records_what_it_has_verified(daemon: Daemon, make_client: MakeClient) -> None:
    cache, _ = open_cache(daemon)
    with closing(cache):
        assert cache.store(TOKENS, TABLE) == 3
        daemon.kill()
        daemon.start()
        eventually(lambda: cache.stats().get("connected", 1) and daemon.stat()["sessions"] >= 1)
        with closing(_same_slots(daemon)) as other:
            first, *_ = _slots_by_position(other.arena)

            def loaded() -> int:
                with cache.match(TOKENS) as hit:
                    return cache.load(hit, ELSEWHERE) if hit.num_tokens else 0

            eventually(lambda: loaded() == 3 * CHUNK, "the chunks are served again")
            reseal(other.arena, [first])
            assert loaded() == 0


@pytest.mark.parametrize("mode", [Persist.HOT, Persist.EVICTED])
def test_a_resealed_chunk_is_not_written_to_a_store(
    tmp_path: Path, mode: Persist, caplog: pytest.LogCaptureFixture
) -> None:
    remote = MemoryStore()
    with node(tmp_path, remote, mode=mode) as one:
        one.compute(A[:4])
        forged = one.cache._dram._index[A[1]]
        reseal(one.arena, [forged])
        lease = one.acquire(A[:4])
        one.cache.release(lease)
        if mode is Persist.EVICTED:
            one.compute(chain_keys("more", 16))
        one.settle()
        assert A[0] in remote.values
        assert A[1] not in remote.values
        assert "1 of 1 with another header than when they were published" in caplog.text


# -- flipped bits ------------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(daemon: Daemon) -> Iterator[NodeClient]:
    """A client that maps the arena and holds no slots: a worker."""
    with closing(daemon.client("writer", index=False)) as client:
        yield client


def test_flipped_generations_of_free_slots(daemon: Daemon, make_client: MakeClient, writer: NodeClient) -> None:
    """A generation that no message may carry made the engine connect again and again, and store nothing."""
    headers = writer.arena.headers
    headers["generation"] |= np.uint64(1 << 63)
    client = make_client("e")
    assert store(client, chain_keys("a", 4)) == 4
    assert hits(client, chain_keys("a", 4)) == 4
    written = headers["generation"][ready_slots(writer.arena)]
    assert (written <= MAX_GENERATION).all()
    assert client._connection == 1


def test_flipped_generations_that_a_restart_finds(daemon: Daemon, make_client: MakeClient, writer: NodeClient) -> None:
    assert store(make_client("e"), chain_keys("a", 4)) == 4
    headers, kept = writer.arena.headers, ready_slots(writer.arena)
    daemon.kill()
    headers["generation"][[slot for slot in range(len(headers)) if slot not in kept]] = np.uint64(1 << 63)
    headers["generation"][kept[:2]] |= np.uint64(1 << 62)  # these do not verify any more
    daemon.start()
    client = make_client("f")
    eventually(lambda: daemon.stat()["chunks"] == 2, "two of the chunks are served again")
    assert store(client, chain_keys("b", 8)) == 8
    assert hits(client, chain_keys("b", 8)) == 8


def test_a_clear_forgets_a_chunk_whose_namespace_was_overwritten(
    daemon: Daemon, make_client: MakeClient, writer: NodeClient
) -> None:
    """The engine may have other weights after its reset, so a chunk that stays would be served with the wrong ones."""
    client = make_client("e")
    assert store(client, chain_keys("a", 4)) == 4
    slots = ready_slots(writer.arena)
    writer.arena.headers["namespace"][slots[0]] = np.void(bytes(32))
    assert client.clear(NAMESPACE) == 4
    assert daemon.stat()["chunks"] == 0


def test_operators_see_what_was_published(daemon: Daemon, make_client: MakeClient, writer: NodeClient) -> None:
    assert store(make_client("e"), chain_keys("a", 1)) == 1
    (slot,) = ready_slots(writer.arena)
    before = daemon.ask(p.List(1, b"", 10))
    header = writer.arena.headers[slot : slot + 1]
    for name in ("generation", "payload_nbytes"):
        header[name] = np.uint64((1 << 64) - 1)
    for name in ("group", "chunk_tokens", "position"):
        header[name] = np.uint32((1 << 32) - 1)
    header["namespace"] = np.void(b"\xff" * 32)
    assert daemon.ask(p.List(1, b"", 10)) == before


def test_a_private_chunk_stays_private(tmp_path: Path) -> None:
    """Whether a chunk may be written to a store is decided by what its writer said, not by what a header says later."""
    remote = MemoryStore()
    with node(tmp_path, remote, mode=Persist.EVICTED) as one:
        one.compute(A[:4])
        slot = one.cache._dram._index[A[0]]
        one.cache.records.rows["private"][slot] = 1
        one.arena.headers["private"][slot] = 0
        one.compute(chain_keys("more", 16))
        one.settle()
        assert A[0] not in remote.values
        assert A[1] in remote.values


def test_absurd_tokens_of_a_chunk_are_unknown_tokens(tmp_path: Path) -> None:
    """What a chunk's tokens are decides how long requests wait for the store: a header must not make them wait for ever."""
    with node(tmp_path, MemoryStore()) as one:
        granted = one.cache.grant(2)
        slots, generations = np.array(granted.slots, dtype=np.int64), np.array(granted.generations, dtype=np.uint64)
        begin_slots(one.arena, slots, generations, A[:2], SHAPE, A[:2], (1, 1))
        one.arena.headers["chunk_tokens"][slots[0]] = np.uint32((1 << 32) - 1)
        write_payload(one.arena, named := Reservation(tuple(A[:2]), granted.slots, granted.generations))
        assert one.cache.publish(named, NAMESPACE) == [True, True]
        assert one.cache.records.rows["chunk_tokens"][slots].tolist() == [0, SHAPE.chunk_tokens]
