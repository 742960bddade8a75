"""The host copier between tensors and slots: what it verifies, what it refuses, and that a refusal changes no byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kvkern.arena.file import Arena
from kvkern.arena.slots import SlotState
from kvkern.cache.manager import Cache
from kvkern.errors import LayoutError
from kvkern.kernels import layout as L
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.policy.lru import LRU
from kvkern.tiers.base import Reservation
from kvkern.tiers.dram import DramTier
from kvkern.transfer import host as host_module
from kvkern.transfer.base import ChunkBatch
from kvkern.transfer.host import HostCopier, chunks_per_piece
from tests.support import NAMESPACE, SHAPE, chain_keys, guarded, make_arena, storage_bytes

NUM_BLOCKS, PER_CHUNK = 24, 2
BLOCK = (4, 2, 32)  # tokens, heads, elements of two bytes: 512 bytes a block and plane
PART = 4 * PER_CHUNK * 512


def paged(seed: int, layers: int = 2) -> PagedTensors:
    shape = (2, NUM_BLOCKS, *BLOCK)
    tensors = [guarded(2 * NUM_BLOCKS * 512, seed * 10 + i)[0].view(torch.bfloat16).view(shape) for i in range(layers)]
    return PagedTensors.bind(L.flash_attention(tensors), tensors)


@dataclass
class Bench:
    """An arena, its manager, and one copier per rank."""

    arena: Arena
    cache: Cache
    ranks: list[HostCopier]
    tensors: list[PagedTensors]

    def batch(
        self, ids: npt.ArrayLike, keys: tuple[bytes, ...], slots: tuple[int, ...], generations: tuple[int, ...] = ()
    ) -> ChunkBatch:
        return ChunkBatch(
            group=0,
            block_ids=np.ascontiguousarray(ids, dtype=np.int32).reshape(-1, PER_CHUNK),
            slots=np.array(slots, dtype=np.int64),
            generations=np.array(generations, dtype=np.uint64),
            keys=np.frombuffer(b"".join(keys), dtype="V32"),
            namespace=NAMESPACE,
        )

    def reserve(self, name: object, chunks: int) -> Reservation:
        keys = chain_keys(name, chunks)
        return self.cache.reserve(keys, keys, SHAPE)

    def store(self, reservation: Reservation, ids: npt.ArrayLike, ranks: tuple[int, ...] | None = None) -> list[bool]:
        batch = self.batch(ids, reservation.keys, reservation.slots, reservation.generations)
        jobs = [self.ranks[r].store([batch]).wait() for r in (ranks if ranks is not None else range(len(self.ranks)))]
        for job in jobs:
            assert job.error is None
        return [bool(all(column)) for column in zip(*(job.ok for job in jobs), strict=True)]

    def put(self, name: object, ids: npt.ArrayLike) -> None:
        reservation = self.reserve(name, len(np.reshape(ids, (-1, PER_CHUNK))))
        assert all(self.store(reservation, ids))
        assert self.cache.commit(reservation) == len(reservation.slots)

    def load(self, name: object, ids: npt.ArrayLike, rank: int = 0) -> tuple[list[bool], int]:
        """Load all chunks. Returns (ok of each chunk, number of chunks dropped as BAD at the release)."""
        lease = self.cache.acquire(chain_keys(name, len(np.reshape(ids, (-1, PER_CHUNK)))))
        job = self.ranks[rank].load([self.batch(ids, lease.keys, lease.slots)]).wait()
        assert job.error is None
        return job.ok.tolist(), self.cache.release(lease)

    def blocks(self, ids: npt.ArrayLike, rank: int = 0) -> list[npt.NDArray[np.uint8]]:
        picked = torch.from_numpy(np.ravel(ids).astype(np.int64))
        return [t[:, picked].contiguous().view(torch.uint8).numpy() for t in self.tensors[rank].tensors]


def make(folder: Path, world_size: int = 1, slots: int = 6) -> Bench:
    arena = make_arena(folder, slots=slots, part_nbytes=PART, planes=4, world_size=world_size)
    tensors = [paged(rank) for rank in range(world_size)]
    ranks = [HostCopier([tensors[r]], arena, r, PER_CHUNK, threads=2) for r in range(world_size)]
    return Bench(arena, Cache(DramTier(arena, LRU())), ranks, tensors)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = make(tmp_path)
    yield bench
    for rank in bench.ranks:
        rank.close()
    bench.arena.close()


IDS = np.array([[3, 1], [0, 7], [22, 23]])
ELSEWHERE = np.array([[10, 11], [5, 13], [8, 2]])


def test_stored_chunks_are_loaded_into_other_blocks(bench: Bench) -> None:
    bench.put("a", IDS)
    want = bench.blocks(IDS)
    untouched = np.setdiff1d(np.arange(NUM_BLOCKS), ELSEWHERE)
    before = bench.blocks(untouched)
    assert bench.load("a", ELSEWHERE) == ([True] * 3, 0)
    for was, now in zip([*want, *before], [*bench.blocks(ELSEWHERE), *bench.blocks(untouched)], strict=True):
        np.testing.assert_array_equal(was, now)
    for t in bench.tensors[0].tensors:
        storage = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
        assert set(storage[:128].tolist()) == set(storage[-128:].tolist()) == {0xA5}


def test_a_job_of_nothing(bench: Bench) -> None:
    for submit in (bench.ranks[0].store, bench.ranks[0].load):
        for batches in ([], [bench.batch(np.zeros((0, PER_CHUNK)), (), ())]):
            job = submit(batches).wait()
            assert job.done()
            assert (job.nbytes, len(job.ok), job.error, job.seconds) == (0, 0, None, 0)


def test_a_job_says_what_it_moved(bench: Bench) -> None:
    reservation = bench.reserve("a", 3)
    job = bench.ranks[0].store([bench.batch(IDS, reservation.keys, reservation.slots, reservation.generations)]).wait()
    assert job.nbytes == 3 * PART
    assert job.seconds > 0
    bench.cache.commit(reservation)


def test_many_pieces_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ok` of a job is in the order of its batches, in whatever way the job was cut."""
    monkeypatch.setattr("kvkern.transfer.host._MIN_PIECE_NBYTES", 1)
    bench = make(tmp_path, slots=8)
    bench.put("a", IDS)
    bench.put("b", ELSEWHERE)
    a, b = (bench.cache.acquire(chain_keys(name, 3)) for name in "ab")
    bench.arena.parts(0)[b.slots[1], 5] ^= 1
    job = bench.ranks[0].load([bench.batch(IDS, a.keys, a.slots), bench.batch(ELSEWHERE, b.keys, b.slots)]).wait()
    assert len(job.futures) == 6
    assert job.ok.tolist() == [True, True, True, True, False, True]
    assert (bench.cache.release(a), bench.cache.release(b)) == (0, 1)
    bench.ranks[0].close()
    bench.arena.close()


