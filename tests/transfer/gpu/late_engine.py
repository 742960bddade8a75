"""An engine on a real GPU that uses every moment it is allowed: it writes late, reads late, and reuses blocks at once.

On a GPU "late" means `torch.cuda._sleep` before the work, on the engine's own stream, and every buffer of the copier starts as
poison. Without a GPU the same calls run in order over host memory (kvkern/transfer/gpu/dry_run_device.py). That checks the
logic of the tests themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvkern.cache.manager import Cache
from kvkern.kernels.layout import flash_attention
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.policy.lru import LRU
from kvkern.tiers.base import Reservation
from kvkern.tiers.dram import DramTier
from kvkern.transfer.base import ChunkBatch
from kvkern.transfer.gpu.copier import GpuCopier
from kvkern.transfer.gpu.device import Device
from kvkern.transfer.gpu.dry_run_device import DryRunDevice
from kvkern.transfer.gpu.planner import Choice, Method
from kvkern.transfer.gpu.staging_rings import RingDepths
from tests.support import NAMESPACE, SHAPE, chain_keys, make_arena

POISON, JUNK = 0xEE, 0x55
LATE_CYCLES = 100_000_000  # some 50 ms: far longer than any job here
PER_CHUNK, LAYERS, BLOCK = 4, 2, (16, 2, 32)  # blocks; tokens, heads, elements of two bytes: runs of 2 KiB
CHUNKS = 6
PART = PER_CHUNK * LAYERS * 2 * 2048
TIGHT = RingDepths(staging_nbytes=2 * PART, staging=1, tables=1, window=2)  # every buffer is reused at once


def make_device(kind: str, careless: bool = False) -> Device:
    """Make a device: "cuda" has poisoned buffers, "cpu" runs in order. With `careless` jobs do not wait for the engine."""
    if kind == "cpu":
        return DryRunDevice()
    from kvkern.transfer.gpu.cuda_device import CudaDevice

    class Poisoned(CudaDevice):
        def allocate(self, nbytes: int) -> torch.Tensor:
            made = super().allocate(nbytes).fill_(POISON)
            torch.cuda.synchronize()
            return made

        def allocate_pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
            made = super().allocate_pinned(nbytes)
            made[:] = POISON
            return made

        def record_computed(self) -> Any:
            if not careless:
                return super().record_computed()
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.Stream())  # an idle stream
            return event

    return Poisoned(torch.device("cuda"))


class Engine:
    """Paged tensors, an arena, a copier that moves by one method, and a stream that the engine computes on."""

    def __init__(
        self, folder: Path, kind: str, method: Method, depths: RingDepths = TIGHT, careless: bool = False
    ) -> None:
        self.kind = kind
        self.arena = make_arena(folder, slots=CHUNKS, part_nbytes=PART, planes=2 * LAYERS)
        self.cache = Cache(DramTier(self.arena, LRU()))
        self.blocks = 2 * CHUNKS * PER_CHUNK + 1
        self.tensors = [torch.zeros(2, self.blocks, *BLOCK, dtype=torch.bfloat16, device=kind) for _ in range(LAYERS)]
        paged = PagedTensors.bind(flash_attention(self.tensors), self.tensors)
        device = make_device(kind, careless)
        choice = Choice(method, 4, 2 * PART)
        self.copier = GpuCopier([paged], self.arena, 0, PER_CHUNK, device, lambda *job: choice, depths)
        self._stream = torch.cuda.Stream() if kind == "cuda" else None
        if self._stream is not None:
            torch.cuda.synchronize()
            torch.cuda.set_stream(self._stream)
        ids = np.random.default_rng(0).permutation(self.blocks).astype(np.int32)
        self.here, self.there = ids[: 2 * CHUNKS * PER_CHUNK].reshape(2, CHUNKS, PER_CHUNK)

    def close(self) -> None:
        self.copier.close()
        if self._stream is not None:
            torch.cuda.synchronize()
            torch.cuda.set_stream(torch.cuda.default_stream())
        self.arena.close()

    def late(self, work: Callable[[], object]) -> None:
        """Enqueue `work` after a long wait, and return at once."""
        if self._stream is not None:
            torch.cuda._sleep(LATE_CYCLES)
        work()

    def noise(self, seed: int) -> list[torch.Tensor]:
        """Return random bytes for the blocks of `CHUNKS` chunks, one tensor per layer, on the device."""
        shape = (2, CHUNKS * PER_CHUNK, *BLOCK)
        generator = torch.Generator().manual_seed(seed)
        made = [
            torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator) for _ in range(LAYERS)
        ]
        return [values.to(self.kind).view(torch.bfloat16) for values in made]

    def index(self, ids: npt.NDArray[np.int32]) -> torch.Tensor:
        """Upload block ids now, so that later work with them does not wait for the host."""
        index = torch.from_numpy(ids.reshape(-1).astype(np.int64)).to(self.kind)
        self.settle()
        return index

    def settle(self) -> None:
        """Wait for the engine's stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def write(self, index: torch.Tensor, values: list[torch.Tensor]) -> None:
        for tensor, layer in zip(self.tensors, values, strict=True):
            tensor.view(torch.int16).index_copy_(1, index, layer.view(torch.int16))

    def read(self, index: torch.Tensor, out: list[torch.Tensor]) -> None:
        for tensor, layer in zip(self.tensors, out, strict=True):
            torch.index_select(tensor.view(torch.int16), 1, index, out=layer.view(torch.int16))

    def spoil(self, index: torch.Tensor) -> None:
        for tensor in self.tensors:
            tensor.view(torch.int16).index_fill_(1, index, JUNK)

    def reserve(self, name: object, ids: npt.NDArray[np.int32]) -> tuple[Reservation, ChunkBatch]:
        keys = chain_keys(name, len(ids))
        reserved = self.cache.reserve(keys, keys, SHAPE)
        assert len(reserved.slots) == len(ids)
        return reserved, self.batch(name, ids, reserved.slots, reserved.generations)

    def batch(self, name: object, ids: npt.NDArray[np.int32], slots: Any, generations: Any) -> ChunkBatch:
        return ChunkBatch(
            0, np.ascontiguousarray(ids), np.array(slots, dtype=np.int64), np.array(generations, dtype=np.uint64),
            np.frombuffer(b"".join(chain_keys(name, len(ids))), dtype="V32"), NAMESPACE,
        )  # fmt: skip

    def equal(self, one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        self.settle()
        return all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(one, other, strict=True))


