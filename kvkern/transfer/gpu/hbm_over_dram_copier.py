"""Copies for a cache of two tiers, HBM over DRAM: between blocks and the tier that holds a slot, and between the tiers.

HbmOverDramCopier   paged blocks <-> slots: HBM's slots by a copier on the device, DRAM's slots by the DRAM tier's own copier
DmaSlotMover        HBM's slots <-> DRAM's slots, whole parts. A call blocks until the copy has ended; the caller holds leases
                    until then
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ...arena.file import Arena, Slots
from ...arena.slots import SlotGeometry
from ...kernels.paged_tensors import PagedTensors
from ...tiers.hbm import HbmSlots
from ..base import ChunkBatch, Copier, Job
from .copier import GpuCopier
from .device import Device, DeviceError
from .dma_runs import Runs
from .link_table import Direction
from .planner import MAX_PIECE_NBYTES, MAX_RELAYOUT_CTAS, MIN_PIECE_NBYTES, Choice, Method
from .staging_rings import RingDepths

logger = logging.getLogger("kvkern")

MOVED = "moved"  # an event: slots have been copied between the tiers

PlacedJob = tuple[Job, npt.NDArray[np.int64]]  # a job, and the indexes of its chunks in the joined job: [n] int64


def device_slots(geometry: SlotGeometry, count: int, device: Device) -> HbmSlots:
    """Make `count` slots in the device's memory. Raises DeviceError if there is no room."""
    memory = device.allocate(count * geometry.part_stride)
    seen = (ctypes.c_uint8 * memory.numel()).from_address(memory.data_ptr())
    rows = np.ndarray((count, geometry.part_stride), np.uint8, memoryview(seen))
    return HbmSlots(geometry, rows, owner=memory)