MIB = 1 << 20


@pytest.mark.parametrize(("job", "chunk", "threads", "chunks"), [
    (400 * MIB, 2 * MIB, 2, 16),  # at most 32 MiB
    (48 * MIB, 2 * MIB, 2, 6),  # two pieces per thread
    (48 * MIB, 2 * MIB, 4, 3),
    (8 * MIB, 2 * MIB, 2, 2),  # at least 4 MiB
    (2 * MIB, 2 * MIB, 2, 2),
    (400 * MIB, 40 * MIB, 2, 1),  # a chunk is never cut
    (0, 0, 1, 4 * MIB),
])  # fmt: skip
def test_pieces_grow_with_the_job(job: int, chunk: int, threads: int, chunks: int) -> None:
    assert chunks_per_piece(job, chunk, threads) == chunks


def test_a_lost_slot_costs_its_neighbours_nothing(bench: Bench) -> None:
    """One of three reservations has ended meanwhile: the other two chunks are stored, and its slot is not written."""
    reservation = bench.reserve("a", 3)
    generations = (reservation.generations[0], reservation.generations[1] + 1, reservation.generations[2])
    before = bench.arena.parts(0)[reservation.slots[1]].copy()
    job = bench.ranks[0].store([bench.batch(IDS, reservation.keys, reservation.slots, generations)]).wait()
    assert job.error is None
    assert job.ok.tolist() == [True, False, True]
    np.testing.assert_array_equal(bench.arena.parts(0)[reservation.slots[1]], before)


