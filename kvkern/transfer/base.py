"""The interface of every copier, for any device: a batch of chunks, a running job, one rank's parts of the slots, a copier.

    store: gather blocks -> part, sealed checksums -> header, then `written[rank] = generation`    (see RankParts.publish)
    load:  does the header name the expected chunk? scatter part -> blocks, checksums equal? else mark the slot BAD

Until a job is done the caller must not use the engine's blocks, and must keep the slots leased or reserved.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..arena.file import Slots
from ..arena.slots import fingerprints, seal
from ..errors import LayoutError
from ..kernels.paged_tensors import PagedTensors

BatchRows = slice | npt.NDArray[np.int64]  # which chunks of a batch


@dataclass(frozen=True)
class ChunkBatch:
    """Chunks of one KV group, their blocks and their slots. Arrays are not copied: do not change them until the job is done."""

    group: int  # index into the copier's groups
    block_ids: npt.NDArray[np.int32]  # [n, blocks_per_chunk] int32; -1: this block is not copied
    slots: npt.NDArray[np.int64]  # [n] int64
    generations: npt.NDArray[np.uint64]  # [n] uint64, of the reservation; unused in loads
    keys: npt.NDArray[np.void]  # [n] V32
    namespace: bytes  # 32-byte root
    # [n] uint64, of a lease of a daemon: what it recorded of the headers when they were published. None: no such record
    fingerprints: npt.NDArray[np.uint64] | None = None


@dataclass
class Job:
    """A running store or load. `ok[i]` is final for chunk i once `done()` is True."""

    nbytes: int
    ok: npt.NDArray[np.bool_]  # [n] bool
    futures: list[Future[None]] = field(default_factory=list)  # one a piece
    unclaimed: deque[tuple[Future[None], Callable[[], None]]] = field(
        default_factory=deque
    )  # pieces no thread has begun
    started: float = field(default_factory=time.perf_counter)
    finished: float = 0.0

    def done(self) -> bool:
        """Return True if every piece has ended."""
        return all(future.done() for future in self.futures)

    def released(self) -> bool:
        """Return True if a store has read all its blocks, so that the engine may overwrite them. Never later than `done`.

        For a load this equals `done()`: until then the load still writes its blocks.
        """
        return self.done()

    def run_piece(self) -> bool:
        """Run one unclaimed piece in this thread. Returns False if there is none. Raises what the piece raises."""
        try:
            future, piece = self.unclaimed.popleft()
        except IndexError:
            return False
        try:
            piece()
            self.finished = max(self.finished, time.perf_counter())
            future.set_result(None)
        except BaseException as error:
            self.finished = max(self.finished, time.perf_counter())
            future.set_exception(error)
            raise
        return True

    def run_unclaimed(self) -> None:
        """Run pieces in this thread until no piece is unclaimed. Raises what a piece raises. Call `wait` in any case."""
        while self.run_piece():
            pass

    def fail_unclaimed(self, error: BaseException) -> None:
        """End all unclaimed pieces with this error, because no thread will run them."""
        while self.unclaimed:
            with suppress(IndexError):  # another thread took the piece meanwhile
                self.unclaimed.popleft()[0].set_exception(error)
        self.finished = max(self.finished, time.perf_counter())

    def wait(self, timeout_s: float | None = None) -> Job:
        """Block until the job is done, but at most for `timeout_s`."""
        wait(self.futures, timeout_s)
        return self

    @property
    def error(self) -> BaseException | None:
        """The exception of the first failed piece, whose chunks are not ok; None if no piece failed. Call when done."""
        return next((error for future in self.futures if (error := future.exception()) is not None), None)

    @property
    def seconds(self) -> float:
        """Wall time from submission to the end of the last piece."""
        return self.finished - self.started


class RankParts:
    """One rank's parts of the slots: checks before a copy, verification and publication after it. It copies no payload."""

    def __init__(self, groups: Sequence[PagedTensors], arena: Slots, rank: int, blocks_per_chunk: int) -> None:
        self.groups = tuple(groups)
        self.arena = arena
        self.rank = rank
        self.blocks_per_chunk = blocks_per_chunk
        self.rows = arena.parts(rank)  # [num_slots, part_stride] uint8
        self.sizes = [group.layout.part_nbytes(blocks_per_chunk) for group in self.groups]
        geometry = arena.spec.geometry
        self._tails = geometry.tail_words(arena.headers)
        for group, size in zip(self.groups, self.sizes, strict=True):
            planes = len(group.layout.planes)
            if size > geometry.part_nbytes or planes > geometry.max_planes:
                raise LayoutError(
                    f"a chunk of {blocks_per_chunk} blocks needs {size} bytes in {planes} planes a rank, but the arena's "
                    f"slots have {geometry.part_nbytes} bytes and {geometry.max_planes} planes a rank. Use an arena that "
                    f"was made for this model and layout, or fewer blocks per chunk."
                )
        offsets = [group.layout.plane_offsets(blocks_per_chunk) for group in self.groups]
        # for each group: [max_planes] uint32, zeros where the group has fewer planes
        self._plane_nbytes = [
            np.pad(np.diff(o), (0, geometry.max_planes - len(o) + 1)).astype(np.uint32) for o in offsets
        ]

    def writable(self, batch: ChunkBatch, rows: BatchRows) -> npt.NDArray[np.bool_]:
        """[rows] bool: True where the slot still has the chunk's reservation. Never write the others: they have a new owner."""
        current: npt.NDArray[np.bool_] = self.arena.headers["generation"][batch.slots[rows]] == batch.generations[rows]
        return current

    def publish(
        self,
        batch: ChunkBatch,
        rows: npt.NDArray[np.int64],
        sums: npt.NDArray[np.uint64],  # [rows, planes] uint64, of payload that every process can see already
    ) -> None:
        """Write sealed checksums, then WRITTEN for this rank. These are numpy's plain stores, in this order, without a barrier.

        On x86 other cores see stores in the order in which they were made: a process that sees WRITTEN sees the rest too.
        On other CPUs (aarch64: Grace) another core may see WRITTEN first, until both sides have gone through a lock or a
        socket. The manager has done so: it reads WRITTEN after it has heard that the job is done, and other processes find a
        chunk only after it is READY. A reader that looked earlier would find checksums that do not match: a miss, never wrong
        bytes. A fence here would need a matching fence in every reader, in Python.
        """
        headers, slots, generations = self.arena.headers, batch.slots[rows], batch.generations[rows]
        planes = sums.shape[1]
        headers["checksum"][slots, self.rank, :planes] = sums ^ seal(batch.keys[rows], generations)[:, None]
        headers["plane_nbytes"][slots, self.rank] = self._plane_nbytes[batch.group]
        headers["written"][slots, self.rank] = generations

    def readable(self, batch: ChunkBatch, rows: BatchRows) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """([rows] bool: True where the header names this chunk and this rank has written it; [rows] uint64 generations)."""
        headers, slots = self.arena.headers, batch.slots[rows]
        good: npt.NDArray[np.bool_] = self.arena.identities[slots] == self.arena.spec.geometry.identities(
            batch.keys[rows], np.void(batch.namespace)
        )
        generations: npt.NDArray[np.uint64] = headers["generation"][slots]
        good &= headers["written"][slots, self.rank] == generations
        good &= headers["codec"][slots] == 0
        return good, generations

    def verified(
        self,
        batch: ChunkBatch,
        rows: BatchRows,
        generations: npt.NDArray[np.uint64],  # [rows] uint64, from `readable`
        sums: npt.NDArray[np.uint64],  # [rows, planes] uint64, of the bytes that the load has read
    ) -> npt.NDArray[np.bool_]:
        """[rows] bool: True where the payload equals what was stored under this key and generation.

        With `batch.fingerprints` the checksums must also be those that the daemon saw when the chunk was published.
        """
        sealed = sums ^ seal(batch.keys[rows], generations)[:, None]
        geometry, planes = self.arena.spec.geometry, sums.shape[1]
        if batch.fingerprints is None:
            found = self.arena.headers["checksum"][batch.slots[rows], self.rank, :planes]
            equal: npt.NDArray[np.bool_] = (found == sealed).all(axis=1)
            return equal
        tails = self._tails[batch.slots[rows]]  # a copy, so that what is compared is what has this fingerprint
        begin = geometry.world_size + self.rank * geometry.max_planes
        equal = (tails[:, begin : begin + planes] == sealed).all(axis=1)
        equal &= fingerprints(tails) == batch.fingerprints[rows]
        return equal

    def payload_nbytes(self, batches: Sequence[ChunkBatch]) -> int:
        """Return the payload bytes of these chunks, for this rank."""
        return sum(len(batch.slots) * self.sizes[batch.group] for batch in batches)


