"""The whole GPU copier, with its threads, over a real arena: bytes, verdicts and errors equal those of the host copier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kvkern.arena.slots import SlotState
from kvkern.errors import ArenaError, LayoutError
from kvkern.kernels import layout as L
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.transfer.base import ChunkBatch
from kvkern.transfer.gpu.copier import GpuCopier
from kvkern.transfer.gpu.device import DeviceError
from kvkern.transfer.gpu.planner import Method
from kvkern.transfer.gpu.staging_rings import RingDepths
from kvkern.transfer.host import HostCopier
from tests.kernels.paged_cases import CASES
from tests.support import NAMESPACE, chain_keys, make_arena, storage_bytes
from tests.transfer.gpu.copier_rig import PER_CHUNK, Rig, flash, picked, rig
from tests.transfer.gpu.fake_device import FakeDevice
from tests.transfer.gpu.orders import Random
from tests.transfer.gpu.store_load_programs import choosing
from tests.transfer.gpu.vector_clocks import Span, Watch

each_method = pytest.mark.parametrize("method", list(Method))


@pytest.mark.parametrize("name", sorted(CASES))
@each_method
def test_bit_for_bit_what_the_cpu_moves(tmp_path: Path, name: str, method: Method) -> None:
    """Store two chunks, overwrite the blocks, load both: arena and tensors equal the CPU's at each step, guards included."""
    for other in ("gpu", "cpu"):
        (tmp_path / other).mkdir()
    ids = np.array([[5, 0, 1], [2, 3, 6]])
    seen: dict[str, list[Any]] = {"gpu": [], "cpu": []}
    for who in seen:
        paged = CASES[name]()
        with rig(tmp_path / who, [paged], choosing(method)) as bench:
            if who == "cpu":
                bench.copier = HostCopier([paged], bench.arena, 0, PER_CHUNK, threads=1)  # type: ignore[assignment]
            bench.put("a", ids)
            seen[who].append(bench.arena.parts(0).copy())
            for field in ("checksum", "plane_nbytes", "written", "generation"):
                seen[who].append(bench.arena.headers[field].copy())
            target = CASES[name]()
            for ours, fresh in zip(paged.tensors, target.tensors, strict=True):
                ours.copy_(fresh.flip(0))
            assert bench.read("a", ids[::-1].copy()) == ([True, True], 0)
            seen[who] += storage_bytes(paged.tensors)
            bench.copier.close()
    for a, b in zip(seen["gpu"], seen["cpu"], strict=True):
        np.testing.assert_array_equal(a, b)


@each_method
@pytest.mark.parametrize("seed", range(3))
def test_jobs_larger_than_the_ring(tmp_path: Path, method: Method, seed: int) -> None:
    """Ten pieces go through two buffers, stores and loads at once, in random order. The clocks see no race either."""
    paged = flash(blocks=64)
    ids = np.random.default_rng(seed).permutation(60).reshape(20, 3)
    with rig(tmp_path, [paged], choosing(method), slots=48, seed=seed) as bench:
        want = picked(paged, ids)
        bench.put("a", ids)
        lease, read = bench.leased("a", ids)
        reserved, write = bench.reserve("b", np.full((20, 3), 63) - np.arange(3))
        jobs = [bench.copier.load([read]), bench.copier.store([write])]
        for job in jobs:
            assert job.wait(60).error is None
            assert job.ok.all()
            assert len(job.futures) == 10
        assert (bench.cache.release(lease), bench.cache.commit(reserved)) == (0, 20)
        for a, b in zip(want, picked(paged, ids), strict=True):
            np.testing.assert_array_equal(a, b)
        assert bench.device.watch.races == set()


