"""The order of work on the device: one lane for stores, one for loads, each with two streams and one host thread.

              kernel stream                                   copy stream                               host
    store     ids up; wait COMPUTED, staging's last use;      wait GATHERED; rows -> slots, sums down   wait STORED;
              gather -> GATHERED: blocks are free             -> STORED                                 publish
     zero copy     ...; gather into the slots -> GATHERED; sums down -> STORED
     DMA      ids up; checksum -> SUMMED                      wait COMPUTED; blocks -> slots;
                                                              wait SUMMED; sums down -> STORED: blocks are free
    load      ids up; wait ARRIVED, COMPUTED; scatter;        wait staging's last use;                  wait LOADED;
              sums down -> LOADED                             slots -> rows -> ARRIVED                  compare
     zero copy     ...; wait COMPUTED; scatter out of the slots; sums down -> LOADED
     DMA      ids up; wait ARRIVED; checksum; sums down       wait COMPUTED; slots -> blocks
              -> LOADED                                       -> ARRIVED

"up" is a copy to the device, "down" a copy to the host. Every wait above is needed: the tests remove one wait at a time, and
find wrong bytes for each. A lane works in small turns, so that the tests can drive it without threads, through every order
that streams may take.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...errors import LayoutError
from ...kernels.paged_tensors import PagedTensors
from ..base import ChunkBatch, Job, RankParts
from ..nvtx import span
from .device import ARRIVED, GATHERED, LOADED, STORED, SUMMED, Device, DeviceError, Event
from .dma_runs import Runs, merged_runs
from .link_table import Direction
from .planner import Choice, Method
from .staging_rings import DeviceTable, Rings, Staging

logger = logging.getLogger("kvkern")

# The pause between two queries whether a piece has run: an eighth of the time waited so far, so that queries are few.
MIN_PAUSE_S, MAX_PAUSE_S = 50e-6, 1e-3


@dataclass
class GpuJob(Job):
    """A running job on the device. Only the lane runs its pieces, so `run_unclaimed` has nothing to do."""

    pieces: tuple[Piece, ...] = ()

    def released(self) -> bool:
        """See `Job.released`. True once the gathers have run, long before the bytes have crossed the link. Never blocks."""
        return all(piece.released() for piece in self.pieces)


@dataclass(slots=True)
class Piece:
    """Some chunks of a batch, moved by one launch or one submission."""

    job: GpuJob
    batch: ChunkBatch
    rows: npt.NDArray[np.int64]  # [n] int64, rows of the batch
    begin: int  # where the batch begins in the job's `ok`
    choice: Choice
    computed: Event  # recorded in the engine's stream when the job was submitted
    future: Future[None]
    freed: Event | None = None  # stores only: the piece's blocks have been read

    def released(self) -> bool:
        """Return True if nothing reads the piece's blocks any more."""
        return self.future.done() or (self.freed is not None and self.freed.query())

    def finish(self, error: BaseException | None = None) -> None:
        """Set the result of this piece. Call it once, when none of its work runs any more."""
        self.job.finished = max(self.job.finished, time.perf_counter())
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class PieceWork:
    """A piece and the memory that it works in."""

    piece: Piece
    rows: npt.NDArray[np.int64]  # [m] int64, m > 0, rows of the batch that the piece may move
    generations: npt.NDArray[np.uint64]  # [m] uint64
    group: PagedTensors
    part_nbytes: int
    table: DeviceTable
    staging: Staging
    pinned: npt.NDArray[np.uint8]  # host memory for the sums

    @property
    def block_ids(self) -> npt.NDArray[np.int32]:
        """[m, blocks_per_chunk] int32"""
        return self.piece.batch.block_ids[self.rows]

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """[m] int64"""
        return self.piece.batch.slots[self.rows]

    @property
    def buffer(self) -> torch.Tensor:
        """[m, part_nbytes] uint8 on the device"""
        return self.staging.rows(len(self.rows), self.part_nbytes)

    @property
    def sums(self) -> torch.Tensor:
        """[m, planes] uint64 on the device"""
        return self.staging.sums(len(self.rows), len(self.group.layout.planes))

    @property
    def sums_down(self) -> Runs:
        """The copy of `sums` into `pinned`."""
        return Runs.of(self.pinned.ctypes.data, self.sums.data_ptr(), self.sums.numel() * 8)

    def read_sums(self, device: Device) -> npt.NDArray[np.uint64]:
        """[m, planes] uint64: the sums that have been copied into `pinned`."""
        sums = device.read_pinned(self.pinned[: self.sums.numel() * 8]).view(np.uint64)
        return sums.reshape(len(self.rows), -1)