class Copier(ABC):
    """Moves chunks between one rank's paged tensors and slots. Thread-safe: jobs on distinct slots and blocks may overlap."""

    def __init__(self, groups: Sequence[PagedTensors], arena: Slots, rank: int, blocks_per_chunk: int) -> None:
        self._arena = arena
        self.blocks_per_chunk = blocks_per_chunk
        self._parts = RankParts(groups, arena, rank, blocks_per_chunk)
        self._groups = self._parts.groups

    @property
    def num_blocks(self) -> int:
        """The number of blocks that every group has."""
        return min(group.layout.num_blocks for group in self._groups)

    @abstractmethod
    def self_test(self) -> None:
        """Prove layout and kernels for every group. Raises LayoutError. Writes to no block: the engine may compute meanwhile.

        See kernels/selftest.py. Call it before the first job, because it also compiles.
        """

    @abstractmethod
    def store(self, batches: Sequence[ChunkBatch]) -> Job:
        """Start to write chunks into reserved slots. Chunk i is WRITTEN for this rank if ok[i]."""

    @abstractmethod
    def load(self, batches: Sequence[ChunkBatch]) -> Job:
        """Start to read leased slots into blocks. If not ok[i], the slot is BAD and its blocks hold nothing usable."""

    @abstractmethod
    def close(self) -> None:
        """Wait for running jobs, then free threads and memory."""

    def reject(self, slots: npt.NDArray[np.int64]) -> Job:
        """Return a failed job for a load that cannot be done. It marks the slots BAD, so that they are not used again."""
        self._arena.mark_bad(slots)
        job = Job(0, np.zeros(max(1, len(slots)), dtype=np.bool_))  # never empty: `all()` of an empty array is True
        job.finished = job.started
        return job