@pytest.mark.parametrize("edge", [
    ("stored", "store.kernels"), ("gathered", "store.copies"), ("uploaded", "host"), ("computed", "store.kernels"),
])  # fmt: skip
def test_the_clocks_see_a_missing_edge_among_threads(tmp_path: Path, edge: tuple[str, str]) -> None:
    """The check above is not empty: without an edge it finds a race."""
    ids = np.arange(60).reshape(20, 3)
    arena = make_arena(tmp_path, slots=20, part_nbytes=3 * 1024, planes=4)
    paged, device = flash(blocks=64), FakeDevice(Random(1), [edge], Watch(enabled=True))
    copier = GpuCopier([paged], arena, 0, 3, device, choosing(Method.STAGED), RingDepths(staging_nbytes=3 * 1024))
    writes = [Span(t.data_ptr(), t.nbytes, True) for t in paged.tensors]
    device.compute.push("computes", lambda: None, lambda: writes)
    zeros = np.zeros(20, dtype=np.uint64)
    keys = np.frombuffer(b"".join(chain_keys("a", 20)), dtype="V32")
    copier.store([ChunkBatch(0, ids.astype(np.int32), np.arange(20), zeros, keys, NAMESPACE)]).wait(60)
    copier.close()
    assert device.watch.races
    arena.close()


