"""Moves chunks between one rank's paged tensors in host memory and its parts of the arena's slots. Beyond it a chunk is bytes.

A job is cut into pieces of whole chunks. The copier's own threads run the pieces without the GIL. A caller with nothing else
to do may run pieces too (`Job.run_unclaimed`). The steps of a store and a load, and the duties of the caller, are in base.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from ..arena.file import Slots
from ..kernels.paged_copy import gather_chunks, scatter_chunks
from ..kernels.paged_tensors import PagedTensors
from ..kernels.selftest import check_round_trip
from ..kernels.warm import compile_cpu_kernels
from .base import ChunkBatch, Copier, Job
from .nvtx import span

_MIN_PIECE_NBYTES, _MAX_PIECE_NBYTES = (
    4 << 20,
    32 << 20,
)  # each piece costs Python time: at 8 MiB a tenth of the copy's time


def chunks_per_piece(
    job_nbytes: int,
    chunk_nbytes: int,
    threads: int,
) -> int:
    """Return the chunks of a piece. Each thread gets two pieces, of 4 MiB to 32 MiB each as far as whole chunks allow."""
    nbytes = max(_MIN_PIECE_NBYTES, min(job_nbytes // (2 * threads), _MAX_PIECE_NBYTES))
    return max(1, nbytes // max(1, chunk_nbytes))


class HostCopier(Copier):
    """Copies in host memory, on its own threads."""

    def __init__(
        self,
        groups: Sequence[PagedTensors],
        arena: Slots,
        rank: int,
        blocks_per_chunk: int,
        threads: int,
    ) -> None:
        super().__init__(groups, arena, rank, blocks_per_chunk)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvkern-copy")
        compile_cpu_kernels()

    def self_test(self) -> None:
        """See `Copier.self_test`."""
        for group in self._groups:
            check_round_trip(group, self.blocks_per_chunk)

    def store(self, batches: Sequence[ChunkBatch]) -> Job:
        """See `Copier.store`."""
        return self._submit(batches, self._store_piece)

    def load(self, batches: Sequence[ChunkBatch]) -> Job:
        """See `Copier.load`."""
        return self._submit(batches, self._load_piece)

    def close(self) -> None:
        """Wait for running pieces and end the threads."""
        self._pool.shutdown(wait=True)

    def _submit(self, batches: Sequence[ChunkBatch], piece) -> Job:  # type: ignore[no-untyped-def]
        chunks = [len(batch.slots) for batch in batches]
        nbytes = self._parts.payload_nbytes(batches)
        job = Job(nbytes, np.zeros(sum(chunks), dtype=np.bool_))
        begin = 0
        for batch, count in zip(batches, chunks, strict=True):
            step = chunks_per_piece(nbytes, self._parts.sizes[batch.group], self._threads)
            for at in range(0, count, step):
                rows = slice(at, min(at + step, count))
                ok = job.ok[begin + rows.start : begin + rows.stop]
                job.unclaimed.append((Future(), partial(piece, batch, rows, ok)))
            begin += count
        job.futures += [future for future, _ in job.unclaimed]
        if not job.futures:
            job.finished = job.started
        try:
            for _ in job.futures:
                self._pool.submit(job.run_piece)
        except RuntimeError as error:  # the copier is closed, or Python shuts down
            job.fail_unclaimed(error)
        return job

    def _store_piece(self, batch: ChunkBatch, rows: slice, ok: npt.NDArray[np.bool_]) -> None:
        with span("kvkern store"):
            group = self._groups[batch.group]
            current = self._parts.writable(batch, rows)
            mine = np.flatnonzero(current) + rows.start
            sums = np.empty((len(mine), len(group.layout.planes)), dtype=np.uint64)
            gather_chunks(group, batch.block_ids[mine], self._parts.rows, batch.slots[mine], sums)
            self._parts.publish(batch, mine, sums)
            ok[:] = current

    def _load_piece(self, batch: ChunkBatch, rows: slice, ok: npt.NDArray[np.bool_]) -> None:
        try:
            with span("kvkern load"):
                ok[:] = self._scatter_verified(batch, rows)
        finally:
            self._arena.mark_bad(
                batch.slots[rows][~ok]
            )  # also after an exception: a retry must not read these slots again

    def _scatter_verified(self, batch: ChunkBatch, rows: slice) -> npt.NDArray[np.bool_]:
        """Scatter these slots into their blocks. Returns [rows] bool: True where header and payload verify."""
        group, slots = self._groups[batch.group], batch.slots[rows]
        sums = np.empty((len(slots), len(group.layout.planes)), dtype=np.uint64)
        good, generations = self._parts.readable(batch, rows)
        read = np.where(good[:, None], batch.block_ids[rows], np.int32(-1))  # a slot of another chunk reaches no block
        scatter_chunks(group, np.ascontiguousarray(read), self._parts.rows, slots, sums)
        return good & self._parts.verified(batch, rows, generations, sums)
