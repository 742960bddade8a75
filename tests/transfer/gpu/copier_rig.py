"""A GPU copier with its threads over a real arena and a fake device, for tests of the whole copier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvkern.arena.file import Arena
from kvkern.cache.manager import Cache
from kvkern.kernels import layout as L
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.policy.lru import LRU
from kvkern.tiers.base import Reservation
from kvkern.tiers.dram import DramTier
from kvkern.transfer.base import ChunkBatch
from kvkern.transfer.gpu.copier import GpuCopier
from kvkern.transfer.gpu.planner import Choice
from kvkern.transfer.gpu.staging_rings import RingDepths
from tests.support import NAMESPACE, SHAPE, chain_keys, make_arena
from tests.transfer.gpu.fake_device import FakeDevice
from tests.transfer.gpu.orders import Random
from tests.transfer.gpu.vector_clocks import Watch

PER_CHUNK = 3


class TensorsOnGpu(PagedTensors):
    """Host tensors that claim to be on a GPU until a test sets `where` to "cpu", when the fake device is made."""

    where = "cuda:0"

    @property
    def device(self) -> str:
        return TensorsOnGpu.where


@dataclass
class Rig:
    """An arena and its manager, paged tensors, a fake device and the copier under test."""

    arena: Arena
    cache: Cache
    paged: list[PagedTensors]
    device: FakeDevice
    copier: GpuCopier

    def batch(self, ids: npt.ArrayLike, keys: Any, slots: Any, generations: Any = (), group: int = 0) -> ChunkBatch:
        return ChunkBatch(
            group=group,
            block_ids=np.ascontiguousarray(ids, dtype=np.int32).reshape(-1, self.copier.blocks_per_chunk),
            slots=np.array(slots, dtype=np.int64),
            generations=np.array(generations, dtype=np.uint64),
            keys=np.frombuffer(b"".join(keys), dtype="V32"),
            namespace=NAMESPACE,
        )

    def seen_done(self) -> None:
        """Tell the clocks that this thread has seen its jobs done, so that what it submits next comes after them."""
        lanes = [f"kvkern-{lane}_0" for lane in ("store", "load")]
        with self.device.lock:
            for one, other in (*((lane, "engine") for lane in lanes), *(("engine", lane) for lane in lanes)):
                self.device.watch.join(other, self.device.watch.now(one))

    def reserve(self, name: object, ids: npt.NDArray[np.int64]) -> tuple[Reservation, ChunkBatch]:
        keys = chain_keys(name, len(ids))
        reserved = self.cache.reserve(keys, keys, SHAPE)
        return reserved, self.batch(ids, reserved.keys, reserved.slots, reserved.generations)

    def put(self, name: object, ids: npt.NDArray[np.int64]) -> None:
        reserved, batch = self.reserve(name, ids)
        job = self.copier.store([batch]).wait(60)
        self.seen_done()
        assert job.error is None
        assert job.ok.all()
        assert self.cache.commit(reserved) == len(ids)

    def leased(self, name: object, ids: npt.NDArray[np.int64]) -> tuple[Any, ChunkBatch]:
        lease = self.cache.acquire(chain_keys(name, len(ids)))
        return lease, self.batch(ids, lease.keys, lease.slots)

    def read(self, name: object, ids: npt.NDArray[np.int64]) -> tuple[list[bool], int]:
        """Load all chunks. Returns (ok of each chunk, number of chunks dropped as BAD at the release)."""
        lease, batch = self.leased(name, ids)
        job = self.copier.load([batch]).wait(60)
        assert job.error is None
        return job.ok.tolist(), self.cache.release(lease)


@contextmanager
def rig(
    folder: Path,
    groups: list[PagedTensors],
    choose: Callable[..., Choice],
    depths: RingDepths | None = None,
    slots: int = 8,
    per_chunk: int = PER_CHUNK,
    seed: int = 0,
) -> Iterator[Rig]:
    part = max(group.layout.part_nbytes(per_chunk) for group in groups)
    planes = max(len(group.layout.planes) for group in groups)
    arena = make_arena(folder, slots=slots, part_nbytes=part, planes=planes)
    device = FakeDevice(Random(seed), watch=Watch(enabled=True))
    depths = depths or RingDepths(staging_nbytes=2 * part)
    copier = GpuCopier(groups, arena, 0, per_chunk, device, choose, depths)
    made = Rig(arena, Cache(DramTier(arena, LRU())), groups, device, copier)
    yield made
    copier.close()
    assert device.registered == {}
    assert device.faults == []
    assert device.idle()
    assert all(device.streams[f"{lane}.{kind}"].closed for lane in ("store", "load") for kind in ("kernels", "copies"))
    arena.close()


def flash(blocks: int = 32, layers: int = 2, seed: int = 0) -> PagedTensors:
    """Paged tensors in FlashAttention's layout, with random bytes: planes of 256 bytes a block."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, blocks, 4, 2, 16)
    tensors = [
        torch.randint(-128, 128, (*shape[:-1], 32), dtype=torch.int8, generator=generator).view(torch.bfloat16)
        for _ in range(layers)
    ]
    return PagedTensors.bind(L.flash_attention(tensors), tensors)


def picked(paged: PagedTensors, ids: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
    rows = torch.from_numpy(np.ravel(ids).astype(np.int64))
    return [t[:, rows].contiguous().view(torch.uint8).numpy() for t in paged.tensors]
