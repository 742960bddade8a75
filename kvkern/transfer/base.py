"""What moves chunks, whatever the device: a batch of chunks, a job under way, one rank's parts of the slots, a copier.

    store: gather blocks -> part, sealed checksums -> header, then `written[rank] = generation`    (see RankParts.publish)
    load:  header says what it should be? scatter part -> blocks, checksums equal? else mark the slot BAD

The caller keeps the engine's blocks unused until a job is done, and slots leased or reserved until then.
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
from ..arena.slots import seal
from ..errors import LayoutError
from ..kernels.paged_tensors import PagedTensors

BatchRows = slice | npt.NDArray[np.int64]  # which chunks of a batch


@dataclass(frozen=True)
class ChunkBatch:
    """Chunks of one KV group and where they go. Arrays are not copied; leave them alone until the job is done."""

    group: int  # index into the transfer's groups
    block_ids: npt.NDArray[np.int32]  # [n, blocks_per_chunk] int32; -1: not part of this transfer
    slots: npt.NDArray[np.int64]  # [n] int64
    generations: npt.NDArray[np.uint64]  # [n] uint64, of the reservation; unused in loads
    keys: npt.NDArray[np.void]  # [n] V32
    namespace: bytes  # 32-byte root


@dataclass
class Job:
    """A transfer under way. `ok[i]` is final for chunk i once `done()`."""

    nbytes: int
    ok: npt.NDArray[np.bool_]  # [n] bool
    futures: list[Future[None]] = field(default_factory=list)  # one a piece
    unclaimed: deque[tuple[Future[None], Callable[[], None]]] = field(default_factory=deque)  # pieces nobody has begun
    started: float = field(default_factory=time.perf_counter)
    finished: float = 0.0

    def done(self) -> bool:
        """Whether every piece has ended."""
        return all(future.done() for future in self.futures)

    def released(self) -> bool:
        """Whether a store has read all its blocks: the engine may overwrite them from now on. Never later than `done`.

        Of a load it is `done`: its blocks are being written until then.
        """
        return self.done()

    def run_piece(self) -> bool:
        """Run a piece nobody has begun, in this thread; False if there is none. Raises what the piece raises."""
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
        """Run pieces in this thread until all have been begun. Raises what one of them raises; `wait` in any case."""
        while self.run_piece():
            pass

    def fail_unclaimed(self, error: BaseException) -> None:
        """End the pieces that nobody has begun: nobody will."""
        while self.unclaimed:
            with suppress(IndexError):  # taken meanwhile
                self.unclaimed.popleft()[0].set_exception(error)
        self.finished = max(self.finished, time.perf_counter())

    def wait(self, timeout_s: float | None = None) -> Job:
        """Block until done, or for `timeout_s`."""
        wait(self.futures, timeout_s)
        return self

    @property
    def error(self) -> BaseException | None:
        """What the first failed piece raised; its chunks are not ok. Call when done."""
        return next((error for future in self.futures if (error := future.exception()) is not None), None)

    @property
    def seconds(self) -> float:
        """Wall time from submission to the end of the last piece."""
        return self.finished - self.started


class RankParts:
    """One rank's parts of the slots: which may be written, what seals them, and what a load must find. No copies here."""

    def __init__(self, groups: Sequence[PagedTensors], arena: Slots, rank: int, blocks_per_chunk: int) -> None:
        self.groups = tuple(groups)
        self.arena = arena
        self.rank = rank
        self.blocks_per_chunk = blocks_per_chunk
        self.rows = arena.parts(rank)  # [num_slots, part_stride] uint8
        self.sizes = [group.layout.part_nbytes(blocks_per_chunk) for group in self.groups]
        geometry = arena.spec.geometry
        for group, size in zip(self.groups, self.sizes, strict=True):
            planes = len(group.layout.planes)
            if size > geometry.part_nbytes or planes > geometry.max_planes:
                raise LayoutError(
                    f"a chunk of {blocks_per_chunk} blocks needs {size} bytes in {planes} planes a rank; "
                    f"the arena's slots have {geometry.part_nbytes} bytes and {geometry.max_planes} planes"
                )
        offsets = [group.layout.plane_offsets(blocks_per_chunk) for group in self.groups]
        # a group: [max_planes] uint32, zeros where it has fewer planes
        self._plane_nbytes = [
            np.pad(np.diff(o), (0, geometry.max_planes - len(o) + 1)).astype(np.uint32) for o in offsets
        ]

    def writable(self, batch: ChunkBatch, rows: BatchRows) -> npt.NDArray[np.bool_]:
        """[rows] bool: whose reservation is still the slot's. The others have a new owner: hands off."""
        current: npt.NDArray[np.bool_] = self.arena.headers["generation"][batch.slots[rows]] == batch.generations[rows]
        return current

    def publish(
        self,
        batch: ChunkBatch,
        rows: npt.NDArray[np.int64],
        sums: npt.NDArray[np.uint64],  # [rows, planes] uint64, of payload that every process sees by now
    ) -> None:
        """Write sealed checksums, then WRITTEN for this rank: numpy's plain stores, in this order, and no barrier.

        On x86 stores are seen in the order they are made: who sees WRITTEN sees the rest. Elsewhere (aarch64: Grace) another
        core may see WRITTEN first, until both sides have gone through a lock or a socket. The manager has: it asks for WRITTEN
        when it has heard that the job is done, and others find a chunk only after it is READY. Who looked earlier would find
        checksums that do not fit: a miss, never wrong bytes. A fence here would need its partner in every reader, in Python.
        """
        headers, slots, generations = self.arena.headers, batch.slots[rows], batch.generations[rows]
        planes = sums.shape[1]
        headers["checksum"][slots, self.rank, :planes] = sums ^ seal(batch.keys[rows], generations)[:, None]
        headers["plane_nbytes"][slots, self.rank] = self._plane_nbytes[batch.group]
        headers["written"][slots, self.rank] = generations

    def readable(self, batch: ChunkBatch, rows: BatchRows) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """([rows] bool: whose header says it holds this chunk, written by this rank; [rows] uint64 generations)."""
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
        sums: npt.NDArray[np.uint64],  # [rows, planes] uint64, of what was read
    ) -> npt.NDArray[np.bool_]:
        """[rows] bool: whose payload is what was stored under this key and generation."""
        sealed = sums ^ seal(batch.keys[rows], generations)[:, None]
        found = self.arena.headers["checksum"][batch.slots[rows], self.rank, : sums.shape[1]]
        equal: npt.NDArray[np.bool_] = (found == sealed).all(axis=1)
        return equal

    def payload_nbytes(self, batches: Sequence[ChunkBatch]) -> int:
        """Payload of these chunks."""
        return sum(len(batch.slots) * self.sizes[batch.group] for batch in batches)