@pytest.mark.parametrize("at", [0, 1, 511, 512, 1023, 1024, PART // 2, PART - 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_of_the_payload(bench: Bench, at: int, bit: int) -> None:
    """The chunk is not ok and is dropped. Its neighbours stay good."""
    bench.put("a", IDS)
    slot = bench.cache.acquire(chain_keys("a", 3))
    bench.cache.release(slot)
    bench.arena.parts(0)[slot.slots[1], at] ^= 1 << bit
    assert bench.load("a", ELSEWHERE) == ([True, False, True], 1)
    assert bench.cache.lookup(chain_keys("a", 3)) == 1
    assert bench.cache.counters.bad_chunks == 1
    refill = bench.reserve("a", 3)
    assert bench.store(refill, IDS[1:2]) == [True]  # the hole alone
    assert bench.cache.commit(refill) == 1
    assert bench.load("a", ELSEWHERE) == ([True] * 3, 0)
    assert bench.cache.usage()["free_slots"] == 3


def test_every_byte_of_a_payload_is_covered(bench: Bench) -> None:
    bench.put("a", IDS[:1])
    lease = bench.cache.acquire(chain_keys("a", 1))
    part = bench.arena.parts(0)[lease.slots[0]]
    missed = []
    for at in range(0, PART, 7):
        part[at] ^= 0x80
        if bench.ranks[0].load([bench.batch(ELSEWHERE[:1], lease.keys, lease.slots)]).wait().ok[0]:
            missed.append(at)
        part[at] ^= 0x80
    assert missed == []
    assert bench.cache.release(lease) == 1


IDENTITY = ["magic", "version", "key", "namespace", "part_nbytes", "planes", "generation", "written"]
SIZES = ["header_nbytes", "payload_nbytes", "world_size", "codec"]
# `group` and `chunk_tokens` only inform people who read a slot: the key and the namespace contain them already


@pytest.mark.parametrize("field", [*IDENTITY, *SIZES, "checksum"])
def test_any_flipped_byte_of_the_header(bench: Bench, field: str) -> None:
    """This covers every byte that describes the payload. A slot with another identity reaches no block at all."""
    bench.put("a", IDS)
    lease = bench.cache.acquire(chain_keys("a", 3))
    header = bench.arena.headers[lease.slots[1] : lease.slots[1] + 1]
    dtype, offset = header.dtype.fields[field]  # type: ignore[index]
    raw = bench.arena.bytes[header.ctypes.data - bench.arena.bytes.ctypes.data :]
    before = storage_bytes(bench.tensors[0].tensors)
    for at in range(offset, offset + dtype.itemsize):
        raw[at] ^= 0x10
        read = bench.batch(ELSEWHERE, lease.keys, lease.slots)
        assert bench.ranks[0].load([read]).wait().ok.tolist() == [True, False, True], at - offset
        raw[at] ^= 0x10
        if field in IDENTITY:
            after = bench.blocks(ELSEWHERE[1])
            whole = PagedTensors.bind(bench.tensors[0].layout, bench.tensors[0].tensors).tensors
            start = [torch.from_numpy(b).view(torch.uint8) for b in before]
            for t, was, now in zip(whole, start, after, strict=True):
                old = torch.empty(0, dtype=t.dtype).set_(was.untyped_storage(), t.storage_offset(), t.shape, t.stride())
                picked = old[:, torch.from_numpy(ELSEWHERE[1])].contiguous().view(torch.uint8).numpy()
                np.testing.assert_array_equal(picked, now)
    assert bench.cache.release(lease) == 1


@pytest.mark.parametrize("wrong", ["key", "namespace", "generation"])
def test_a_foreign_slot_reaches_no_block(bench: Bench, wrong: str) -> None:
    """A stale lease, another tenant or a torn header must not get one byte of the slot."""
    bench.put("a", IDS)
    lease = bench.cache.acquire(chain_keys("a", 3))
    batch = bench.batch(ELSEWHERE, lease.keys, lease.slots)
    if wrong == "key":
        batch = bench.batch(ELSEWHERE, tuple(chain_keys("b", 3)), lease.slots)
    elif wrong == "namespace":
        batch = ChunkBatch(0, batch.block_ids, batch.slots, batch.generations, batch.keys, bytes(32))
    else:
        bench.arena.headers["generation"][list(lease.slots)] += 1
    before = storage_bytes(bench.tensors[0].tensors)
    job = bench.ranks[0].load([batch]).wait()
    assert not job.ok.any()
    for was, now in zip(before, storage_bytes(bench.tensors[0].tensors), strict=True):
        np.testing.assert_array_equal(was, now)
    assert (bench.arena.headers["state"][list(lease.slots)] == SlotState.BAD).all()
    assert bench.cache.release(lease) == 3
    assert bench.cache.usage()["free_slots"] == 6


def test_partial_loads_verify_the_whole_plane(bench: Bench) -> None:
    """Only block 1 of the chunk is wanted, but a fault in block 0's bytes is found too."""
    bench.put("a", IDS[:1])
    before, want = bench.blocks([10]), bench.blocks(IDS[0, 1:])
    partial = np.array([[-1, 11]])
    assert bench.load("a", partial) == ([True], 0)
    for was, now in zip([*before, *want], [*bench.blocks([10]), *bench.blocks([11])], strict=True):
        np.testing.assert_array_equal(was, now)
    lease = bench.cache.acquire(chain_keys("a", 1))
    bench.arena.parts(0)[lease.slots[0], 0] ^= 1
    bench.cache.release(lease)
    assert bench.load("a", partial) == ([False], 1)


def test_a_late_writer_writes_nothing(bench: Bench) -> None:
    """A store that starts after its reservation ended does not write the new owner's payload or header."""
    late = bench.reserve("late", 3)
    bench.cache.abort(late)
    new = bench.reserve("new", 6)
    assert set(late.slots) <= set(new.slots)
    bench.arena.parts(0)[:] = 0x77
    header = bench.arena.headers.copy()
    assert bench.store(late, IDS) == [False] * 3
    assert (bench.arena.parts(0) == 0x77).all()
    for name in ("generation", "written", "checksum", "key", "state"):
        np.testing.assert_array_equal(bench.arena.headers[name], header[name], err_msg=name)
    assert bench.cache.commit(new) == 0


@pytest.mark.parametrize("bad", [NUM_BLOCKS, -2])
def test_a_block_out_of_range_is_the_callers_error(bench: Bench, bad: int) -> None:
    """The job reports it; nothing is published, and all slots become free."""
    reservation = bench.reserve("a", 1)
    job = bench.ranks[0].store([bench.batch([[0, bad]], reservation.keys, reservation.slots, reservation.generations)])
    assert isinstance(job.wait().error, LayoutError)
    assert not job.ok.any()
    assert bench.cache.commit(reservation) == 0
    assert bench.cache.usage()["free_slots"] == 6


def test_two_ranks_fill_one_slot(tmp_path: Path) -> None:
    bench = make(tmp_path, world_size=2)
    bench.put("a", IDS)
    for rank in range(2):
        want = bench.blocks(IDS, rank)
        assert bench.load("a", ELSEWHERE, rank) == ([True] * 3, 0)
        for was, now in zip(want, bench.blocks(ELSEWHERE, rank), strict=True):
            np.testing.assert_array_equal(was, now)
    assert not np.array_equal(bench.blocks(IDS, 0)[0], bench.blocks(IDS, 1)[0])
    lease = bench.cache.acquire(chain_keys("a", 3))
    bench.arena.parts(1)[lease.slots[0], 9] ^= 1
    bench.cache.release(lease)
    assert bench.load("a", ELSEWHERE, 0) == ([True] * 3, 0)  # rank 0's part is good
    assert bench.load("a", ELSEWHERE, 1) == ([False, True, True], 1)
    assert bench.cache.lookup(chain_keys("a", 3)) == 0  # and the chunk is gone for both
    for rank in bench.ranks:
        rank.close()
    bench.arena.close()


@pytest.mark.parametrize("ranks", [(), (0,), (1,)])
def test_a_commit_before_all_ranks_wrote_publishes_nothing(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    bench = make(tmp_path, world_size=2)
    reservation = bench.reserve("a", 3)
    if ranks:
        assert all(bench.store(reservation, IDS, ranks))
    assert bench.cache.commit(reservation) == 0
    assert bench.cache.usage()["free_slots"] == 6
    bench.put("a", IDS)
    for rank in bench.ranks:
        rank.close()
    bench.arena.close()


def test_rejected_slots_are_not_offered_again(bench: Bench) -> None:
    bench.put("a", IDS)
    lease = bench.cache.acquire(chain_keys("a", 3))
    job = bench.ranks[0].reject(np.array(lease.slots[1:], dtype=np.int64))
    assert job.done()
    assert job.ok.tolist() == [False, False]
    assert bench.cache.release(lease) == 2
    assert bench.cache.lookup(chain_keys("a", 3)) == 1


@pytest.mark.parametrize(("part", "planes"), [(PART - 64, 4), (PART, 3)])
def test_an_arena_too_small_for_a_chunk_is_refused(tmp_path: Path, part: int, planes: int) -> None:
    arena = make_arena(tmp_path, part_nbytes=part, planes=planes)
    with pytest.raises(LayoutError, match=f"a chunk of 2 blocks needs {PART} bytes in 4 planes a rank"):
        HostCopier([paged(0)], arena, 0, PER_CHUNK, threads=1)
    arena.close()


def test_a_layout_bound_to_other_tensors_is_an_error_at_start(tmp_path: Path) -> None:
    good, other = paged(0), paged(1)
    swapped = PagedTensors(good.layout, good.tensors, other.bases)
    arena = make_arena(tmp_path, part_nbytes=PART, planes=4)
    copier = HostCopier([good, swapped], arena, 0, PER_CHUNK, threads=1)
    with pytest.raises(LayoutError, match="bound to the addresses of other tensors"):
        copier.self_test()
    copier.close()
    arena.close()


def test_a_caller_that_helps_does_every_piece(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's threads never run a piece: the caller copies everything itself, and each piece runs once."""
    copier, submitted = bench.ranks[0], []
    monkeypatch.setattr(host_module, "_MIN_PIECE_NBYTES", 1)
    monkeypatch.setattr(host_module, "_MAX_PIECE_NBYTES", 1)
    monkeypatch.setattr(copier._pool, "submit", submitted.append)
    reserved = bench.reserve("a", 3)
    job = copier.store([bench.batch(range(1, 7), reserved.keys, reserved.slots, reserved.generations)])
    assert (len(job.futures), len(submitted), job.done()) == (3, 3, False)
    job.run_unclaimed()
    assert job.done()
    assert job.ok.all()
    assert job.seconds > 0
    assert job.run_piece() is False


def test_an_error_in_a_helped_piece_reaches_helper_and_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    copier = bench.ranks[0]
    monkeypatch.setattr(copier._pool, "submit", lambda piece: None)
    monkeypatch.setattr(host_module, "gather_chunks", lambda *args: 1 / 0)
    reserved = bench.reserve("a", 1)
    job = copier.store([bench.batch(range(1, 3), reserved.keys, reserved.slots, reserved.generations)])
    with pytest.raises(ZeroDivisionError):
        job.run_unclaimed()
    assert job.done()
    assert isinstance(job.error, ZeroDivisionError)
    assert not job.ok.any()


def test_a_job_after_close_carries_the_error(bench: Bench) -> None:
    reservation = bench.reserve("a", 2)
    bench.ranks[0].close()
    batch = bench.batch([0, 1, 2, 3], reservation.keys, reservation.slots, reservation.generations)
    for submit in (bench.ranks[0].store, bench.ranks[0].load):
        job = submit([batch])  # the engine's thread gets no exception
        assert job.done()
        assert isinstance(job.error, RuntimeError)
        assert not job.ok.any()