class UnregisteredDevice:
    """A device for slots in its own memory, where nothing needs registering. It forwards all other calls to `device`."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def register(self, address: int, nbytes: int) -> None:
        """See Device."""

    def unregister(self, address: int) -> None:
        """See Device."""

    def device_address(self, address: int) -> int:
        """See Device."""
        return address

    def numa_node(self) -> int | None:
        """See Device. None, because no host memory is involved."""
        return None


def device_copier(group: PagedTensors, slots: HbmSlots, blocks_per_chunk: int, device: Device) -> Copier:
    """Make the copier between paged blocks and slots on one device. One kernel copies; only ids and checksums use the link.

    Nothing is staged. So besides the slots it takes device memory only for ids and checksums: some 100 KiB, at most a few MiB.
    """
    resident, arena = cast(Device, UnregisteredDevice(device)), cast(Arena, slots)

    def choose(direction: Direction, run_nbytes: int, count: int, nbytes: int) -> Choice:
        return Choice(Method.ZERO_COPY, MAX_RELAYOUT_CTAS, MAX_PIECE_NBYTES)

    return GpuCopier([group], arena, 0, blocks_per_chunk, resident, choose, RingDepths(staging=1, payload=False))


class DmaSlotMover:
    """A `SlotMover` that uses the copy engine, one piece at a time, so that the engine's own copies wait for one piece only."""

    def __init__(self, hbm: HbmSlots, dram: Slots, device: Device) -> None:
        self._hbm, self._dram = hbm.parts(0), dram.parts(0)
        self._nbytes = hbm.spec.geometry.part_nbytes
        self._device, self._stream = device, device.stream("hbm")
        self._attached = threading.local()

    def copy_down(self, hbm: npt.NDArray[np.int64], dram: npt.NDArray[np.int64]) -> None:
        """See SlotMover."""
        self._copy(self._addresses(self._dram, dram), self._addresses(self._hbm, hbm), Direction.D2H)

    def copy_up(self, hbm: npt.NDArray[np.int64], dram: npt.NDArray[np.int64]) -> None:
        """See SlotMover."""
        self._copy(self._addresses(self._hbm, hbm), self._addresses(self._dram, dram), Direction.H2D)

    def close(self) -> None:
        """See SlotMover. If the driver refuses, the stream lives until the process ends."""
        try:
            self._attach()
            self._stream.close()
        except DeviceError as error:
            logger.warning(
                "kvkern: the stream between HBM and DRAM cannot be destroyed: %(error)s. It is freed when this process ends.",
                {"event": "hbm_stream_not_destroyed", "error": error},
            )

    def _attach(self) -> None:
        if not hasattr(self._attached, "yes"):
            self._device.attach()
            self._attached.yes = True

    def _addresses(self, rows: npt.NDArray[np.uint8], at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return rows.ctypes.data + at * rows.strides[0]

    def _copy(self, to: npt.NDArray[np.int64], at: npt.NDArray[np.int64], direction: Direction) -> None:
        self._attach()
        step = max(1, MIN_PIECE_NBYTES // self._nbytes)
        for begin in range(0, len(at), step):
            rows = slice(begin, begin + step)
            try:
                self._stream.copy(Runs.of(to[rows], at[rows], self._nbytes), direction)
            except BaseException:
                self._stream.synchronize()  # earlier pieces still run
                raise
            self._stream.record(MOVED).synchronize()


class JoinedJob(Job):
    """Several jobs as one. Each read of `ok` joins their results again."""

    def __init__(self, parts: Sequence[PlacedJob]) -> None:
        self._jobs = [job for job, _ in parts]
        self._places = [at for _, at in parts]
        self.nbytes = sum(job.nbytes for job in self._jobs)
        self.futures = [future for job in self._jobs for future in job.futures]
        self.started = min(job.started for job in self._jobs)

    @property
    def ok(self) -> npt.NDArray[np.bool_]:  # type: ignore[override]
        """[n] bool: final once `done()`."""
        whole = np.zeros(sum(map(len, self._places)), dtype=np.bool_)
        for job, at in zip(self._jobs, self._places, strict=True):
            whole[at] = job.ok
        return whole

    @property
    def finished(self) -> float:  # type: ignore[override]
        """The time when the last job ended."""
        return max(job.finished for job in self._jobs)

    def released(self) -> bool:
        """See Job."""
        return all(job.released() for job in self._jobs)

    def run_piece(self) -> bool:
        """See Job."""
        return any(job.run_piece() for job in self._jobs)


class HbmOverDramCopier(Copier):
    """The copier of one rank whose slots are in two tiers: slots from `first_hbm_slot` on are in HBM, the others in DRAM."""

    def __init__(
        self,
        dram: Copier,
        hbm: Copier,
        first_hbm_slot: int,
        end_moves: Callable[
            [], None
        ],  # ends moves between the tiers, which use the memory that the copiers have registered
    ) -> None:
        self.blocks_per_chunk = dram.blocks_per_chunk
        self._dram, self._hbm, self._first_hbm_slot, self._end_moves = dram, hbm, first_hbm_slot, end_moves

    @property
    def num_blocks(self) -> int:
        """See Copier."""
        return self._dram.num_blocks

    def self_test(self) -> None:
        """See Copier. One test is enough: both copiers move the same tensors by the same kernels."""
        self._dram.self_test()

    def store(self, batches: Sequence[ChunkBatch]) -> Job:
        """See Copier."""
        below, above = self._split(batches)
        return JoinedJob([(self._dram.store(below[0]), below[1]), (self._hbm.store(above[0]), above[1])])

    def load(self, batches: Sequence[ChunkBatch]) -> Job:
        """See Copier."""
        below, above = self._split(batches)
        return JoinedJob([(self._dram.load(below[0]), below[1]), (self._hbm.load(above[0]), above[1])])

    def reject(self, slots: npt.NDArray[np.int64]) -> Job:
        """See Copier."""
        self._hbm.reject(slots[slots >= self._first_hbm_slot] - self._first_hbm_slot)
        self._dram.reject(slots[slots < self._first_hbm_slot])
        job = Job(0, np.zeros(max(1, len(slots)), dtype=np.bool_))
        job.finished = job.started
        return job

    def close(self) -> None:
        """See Copier. Moves between the tiers end first."""
        self._end_moves()
        self._hbm.close()
        self._dram.close()

    def _split(
        self, batches: Sequence[ChunkBatch]
    ) -> tuple[tuple[list[ChunkBatch], npt.NDArray[np.int64]], tuple[list[ChunkBatch], npt.NDArray[np.int64]]]:
        """Split batches by tier: ((DRAM's batches, indexes of their chunks in the whole), (HBM's batches, their indexes))."""
        parts: tuple[list[ChunkBatch], list[ChunkBatch]] = ([], [])
        places: tuple[list[npt.NDArray[np.int64]], ...] = ([], [])
        begin = 0
        for batch in batches:
            above = batch.slots >= self._first_hbm_slot
            for tier, (mine, first) in enumerate(((~above, 0), (above, self._first_hbm_slot))):
                parts[tier].append(_select_chunks(batch, mine, first))
                places[tier].append(begin + np.flatnonzero(mine))
            begin += len(batch.slots)
        below, above_all = (np.concatenate([np.zeros(0, dtype=np.int64), *at]) for at in places)
        return (parts[0], below), (parts[1], above_all)


def _select_chunks(batch: ChunkBatch, mine: npt.NDArray[np.bool_], first: int) -> ChunkBatch:
    """Return the chunks of a batch where `mine` is True, with slots counted from `first`. Loads have no generations."""
    return replace(
        batch,
        block_ids=np.ascontiguousarray(batch.block_ids[mine]),
        slots=batch.slots[mine] - first,
        generations=batch.generations[mine] if len(batch.generations) else batch.generations,
        keys=batch.keys[mine],
    )