class Copier(ABC):
    """What moves chunks for one rank, whatever the device. Thread-safe: jobs on distinct slots and blocks may overlap."""

    def __init__(self, groups: Sequence[PagedTensors], arena: Slots, rank: int, blocks_per_chunk: int) -> None:
        self._arena = arena
        self.blocks_per_chunk = blocks_per_chunk
        self._parts = RankParts(groups, arena, rank, blocks_per_chunk)
        self._groups = self._parts.groups

    @property
    def num_blocks(self) -> int:
        """Blocks the engine has in every group."""
        return min(group.layout.num_blocks for group in self._groups)

    @abstractmethod
    def self_test(self) -> None:
        """Round trip of every group through its registered tensors. Raises LayoutError. Before the first request."""

    @abstractmethod
    def store(self, batches: Sequence[ChunkBatch]) -> Job:
        """Start writing chunks into reserved slots. Chunk i is WRITTEN for this rank when ok[i]."""

    @abstractmethod
    def load(self, batches: Sequence[ChunkBatch]) -> Job:
        """Start reading leased slots into blocks. Where not ok[i] the slot is BAD and the blocks hold nothing."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is under way and let threads and memory go."""

    def reject(self, slots: npt.NDArray[np.int64]) -> Job:
        """A load that cannot be done: its slots are marked BAD, so that nobody asks for them again."""
        self._arena.mark_bad(slots)
        job = Job(0, np.zeros(max(1, len(slots)), dtype=np.bool_))  # never an empty one: `all()` of nothing is True
        job.finished = job.started
        return job