def until(condition: Callable[[], bool], patience_s: float = 60) -> None:
    """Poll `condition`, as an engine does at every step."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it does not become true"
        time.sleep(1e-4)


def store_late(engine: Engine, name: object, seed: int) -> tuple[list[torch.Tensor], Reservation]:
    """Write blocks late, store them at once, and overwrite them as soon as they are free. Returns the written bytes."""
    want, index = engine.noise(seed), engine.index(engine.here)
    engine.spoil(index)
    reserved, batch = engine.reserve(name, engine.here)
    engine.late(lambda: engine.write(index, want))
    job = engine.copier.store([batch])
    until(job.released)
    engine.spoil(index)
    assert job.wait(60).error is None
    assert job.ok.all()
    assert engine.cache.commit(reserved) == CHUNKS
    return want, reserved


def load_late(
    engine: Engine, name: object, reserved: Reservation
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], npt.NDArray[np.bool_]]:
    """Read blocks late, and load into them at once. Returns (former bytes, bytes that the reader saw, bytes now, ok)."""
    index, old = engine.index(engine.there), engine.noise(99)
    engine.write(index, old)
    engine.settle()  # so that only the reader is late
    seen, got = engine.noise(0), engine.noise(0)
    engine.late(lambda: engine.read(index, seen))
    job = engine.copier.load([engine.batch(name, engine.there, reserved.slots, reserved.generations)])
    assert job.wait(60).error is None
    engine.read(index, got)
    return old, seen, got, job.ok