class Lane(ABC):
    """One direction. Any thread may call `submit`; only the lane's thread calls `take_turn`."""

    def __init__(
        self,
        name: str,
        device: Device,
        parts: RankParts,
        device_rows: torch.Tensor | None,  # `parts.rows` at the device's addresses; None: kernels cannot reach them
        rings: Rings,
    ) -> None:
        self.name = name
        self._device, self._parts, self._device_rows, self._rings = device, parts, device_rows, rings
        self._kernels = device.stream(f"{name}.kernels")
        self._copies = device.stream(f"{name}.copies")
        self._queueing = threading.Lock()  # held briefly, because the engine's thread takes it too
        self._queued: deque[Piece] = deque()
        self._arrived = threading.Event()  # set if pieces were queued since a turn last looked
        self._in_flight: deque[tuple[PieceWork, Event]] = deque()

    def close(self) -> None:
        """Destroy the streams, after all turns. Idempotent. If the driver refuses, a stream lives until the process ends."""
        for stream in (self._kernels, self._copies):
            try:
                stream.close()
            except DeviceError as error:
                logger.warning(
                    "kvkern: a stream of the %(lane)s lane cannot be destroyed: %(error)s. It is freed when this process ends.",
                    {"event": "stream_not_destroyed", "lane": self.name, "error": error},
                )

    def submit(self, pieces: Sequence[Piece], executor: Executor) -> None:
        """Queue pieces, and two turns for each: one begins it, one ends it. All or nothing. Raises what the executor raises.

        Turns are submitted before pieces. If the executor refuses half-way, the turns that it took find nothing to do; a piece
        without its turns would never end.
        """
        with self._queueing:
            for _ in range(2 * len(pieces)):
                executor.submit(self.take_turn)
            self._queued.extend(pieces)
        self._arrived.set()

    def fail_unqueued(self, batches: Sequence[ChunkBatch]) -> None:  # noqa: B027  # a store has nothing to do
        """Settle chunks that will not be moved, because their submission failed. Any thread may call it."""

    def take_turn(self) -> None:
        """Begin the next piece or end the oldest one, whichever is possible first. Raises what that raises.

        If the window is full, no piece can begin before one ends, so the thread sleeps until the oldest piece ends. Otherwise
        it queries the oldest piece after pauses, and begins a piece that arrives meanwhile at once.
        """
        since = time.perf_counter()
        while True:
            self._arrived.clear()
            with self._queueing:  # an early turn waits here until `submit` has queued its piece
                piece = self._queued.popleft() if self._queued and self._rings.sums else None
            if piece is not None:
                with span(f"kvkern gpu {self.name}: enqueue"):
                    return self._begin(piece)
            if not self._in_flight:
                return None
            with span(f"kvkern gpu {self.name}: wait, verify, publish"):
                if not self._rings.sums or self._has_ended(self._in_flight[0][1], since):
                    return self._end(*self._in_flight.popleft())

    def _has_ended(self, end: Event, since: float) -> bool:
        """Return True if a piece has run. Before it returns False it has paused, or another piece has arrived."""
        try:
            if end.query():
                return True
        except RuntimeError:  # `_end` meets the same error and reports it
            return True
        waited = time.perf_counter() - since
        self._arrived.wait(min(max(MIN_PAUSE_S, waited / 8), MAX_PAUSE_S))
        return False

    def _begin(self, piece: Piece) -> None:
        pinned = self._rings.sums.popleft()
        try:
            self._check_ranges(piece)
            rows, generations = self._select_rows(piece)
            if len(rows):
                work = self._assign_buffers(piece, rows, generations, pinned)
                work.staging.free_after = end = self._enqueue(work)
                self._in_flight.append((work, end))
                return
            self._mark_failed(piece)
        except BaseException as error:
            self._fail(piece, pinned, error)
            raise
        self._rings.sums.append(pinned)
        piece.finish()

    def _end(self, work: PieceWork, end: Event) -> None:
        try:
            end.synchronize()
            self._publish_or_verify(work, work.read_sums(self._device))
            self._mark_failed(work.piece)
        except BaseException as error:
            self._fail(work.piece, work.pinned, error)
            raise
        self._rings.sums.append(work.pinned)
        work.piece.finish()

    def _fail(self, piece: Piece, pinned: npt.NDArray[np.uint8], error: BaseException) -> None:
        """Fail a piece. First drain the streams: until then their work may touch the piece's blocks, slots and buffers."""
        try:
            self._kernels.synchronize()
            self._copies.synchronize()
        finally:
            try:
                self._mark_failed(piece)
            finally:
                self._rings.sums.append(pinned)
                piece.finish(error)

    def _check_ranges(self, piece: Piece) -> None:
        """Raise LayoutError for bad ids or slots. Kernels check nothing: a bad id is an illegal access and ends the engine."""
        ids, slots = piece.batch.block_ids[piece.rows], piece.batch.slots[piece.rows]
        width, num_blocks = self._parts.blocks_per_chunk, self._parts.groups[piece.batch.group].layout.num_blocks
        if ids.dtype != np.int32 or ids.shape[1:] != (width,):
            raise LayoutError(
                f"block_ids is {ids.dtype} {ids.shape}, expected int32 [chunks, {width}]. Give one row per chunk, with one "
                f"block id per block."
            )
        if int(ids.max()) >= num_blocks or int(ids.min()) < -1:
            raise LayoutError(
                f"block ids are in [{ids.min()}, {ids.max()}], expected [-1, {num_blocks}). Give ids of the registered "
                f"tensors, or -1 for a block that is not copied."
            )
        if int(slots.max()) >= len(self._parts.rows) or int(slots.min()) < 0:
            raise LayoutError(
                f"slots are in [{slots.min()}, {slots.max()}], expected [0, {len(self._parts.rows)}). Give slots that the "
                f"cache has reserved or leased."
            )

    def _assign_buffers(
        self,
        piece: Piece,
        rows: npt.NDArray[np.int64],
        generations: npt.NDArray[np.uint64],
        pinned: npt.NDArray[np.uint8],
    ) -> PieceWork:
        group, size = self._parts.groups[piece.batch.group], self._parts.sizes[piece.batch.group]
        return PieceWork(
            piece, rows, generations, group, size, self._rings.next_table(), self._rings.next_staging(), pinned
        )

    def _upload_ids(
        self, work: PieceWork, row_ids: npt.NDArray[np.int64] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Upload (block ids, row ids) to the device. Without `row_ids` the rows are those of the staging buffer."""
        rows = np.arange(len(work.rows)) if row_ids is None else row_ids
        return work.table.upload(self._device, self._kernels, work.block_ids, rows)

    def _slot_rows(self) -> torch.Tensor:
        assert self._device_rows is not None, "the copier chooses ZERO_COPY only if kernels reach the slots"
        return self._device_rows

    def _slot_addresses(self, work: PieceWork) -> npt.NDArray[np.int64]:
        """[m] int64: addresses of the parts in host memory."""
        return work.slots * self._parts.rows.strides[0] + self._parts.rows.ctypes.data

    def _staging_addresses(self, work: PieceWork) -> npt.NDArray[np.int64]:
        """[m] int64: addresses of the parts in the staging buffer."""
        return np.arange(len(work.rows)) * work.part_nbytes + work.buffer.data_ptr()

    @abstractmethod
    def _select_rows(self, piece: Piece) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Return ([m] int64 rows of the batch that the piece may move, [m] uint64 their generations)."""

    @abstractmethod
    def _enqueue(self, work: PieceWork) -> Event:
        """Put a piece on the streams. After the returned event all its work has run and its sums are in pinned memory."""

    @abstractmethod
    def _publish_or_verify(self, work: PieceWork, sums: npt.NDArray[np.uint64]) -> None:
        """Set `ok` of the piece's chunks. Called when the device has run the piece."""

    def _mark_failed(self, piece: Piece) -> None:  # noqa: B027  # a store has nothing to do
        """Mark the slots of the piece's failed chunks. Called when `ok` is final for this piece, also after an error."""


class StoreLane(Lane):
    """Moves blocks to slots."""

    def _select_rows(self, piece: Piece) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        rows = piece.rows[self._parts.writable(piece.batch, piece.rows)]
        return rows, piece.batch.generations[rows]

    def _enqueue(self, work: PieceWork) -> Event:
        match work.piece.choice.method:
            case Method.STAGED:
                return self._by_staging(work)
            case Method.ZERO_COPY:
                return self._by_kernel(work)
            case Method.BATCH_DMA:
                return self._by_dma(work)

    def _publish_or_verify(self, work: PieceWork, sums: npt.NDArray[np.uint64]) -> None:
        self._parts.publish(work.piece.batch, work.rows, sums)
        work.piece.job.ok[work.piece.begin + work.rows] = True

    def _by_staging(self, work: PieceWork) -> Event:
        ids, rows = self._upload_ids(work)
        self._before_kernel(work)
        self._kernels.gather(work.group, ids, work.buffer, rows, work.sums, work.piece.choice.max_ctas)
        work.piece.freed = self._kernels.record(GATHERED)
        self._copies.wait(work.piece.freed)
        payload = Runs.of(self._slot_addresses(work), self._staging_addresses(work), work.part_nbytes)
        self._copies.copy(payload + work.sums_down, Direction.D2H)
        return self._copies.record(STORED)

    def _by_kernel(self, work: PieceWork) -> Event:
        ids, rows = self._upload_ids(work, work.slots)
        self._before_kernel(work)
        self._kernels.gather(work.group, ids, self._slot_rows(), rows, work.sums, work.piece.choice.max_ctas)
        work.piece.freed = self._kernels.record(GATHERED)
        self._kernels.copy(work.sums_down, Direction.D2H)
        return self._kernels.record(STORED)

    def _by_dma(self, work: PieceWork) -> Event:
        ids, _ = self._upload_ids(work)
        self._before_kernel(work)
        self._kernels.checksum(work.group, ids, work.sums, work.piece.choice.max_ctas)
        summed = self._kernels.record(SUMMED)
        self._copies.wait(work.piece.computed)
        runs = merged_runs(work.group, work.block_ids, self._slot_addresses(work), to_slots=True)
        self._copies.copy(runs, Direction.D2H)
        self._copies.wait(summed)
        self._copies.copy(work.sums_down, Direction.D2H)
        work.piece.freed = self._copies.record(STORED)
        return work.piece.freed

    def _before_kernel(self, work: PieceWork) -> None:
        self._kernels.wait(work.piece.computed)
        if work.staging.free_after is not None:
            self._kernels.wait(work.staging.free_after)


class LoadLane(Lane):
    """Moves slots to blocks."""

    def _select_rows(self, piece: Piece) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        good, generations = self._parts.readable(piece.batch, piece.rows)
        return piece.rows[good], generations[good]  # a slot of another chunk reaches no block

    def _enqueue(self, work: PieceWork) -> Event:
        match work.piece.choice.method:
            case Method.STAGED:
                self._by_staging(work)
            case Method.ZERO_COPY:
                self._by_kernel(work)
            case Method.BATCH_DMA:
                self._by_dma(work)
        self._kernels.copy(work.sums_down, Direction.D2H)
        return self._kernels.record(LOADED)

    def _publish_or_verify(self, work: PieceWork, sums: npt.NDArray[np.uint64]) -> None:
        good = self._parts.verified(work.piece.batch, work.rows, work.generations, sums)
        work.piece.job.ok[work.piece.begin + work.rows] = good

    def fail_unqueued(self, batches: Sequence[ChunkBatch]) -> None:
        for batch in batches:
            self._mark_bad(batch.slots)

    def _mark_failed(self, piece: Piece) -> None:
        self._mark_bad(piece.batch.slots[piece.rows[~piece.job.ok[piece.begin + piece.rows]]])

    def _mark_bad(self, slots: npt.NDArray[np.int64]) -> None:
        """Mark slots BAD, also after an exception: a retry must not read them again. Ignores slots out of range."""
        self._parts.arena.mark_bad(slots[(slots >= 0) & (slots < len(self._parts.rows))])

    def _by_staging(self, work: PieceWork) -> None:
        ids, rows = self._upload_ids(work)
        if work.staging.free_after is not None:
            self._copies.wait(work.staging.free_after)
        self._copies.copy(
            Runs.of(self._staging_addresses(work), self._slot_addresses(work), work.part_nbytes), Direction.H2D
        )
        self._kernels.wait(self._copies.record(ARRIVED))
        self._kernels.wait(work.piece.computed)
        self._kernels.scatter(work.group, ids, work.buffer, rows, work.sums, work.piece.choice.max_ctas)

    def _by_kernel(self, work: PieceWork) -> None:
        ids, rows = self._upload_ids(work, work.slots)
        self._kernels.wait(work.piece.computed)
        self._kernels.scatter(work.group, ids, self._slot_rows(), rows, work.sums, work.piece.choice.max_ctas)

    def _by_dma(self, work: PieceWork) -> None:
        ids, _ = self._upload_ids(work)
        self._copies.wait(work.piece.computed)
        runs = merged_runs(work.group, work.block_ids, self._slot_addresses(work), to_slots=False)
        self._copies.copy(runs, Direction.H2D)
        self._kernels.wait(self._copies.record(ARRIVED))
        self._kernels.checksum(work.group, ids, work.sums, work.piece.choice.max_ctas)
