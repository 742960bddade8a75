"""The HBM tier in a device's memory: the GPU copier's lanes and the copy engine on the fake device, called through the API."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kvkern import assemble
from kvkern.api import PagedCache
from kvkern.arena.file import Arena
from kvkern.assemble import add_hbm_tier
from kvkern.cache.hbm_over_dram import HbmCache
from kvkern.cache.manager import Cache
from kvkern.config import Config
from kvkern.kernels.layout import flash_attention
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.keys import Namespace
from kvkern.policy.lru import LRU
from kvkern.tiers.dram import DramTier
from kvkern.transfer.gpu.copier import GpuCopier
from kvkern.transfer.gpu.device import DeviceError
from kvkern.transfer.gpu.hbm_over_dram_copier import DmaSlotMover, device_copier, device_slots
from kvkern.transfer.gpu.planner import Method
from kvkern.transfer.gpu.staging_rings import RingDepths
from tests.support import guarded, make_arena
from tests.transfer.gpu.copier_rig import TensorsOnGpu, flash
from tests.transfer.gpu.copier_rig import rig as rig_of_lanes
from tests.transfer.gpu.fake_device import FakeDevice, FakeStream
from tests.transfer.gpu.orders import Random
from tests.transfer.gpu.store_load_programs import choosing

NUM_BLOCKS, BLOCK_TOKENS, PER_CHUNK = 48, 4, 2
CHUNK = BLOCK_TOKENS * PER_CHUNK
SHAPE = (2, NUM_BLOCKS, BLOCK_TOKENS, 2, 16)


class Device(FakeDevice):
    """Gives every caller its own stream, even if two callers choose the same name."""

    def stream(self, name: str) -> FakeStream:
        while name in self.streams:
            name += "'"
        return super().stream(name)


@dataclass
class Rig:
    tensors: list[torch.Tensor]
    device: FakeDevice
    arena: Arena
    stacked: HbmCache
    cache: PagedCache

    def blocks(self, table: list[int]) -> list[npt.NDArray[np.uint8]]:
        return [t[:, table].contiguous().view(torch.uint8).numpy().copy() for t in self.tensors]

    def comes_back(self, name: int, chunks: int) -> None:
        """Load a whole sequence into the last blocks, and compare it with the sequence's own blocks."""
        elsewhere = table(NUM_BLOCKS // PER_CHUNK - chunks, chunks)
        for t in self.tensors:
            t[:, elsewhere] = 0
        with self.cache.match(tokens(name, chunks)) as hit:
            assert self.cache.load(hit, elsewhere) == chunks * CHUNK
        pairs = zip(self.blocks(elsewhere), self.blocks(table(name * chunks, chunks)), strict=True)
        assert all(np.array_equal(got, want) for got, want in pairs)


def tokens(name: int, chunks: int) -> list[int]:
    return list(range(1000 * name, 1000 * name + chunks * CHUNK))


def table(first_chunk: int, chunks: int) -> list[int]:
    return list(range(first_chunk * PER_CHUNK, (first_chunk + chunks) * PER_CHUNK))


@pytest.fixture(params=[0, 1, 2])
def rig(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    tensors = [guarded(2 * NUM_BLOCKS * 256, i)[0].view(torch.bfloat16).view(SHAPE) for i in range(2)]
    layout = flash_attention(tensors)
    part = layout.part_nbytes(PER_CHUNK)
    arena = make_arena(tmp_path, slots=32, part_nbytes=part, planes=len(layout.planes))
    device = Device(Random(request.param))
    dram = Cache(DramTier(arena, LRU()))
    paged = PagedTensors.bind(layout, tensors)
    group = TensorsOnGpu(layout, paged.tensors, paged.bases)

    def made(name: str) -> FakeDevice:
        assert name == "cuda:0"
        monkeypatch.setattr(TensorsOnGpu, "where", "cpu")
        return device

    monkeypatch.setattr(assemble, "_cuda_device", made)
    below = GpuCopier(
        [paged], arena, 0, PER_CHUNK, device, choosing(Method.STAGED), RingDepths(staging_nbytes=2 * part)
    )
    config = Config(capacity_nbytes=1 << 20, hbm_nbytes=6 * 4096)
    stacked, copier = add_hbm_tier(config, dram, arena, below, group, PER_CHUNK)
    namespace = Namespace(model="m", weights="w", dtype="bfloat16", layout=layout.fingerprint, chunk_tokens=CHUNK)
    cache = PagedCache(stacked, copier, dram.close, namespace)
    yield Rig(tensors, device, arena, stacked, cache)
    cache.close()
    assert device.faults == []
    assert device.registered == {}  # the arena's; HBM was never registered
    assert all(
        stream.closed for stream in device.streams.values() if "," not in stream.name and stream.name != "compute"
    )
    arena.close()


def test_stored_spilled_promoted_and_loaded(rig: Rig) -> None:
    for name in range(6):
        assert rig.cache.store(tokens(name, 3), table(name * 3, 3)) == 3
        rig.stacked.wait_for_moves()
    assert rig.cache.stats()["hbm_spilled_chunks"] > 0
    for name in (0, 5, 0, 3, 3):
        rig.comes_back(name, 3)
        rig.stacked.wait_for_moves()
    stats = rig.cache.stats()
    assert stats["hbm_promoted_chunks"] > 0
    assert stats["hbm_hit_chunks"] > 0
    assert stats["bad_chunks"] == stats["faults"] == stats["hbm_lost_chunks"] == 0
    assert stats["hbm_slots"] == 6


def test_closed_while_chunks_are_moved(rig: Rig) -> None:
    """Moves end before the arena is unregistered; the fixture checks it."""
    for name in range(6):
        rig.cache.store(tokens(name, 3), table(name * 3, 3))
    rig.cache.close()
    assert rig.device.idle()


def test_hbm_needs_no_registration(rig: Rig) -> None:
    memory = rig.stacked._hbm_slots.parts(0)
    inside = [a for a in rig.device.registered if memory.ctypes.data <= a < memory.ctypes.data + memory.nbytes]
    assert inside == []
    assert rig.device.registered  # the arena


def test_hbm_takes_no_more_than_its_slots(tmp_path: Path) -> None:
    """Besides the slots it takes some memory for ids and checksums only, because nothing is staged."""
    tensors = [guarded(2 * NUM_BLOCKS * 256, i)[0].view(torch.bfloat16).view(SHAPE) for i in range(2)]
    layout = flash_attention(tensors)
    arena = make_arena(tmp_path, slots=1, part_nbytes=layout.part_nbytes(PER_CHUNK), planes=len(layout.planes))
    device = FakeDevice(Random(0))
    slots = device_slots(arena.spec.geometry, 6, device)
    device.memories.clear()
    copier = device_copier(PagedTensors.bind(layout, tensors), slots, PER_CHUNK, device)
    assert sum(memory.nbytes for memory in device.memories) < 2 << 20  # pinned memory included
    copier.close()
    arena.close()


def test_a_piece_is_not_staged_where_there_is_no_room_for_it(tmp_path: Path) -> None:
    """If STAGED is chosen all the same, the job carries an error."""
    paged = flash()
    depths = RingDepths(staging_nbytes=1 << 16, payload=False)
    with rig_of_lanes(tmp_path, [paged], choosing(Method.STAGED), depths) as bench:
        _, batch = bench.reserve("a", np.arange(6).reshape(2, 3))
        job = bench.copier.store([batch]).wait(60)
        assert isinstance(job.error, DeviceError)
        assert not job.ok.any()


def test_a_copy_that_the_driver_refuses_is_counted(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.device.fail_at = ("hbm: copy d2h", 1)
    for name in range(3):
        assert rig.cache.store(tokens(name, 3), table(name * 3, 3)) == 3
        rig.stacked.wait_for_moves()
    assert "launch failed" in caplog.text
    stats = rig.cache.stats()
    assert stats["faults"] == 1
    assert stats["hbm_lost_chunks"] == 1  # one chunk is lost: a miss, never wrong bytes
    rig.comes_back(2, 3)


def test_moves_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No submission is larger than a piece, and a chunk is never cut."""
    monkeypatch.setattr("kvkern.transfer.gpu.hbm_over_dram_copier.MIN_PIECE_NBYTES", 1000)
    arena = make_arena(tmp_path, slots=8, part_nbytes=256)
    device = FakeDevice(Random(0))
    device.registered[arena.bytes.ctypes.data] = len(arena.bytes)
    slots = device_slots(arena.spec.geometry, 8, device)
    rows = DmaSlotMover(slots, arena, device)
    noise = np.random.default_rng(0).integers(0, 256, (8, 256), dtype=np.uint8)
    arena.parts(0)[:, :256] = noise
    sizes: list[int] = []
    real = rows._stream.copy
    monkeypatch.setattr(rows._stream, "copy", lambda runs, way: (sizes.append(int(runs.nbytes.sum())), real(runs, way)))
    to, at = np.array([7, 0, 3, 2, 5, 1, 6]), np.array([1, 2, 3, 4, 5, 6, 0])
    rows.copy_up(to, at)
    assert sizes == [768, 768, 256]
    assert np.array_equal(slots.parts(0)[to, :256], noise[at])
    arena.parts(0)[:] = 0
    rows.copy_down(to, at)
    assert np.array_equal(arena.parts(0)[at, :256], noise[at])
    assert not arena.parts(0)[7].any()
    arena.close()


def test_no_room_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = make_arena(tmp_path)
    device = FakeDevice(Random(0))

    def none(nbytes: int) -> torch.Tensor:
        raise DeviceError(f"no {nbytes} bytes")

    monkeypatch.setattr(device, "allocate", none)
    with pytest.raises(DeviceError):
        device_slots(arena.spec.geometry, 4, device)
    arena.close()
