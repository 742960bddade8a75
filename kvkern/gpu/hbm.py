"""Copies for a cache over two tiers: each chunk to or from the tier that its slot is in. Knows copiers, not devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from ..errors import UnsupportedError
from ..transfer import ChunkBatch, Copier, Job

Part = tuple[Job, npt.NDArray[np.int64]]  # a job, and where its chunks are in the whole: [n] int64


def host_rows(
    count: int,
    stride: int,  # bytes
    device: torch.device,
) -> npt.NDArray[np.uint8]:  # [count, stride] uint8, zeros
    """Memory of the tensors' device for parts of slots. Raises UnsupportedError where the host cannot read it."""
    if device.type != "cpu":
        raise UnsupportedError(
            f"hbm with tensors on {device}: the tier's copies on a GPU are not there yet; leave hbm out, and the engine's own "
            f"prefix cache is the tier above DRAM"
        )
    rows: npt.NDArray[np.uint8] = torch.zeros((count, stride), dtype=torch.uint8, device=device).numpy()
    return rows


class JoinedJob(Job):
    """Several jobs as one. `ok` is put together anew at every reading."""

    def __init__(self, parts: Sequence[Part]) -> None:
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
        """When the last one ended."""
        return max(job.finished for job in self._jobs)

    def released(self) -> bool:
        """See Job."""
        return all(job.released() for job in self._jobs)

    def run_piece(self) -> bool:
        """See Job."""
        return any(job.run_piece() for job in self._jobs)


class StackedCopier(Copier):
    """Copies for one rank, whose slots from `first` on are HBM's."""

    def __init__(self, dram: Copier, hbm: Copier, first: int) -> None:
        self.blocks_per_chunk = dram.blocks_per_chunk
        self._dram, self._hbm, self._first = dram, hbm, first

    @property
    def num_blocks(self) -> int:
        """See Copier."""
        return self._dram.num_blocks

    def self_test(self) -> None:
        """See Copier. Both move the same tensors by the same kernels."""
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
        self._hbm.reject(slots[slots >= self._first] - self._first)
        self._dram.reject(slots[slots < self._first])
        job = Job(0, np.zeros(max(1, len(slots)), dtype=np.bool_))
        job.finished = job.started
        return job

    def close(self) -> None:
        """See Copier."""
        self._hbm.close()
        self._dram.close()

    def _split(
        self, batches: Sequence[ChunkBatch]
    ) -> tuple[tuple[list[ChunkBatch], npt.NDArray[np.int64]], tuple[list[ChunkBatch], npt.NDArray[np.int64]]]:
        """(DRAM's batches and their places in the whole, HBM's)."""
        parts: tuple[list[ChunkBatch], list[ChunkBatch]] = ([], [])
        places: tuple[list[npt.NDArray[np.int64]], ...] = ([], [])
        begin = 0
        for batch in batches:
            above = batch.slots >= self._first
            for tier, (mine, first) in enumerate(((~above, 0), (above, self._first))):
                parts[tier].append(_rows(batch, mine, first))
                places[tier].append(begin + np.flatnonzero(mine))
            begin += len(batch.slots)
        below, above_all = (np.concatenate([np.zeros(0, dtype=np.int64), *at]) for at in places)
        return (parts[0], below), (parts[1], above_all)


def _rows(batch: ChunkBatch, mine: npt.NDArray[np.bool_], first: int) -> ChunkBatch:
    """Those chunks of a batch, their slots counted from `first`. Loads give no generations."""
    return replace(
        batch,
        block_ids=np.ascontiguousarray(batch.block_ids[mine]),
        slots=batch.slots[mine] - first,
        generations=batch.generations[mine] if len(batch.generations) else batch.generations,
        keys=batch.keys[mine],
    )