def test_two_jobs_of_one_direction_at_once(tmp_path: Path) -> None:
    paged = flash()
    first, second = np.arange(12).reshape(4, 3), np.arange(12, 24).reshape(4, 3)
    with rig(tmp_path, [paged], choosing(*Method), slots=16) as bench:
        reserved = [bench.reserve(name, ids) for name, ids in (("a", first), ("b", second))]
        jobs = [bench.copier.store([batch]) for _, batch in reserved]
        assert all(job.wait(60).ok.all() for job in jobs)
        assert [bench.cache.commit(r) for r, _ in reserved] == [4, 4]
        want = picked(paged, np.arange(24))
        for t in paged.tensors:
            t.zero_()
        leases = [bench.leased(name, ids) for name, ids in (("a", first), ("b", second))]
        jobs = [bench.copier.load([batch]) for _, batch in leases]
        assert all(job.wait(60).ok.all() for job in jobs)
        for a, b in zip(want, picked(paged, np.arange(24)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_groups_and_batches_keep_their_order_in_ok(tmp_path: Path) -> None:
    groups = [flash(), flash(layers=1, seed=1)]
    with rig(tmp_path, groups, choosing(*Method)) as bench:
        reserved, batch = bench.reserve("a", np.arange(12).reshape(4, 3))
        halves = [
            replace(
                batch, group=g, block_ids=batch.block_ids[rows], slots=batch.slots[rows],
                generations=batch.generations[rows], keys=batch.keys[rows],
            )
            for g, rows in ((0, slice(0, 2)), (1, slice(2, 4)))
        ]  # fmt: skip
        assert bench.copier.store(halves).wait(60).ok.all()
        assert bench.cache.commit(reserved) == 4
        bench.arena.parts(0)[batch.slots[2], 1] ^= 4
        job = bench.copier.load(halves).wait(60)
        assert job.ok.tolist() == [True, True, False, True]
        assert job.nbytes == sum(2 * group.layout.part_nbytes(3) for group in groups)


@each_method
def test_a_slot_that_does_not_verify_is_bad(tmp_path: Path, method: Method) -> None:
    ids = np.arange(9).reshape(3, 3)
    with rig(tmp_path, [flash()], choosing(method)) as bench:
        bench.put("a", ids)
        lease, _ = bench.leased("a", ids)
        bench.arena.parts(0)[lease.slots[1], 700] ^= 0x80
        bench.cache.release(lease)
        assert bench.read("a", ids) == ([True, False, True], 1)
        assert bench.cache.lookup(chain_keys("a", 3)) == 1


@each_method
@pytest.mark.parametrize("wrong", ["generation", "key", "codec", "written"])
def test_a_foreign_slot_reaches_no_block(tmp_path: Path, method: Method, wrong: str) -> None:
    ids = np.arange(6).reshape(2, 3)
    with rig(tmp_path, [flash()], choosing(method)) as bench:
        bench.put("a", ids)
        lease, batch = bench.leased("a", ids)
        if wrong == "key":
            batch = replace(batch, keys=np.frombuffer(b"".join(chain_keys("b", 2)), dtype="V32"))
        else:
            bench.arena.headers[wrong][list(lease.slots)] += 1
        before = storage_bytes(bench.paged[0].tensors)
        for t in (job := bench.copier.load([batch]).wait(60)).ok:
            assert not t
        assert job.error is None
        for was, now in zip(before, storage_bytes(bench.paged[0].tensors), strict=True):
            np.testing.assert_array_equal(was, now)
        assert (bench.arena.headers["state"][list(lease.slots)] == SlotState.BAD).all()
        assert bench.cache.release(lease) == 2


@each_method
def test_a_lost_reservation_is_left_alone(tmp_path: Path, method: Method) -> None:
    with rig(tmp_path, [flash()], choosing(method)) as bench:
        _, batch = bench.reserve("a", np.arange(9).reshape(3, 3))
        bench.arena.headers["generation"][batch.slots[1]] += 1
        bench.arena.parts(0)[:] = 0x77
        header = bench.arena.headers[batch.slots[1] : batch.slots[1] + 1].copy()
        job = bench.copier.store([batch]).wait(60)
        assert (job.error, job.ok.tolist()) == (None, [True, False, True])
        assert (bench.arena.parts(0)[batch.slots[1]] == 0x77).all()
        for name in ("generation", "written", "checksum"):
            assert (bench.arena.headers[name][batch.slots[1]] == header[name][0]).all()
        assert job.released()


@each_method
def test_partial_loads_verify_all_and_write_what_is_asked(tmp_path: Path, method: Method) -> None:
    """This also holds for chunks with absent blocks while the other chunks go by DMA."""
    paged, ids = flash(), np.arange(6).reshape(2, 3)
    with rig(tmp_path, [paged], choosing(method)) as bench:
        bench.put("a", ids)
        want, before = picked(paged, ids), picked(paged, np.array([13]))
        assert bench.read("a", np.array([[10, 11, 12], [-1, 14, 15]])) == ([True, True], 0)
        got = picked(paged, np.array([10, 11, 12, 14, 15]))
        for a, b in zip(want, got, strict=True):
            np.testing.assert_array_equal(a[:, [0, 1, 2, 4, 5]], b)
        for a, b in zip(before, picked(paged, np.array([13])), strict=True):
            np.testing.assert_array_equal(a, b)
        lease, _ = bench.leased("a", ids)
        bench.arena.parts(0)[lease.slots[1], 0] ^= 1  # in the block that is not asked for
        bench.cache.release(lease)
        assert bench.read("a", np.array([[10, 11, 12], [-1, 14, 15]])) == ([True, False], 1)


@each_method
@pytest.mark.parametrize("at", ["store.kernels: copy h2d", "store.kernels: record uploaded"])
def test_a_failure_costs_its_job_only(tmp_path: Path, method: Method, at: str) -> None:
    ids = np.arange(24).reshape(8, 3)
    with rig(tmp_path, [flash()], choosing(method), slots=12) as bench:
        reserved, batch = bench.reserve("a", ids)
        bench.device.fail_at = (at, 2)
        job = bench.copier.store([batch]).wait(60)
        assert isinstance(job.error, DeviceError)
        assert job.ok.tolist() == [True, True, False, False, True, True, True, True]
        assert job.done()
        assert job.released()
        assert job.seconds > 0
        bench.cache.abort(reserved)
        bench.put("b", ids)
        assert bench.read("b", ids) == ([True] * 8, 0)


def test_a_failed_load_marks_its_slots(tmp_path: Path) -> None:
    ids = np.arange(12).reshape(4, 3)
    with rig(tmp_path, [flash()], choosing(Method.STAGED)) as bench:
        bench.put("a", ids)
        lease, batch = bench.leased("a", ids)
        bench.device.fail_at = ("load.kernels: scatter", 2)
        job = bench.copier.load([batch]).wait(60)
        assert isinstance(job.error, DeviceError)
        assert job.ok.tolist() == [True, True, False, False]
        assert bench.cache.release(lease) == 2


@pytest.mark.parametrize("bad", [32, -2])
def test_a_block_out_of_range_reaches_no_kernel(tmp_path: Path, bad: int) -> None:
    with rig(tmp_path, [flash()], choosing(Method.STAGED)) as bench:
        _, batch = bench.reserve("a", np.array([[0, 1, bad]]))
        job = bench.copier.store([batch]).wait(60)
        assert isinstance(job.error, LayoutError)
        assert str(bad) in str(job.error)
        assert not job.ok.any()


def test_chunks_of_another_size_reach_no_kernel(tmp_path: Path) -> None:
    with rig(tmp_path, [flash()], choosing(Method.STAGED)) as bench:
        _, batch = bench.reserve("a", np.array([[0, 1, 2]]))
        job = bench.copier.store([replace(batch, block_ids=np.zeros((1, 4), dtype=np.int32))]).wait(60)
        assert isinstance(job.error, LayoutError)
        assert "expected int32 [chunks, 3]" in str(job.error)


@pytest.mark.parametrize("bad", [8, -1])
def test_a_slot_out_of_range_touches_no_other(tmp_path: Path, bad: int) -> None:
    with rig(tmp_path, [flash()], choosing(Method.STAGED)) as bench:
        bench.put("a", np.arange(24).reshape(8, 3))
        before = bench.arena.bytes.copy()
        batch = bench.batch([[0, 1, 2]], chain_keys("a", 1), [bad], [0])
        for submit in (bench.copier.load, bench.copier.store):
            job = submit([batch]).wait(60)
            assert isinstance(job.error, LayoutError)
            assert not job.ok.any()
        np.testing.assert_array_equal(bench.arena.bytes, before)


def test_close_ends_what_is_under_way(tmp_path: Path) -> None:
    ids = np.arange(24).reshape(8, 3)
    with rig(tmp_path, [flash()], choosing(Method.STAGED)) as bench:
        _, batch = bench.reserve("a", ids)
        job = bench.copier.store([batch])
        bench.copier.close()
        assert job.done()
        assert job.ok.all()


def test_a_job_of_nothing(tmp_path: Path) -> None:
    with rig(tmp_path, [flash()], choosing(Method.STAGED)) as bench:
        for submit in (bench.copier.store, bench.copier.load):
            for batches in ([], [bench.batch(np.zeros((0, 3)), (), ())]):
                job = submit(batches).wait(60)
                assert (job.done(), job.released(), job.nbytes, len(job.ok), job.error, job.seconds) == (
                    True, True, 0, 0, None, 0,
                )  # fmt: skip
        job = bench.copier.reject(np.array([1, 2]))
        assert (job.done(), job.ok.tolist()) == (True, [False, False])
        bench.copier.self_test()
        assert bench.copier.num_blocks == 32


def test_kernels_do_not_use_slots_at_differing_device_addresses(tmp_path: Path) -> None:
    with rig(tmp_path, [flash()], choosing(Method.ZERO_COPY)) as bench:
        bench.copier._device_rows = None  # as if the device saw the arena's regions at different shifts
        plan = bench.copier._plan(*_asked(bench))
        assert [choice.method for choice, _ in plan] == [Method.STAGED]


def test_dma_needs_whole_chunks_without_padding(tmp_path: Path) -> None:
    with rig(tmp_path, [flash()], choosing(Method.BATCH_DMA)) as bench:
        direction, batch = _asked(bench)
        holes = replace(batch, block_ids=np.where(batch.block_ids == 4, -1, batch.block_ids).astype(np.int32))
        plan = bench.copier._plan(direction, holes)
        assert [(c.method, rows.tolist()) for c, rows in plan] == [(Method.BATCH_DMA, [0]), (Method.STAGED, [1])]
    (tmp_path / "odd").mkdir()
    with rig(tmp_path / "odd", [CASES["pages, odd rows"]()], choosing(Method.BATCH_DMA)) as bench:
        assert [choice.method for choice, _ in bench.copier._plan(*_asked(bench))] == [Method.STAGED]


def _asked(bench: Rig) -> Any:
    from kvkern.transfer.gpu.link_table import Direction

    return Direction.D2H, bench.batch(np.arange(6).reshape(2, 3), chain_keys("a", 2), (0, 1))


def test_a_chunk_too_large_for_a_launch_is_refused(tmp_path: Path) -> None:
    pages = [torch.empty((1, 65 << 20), dtype=torch.uint8)]
    paged = PagedTensors.bind(L.from_pages(pages, 16), pages)
    arena = make_arena(tmp_path, slots=1, part_nbytes=65 << 20)
    with pytest.raises(LayoutError, match="Use fewer blocks per chunk"):
        GpuCopier([paged], arena, 0, 1, FakeDevice(Random(0)), choosing(Method.STAGED))
    arena.close()


def start_fails(folder: Path, device: FakeDevice, error: type[Exception], match: str) -> None:
    """Expect an error from a copier on this device, and nothing left registered."""
    arena = make_arena(folder, part_nbytes=3 * 1024, planes=4)
    with pytest.raises(error, match=match):
        GpuCopier([flash()], arena, 0, PER_CHUNK, device, choosing(Method.STAGED), RingDepths(staging_nbytes=1 << 16))
    assert device.registered == {}
    arena.close()


def test_a_device_without_streams_leaves_nothing_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(Random(0))

    def none(name: str) -> None:
        raise DeviceError("no stream")

    monkeypatch.setattr(device, "stream", none)
    start_fails(tmp_path, device, DeviceError, "no stream")


def test_a_thread_that_cannot_use_the_device_is_an_error_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the first job would fail: no thread would ever run its pieces."""
    device = FakeDevice(Random(0))

    def broken() -> None:
        raise DeviceError("no context")

    monkeypatch.setattr(device, "attach", broken)
    start_fails(tmp_path, device, DeviceError, "no context")


def test_a_driver_that_refuses_memory_is_an_error_at_start(tmp_path: Path) -> None:
    device = FakeDevice(Random(0))
    device.refuse_after = 0
    start_fails(tmp_path, device, ArenaError, "memlock")


@pytest.mark.parametrize("seed", range(4))
def test_random_jobs_with_faults_over_many_rounds(tmp_path: Path, seed: int) -> None:
    """Jobs of any size and method, several at once, some failing, some slots corrupted: every chunk that is ok is right."""
    rng = np.random.default_rng(seed)
    paged = flash(blocks=128, seed=seed)
    choose = choosing(*(Method(m) for m in rng.permutation(list(Method))), Method.STAGED)
    with rig(tmp_path, [paged], choose, slots=24, seed=seed) as bench:
        stored: dict[int, list[npt.NDArray[np.uint8]]] = {}
        failed = 0
        for name in range(25):
            ids = rng.permutation(120)[: 3 * int(rng.integers(1, 7))].reshape(-1, 3)
            reserved, batch = bench.reserve(name, ids)
            batch = replace(batch, block_ids=batch.block_ids[: len(batch.slots)])
            want = picked(paged, batch.block_ids)
            if rng.random() < 0.2:
                bench.device.fail_at = (str(rng.choice(["store.copies: copy d2h", "load.kernels: copy d2h"])), 1)
            jobs = [bench.copier.store([batch])]
            leases = []
            for other in rng.permutation(list(stored))[:2] if stored else []:
                lease = bench.cache.acquire(chain_keys(int(other), len(stored[other][0][0]) // 3))
                to = 120 + np.zeros((len(lease.keys), 3), dtype=np.int64)
                to[:, 0] += np.arange(len(lease.keys))  # only a block of each chunk
                to[:, 1:] = -1
                if len(lease.keys) and rng.random() < 0.2:
                    bench.arena.parts(0)[lease.slots[-1], 9] ^= 1
                    jobs.append(bench.copier.load([bench.batch(to, lease.keys, lease.slots)]).wait(60))
                    assert not jobs[-1].ok[-1]
                else:
                    jobs.append(bench.copier.load([bench.batch(to, lease.keys, lease.slots)]).wait(60))
                    first = [plane[:, ::3][:, : len(lease.keys)] for plane in stored[other]]
                    if jobs[-1].error is None and jobs[-1].ok.all() and len(lease.keys):
                        for a, b in zip(first, picked(paged, to[:, 0]), strict=True):
                            np.testing.assert_array_equal(a, b)
                leases.append(lease)
            for job in jobs:
                job.wait(60)
                assert job.error is None or isinstance(job.error, DeviceError)
                failed += job.error is not None
            for lease in leases:
                bench.cache.release(lease)
            if bench.cache.commit(reserved) == len(ids) and jobs[0].ok.all():
                stored[name] = want
        assert stored
        assert failed
