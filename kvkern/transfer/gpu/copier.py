"""Moves chunks between paged tensors on a GPU and the arena's slots. The GPU's counterpart of kvkern/transfer/host.py.

    submit (the engine's thread)    record COMPUTED on its stream; choose a method for each batch; cut into pieces; queue
    one thread per direction        enqueue pieces, end them in order: see stream_lanes.py

The engine's thread never waits and never launches a kernel. If the driver or the executor refuses a submission, the error
belongs to the job, and the job is done. The blocks of a store are free once `job.released()` is True.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from ...arena.file import Arena
from ...arena.room import Progress
from ...config import format_nbytes
from ...errors import LayoutError
from ...kernels.paged_tensors import PagedTensors
from ...kernels.selftest import check_round_trip
from ..base import ChunkBatch, Copier, Job
from .device import Device, Event
from .dma_runs import count_runs, is_unpadded
from .link_table import Direction
from .pinned_arena import PinnedArena
from .planner import MAX_RELAYOUT_CTAS, Choice, Method
from .staging_rings import MAX_LAUNCH_NBYTES, MAX_PIECE_CHUNKS, RingDepths, Rings
from .stream_lanes import GpuJob, Lane, LoadLane, Piece, StoreLane

DEPTHS = RingDepths()
# (direction, bytes of a run, number of runs, bytes in all) -> Choice: see planner.choose_method
Choose = Callable[[Direction, int, int, int], Choice]


def start_lane_thread(name: str, initialise: Callable[[], None]) -> Executor:
    """Start the thread of a lane and run `initialise` in it. Raises what `initialise` raises, before any job is submitted."""
    thread = ThreadPoolExecutor(1, f"kvkern-{name}")
    try:
        thread.submit(initialise).result()
    except BaseException:
        thread.shutdown(wait=False)
        raise
    return thread


class GpuCopier(Copier):
    """The copier of one rank whose KV is on a GPU. See `Copier`."""

    def __init__(
        self,
        groups: Sequence[PagedTensors],
        arena: Arena,
        rank: int,
        blocks_per_chunk: int,
        device: Device,
        choose: Choose,
        depths: RingDepths = DEPTHS,
        progress: Progress = lambda line: None,
        executor: Callable[[str, Callable[[], None]], Executor] = start_lane_thread,
    ) -> None:
        """Allocate memory on the device and register the arena. Raises LayoutError, ArenaError or DeviceError."""
        super().__init__(groups, arena, rank, blocks_per_chunk)
        self._device, self._choose = device, choose
        largest = max(self._parts.sizes)
        if largest > MAX_LAUNCH_NBYTES:
            raise LayoutError(
                f"a chunk has {format_nbytes(largest)} a rank, but one launch moves at most "
                f"{format_nbytes(MAX_LAUNCH_NBYTES)}, because the engine waits for a whole launch. Use fewer blocks per chunk."
            )
        depths = replace(depths, staging_nbytes=max(depths.staging_nbytes, largest))
        self._piece_chunks = [max(1, min(depths.staging_nbytes // n, MAX_PIECE_CHUNKS)) for n in self._parts.sizes]
        chunks, planes = max(self._piece_chunks), max(len(group.layout.planes) for group in self._groups)
        rings = [Rings(device, depths, chunks, blocks_per_chunk, planes) for _ in Direction]
        self._pinned = PinnedArena(arena, device, progress)
        self._device_rows = None if self._pinned.shift is None else _device_view(self._parts.rows, self._pinned.shift)
        with ExitStack() as undo:
            undo.callback(self._pinned.close)
            self._store = StoreLane("store", device, self._parts, self._device_rows, rings[0])
            undo.callback(self._store.close)
            self._load = LoadLane("load", device, self._parts, self._device_rows, rings[1])
            undo.callback(self._load.close)
            self._stores = executor("store", device.attach)
            undo.callback(self._stores.shutdown)
            self._loads = executor("load", device.attach)
            undo.pop_all()

    def self_test(self) -> None:
        """See `Copier.self_test`. It checks layouts and kernels; checksums verify every later copy."""
        for group in self._groups:
            check_round_trip(group, self.blocks_per_chunk, self._device.backend)

    def store(self, batches: Sequence[ChunkBatch]) -> Job:
        """See `Copier.store`. The thread's current stream must be the one that has written the blocks."""
        return self._submit(Direction.D2H, batches, self._store, self._stores)

    def load(self, batches: Sequence[ChunkBatch]) -> Job:
        """See `Copier.load`. The thread's current stream must be the one that still uses the blocks."""
        return self._submit(Direction.H2D, batches, self._load, self._loads)

    def close(self) -> None:
        """Wait for running jobs, end the threads, unregister the arena and destroy the streams. Idempotent.

        The stores' thread does the last two, because it is attached to the device. The caller's thread may be attached to
        another device, or to none.
        """
        self._loads.shutdown(wait=True)
        with suppress(RuntimeError):  # already closed, or Python shuts down and its threads have ended
            self._stores.submit(self._release_device)
        self._stores.shutdown(wait=True)
        self._release_device()  # for whatever that thread could not release

    def _release_device(self) -> None:
        self._pinned.close()
        self._store.close()
        self._load.close()

    def _submit(self, direction: Direction, batches: Sequence[ChunkBatch], lane: Lane, executor: Executor) -> GpuJob:
        job = GpuJob(self._parts.payload_nbytes(batches), np.zeros(sum(len(b.slots) for b in batches), dtype=np.bool_))
        try:
            computed = self._device.record_computed()
            pieces: list[Piece] = []
            begin = 0
            for batch in batches:
                for choice, rows in self._plan(direction, batch):
                    pieces += self._cut_into_pieces(job, batch, begin, choice, rows, computed)
                begin += len(batch.slots)
            lane.submit(pieces, executor)
        except (
            RuntimeError
        ) as error:  # from the driver after a fault, or from an executor that is closed or shutting down
            lane.fail_unqueued(batches)
            failed: Future[None] = Future()
            failed.set_exception(error)
            job.futures.append(failed)
            job.finished = time.perf_counter()
            return job
        job.pieces = tuple(pieces)
        job.futures += [piece.future for piece in pieces]
        if not pieces:
            job.finished = job.started
        return job

    def _plan(self, direction: Direction, batch: ChunkBatch) -> list[tuple[Choice, npt.NDArray[np.int64]]]:
        """Split a batch into (choice, [n] int64 rows). DMA only moves chunks that have all their blocks."""
        group, rows = self._groups[batch.group], np.arange(len(batch.slots))
        nbytes = len(rows) * self._parts.sizes[batch.group]
        if not nbytes:
            return []
        if batch.block_ids.shape[1:] != (self.blocks_per_chunk,):  # the lane rejects this batch: an error of the job
            return [(Choice(Method.STAGED, MAX_RELAYOUT_CTAS, nbytes), rows)]
        count = count_runs(group, batch.block_ids)
        choice = self._choose(direction, max(1, nbytes // count), count, nbytes)
        staged = replace(choice, method=Method.STAGED, max_ctas=choice.max_ctas or MAX_RELAYOUT_CTAS)
        match choice.method:
            case Method.ZERO_COPY if self._device_rows is None:
                return [(staged, rows)]
            case Method.BATCH_DMA:
                whole = (batch.block_ids >= 0).all(axis=1) & is_unpadded(group, self.blocks_per_chunk)
                by_dma = replace(choice, max_ctas=staged.max_ctas)  # of the kernel that sums
                return [(how, part) for how, part in ((by_dma, rows[whole]), (staged, rows[~whole])) if len(part)]
            case _:
                return [(choice, rows)]

    def _cut_into_pieces(
        self,
        job: GpuJob,
        batch: ChunkBatch,
        begin: int,
        choice: Choice,
        rows: npt.NDArray[np.int64],
        computed: Event,
    ) -> list[Piece]:
        step = min(max(1, choice.piece_nbytes // self._parts.sizes[batch.group]), self._piece_chunks[batch.group])
        cuts = (rows[at : at + step] for at in range(0, len(rows), step))
        return [Piece(job, batch, cut, begin, choice, computed, Future()) for cut in cuts]


def _device_view(rows: npt.NDArray[np.uint8], shift: int) -> torch.Tensor:
    """Return `rows` at the device's addresses: [num_slots, part_stride] uint8. Only kernels may use it, unless shift is 0."""
    if not shift:
        return torch.from_numpy(rows)
    nbytes = (len(rows) - 1) * rows.strides[0] + rows.shape[1]
    memory = (ctypes.c_uint8 * nbytes).from_address(rows.ctypes.data + shift)
    flat = np.frombuffer(memory, dtype=np.uint8)
    return torch.from_numpy(np.lib.stride_tricks.as_strided(flat, rows.shape, rows.strides))
