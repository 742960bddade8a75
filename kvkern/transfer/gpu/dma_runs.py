"""Lists what the copy engine moves, as (source, destination, size). Pure functions of layout, block ids and addresses.

    run (chunk, plane, block b of the chunk, outer o, inner i)
        page = base[plane] + block_ids[chunk, b] * stride_block + o * stride_outer + i * stride_inner
        slot = part[chunk] + plane_offset[plane] + b * block_nbytes + (o * inner + i) * run_nbytes

In slot order a run has only one successor, so one pass merges all runs that continue each other on both sides. The driver does
not merge runs, and a descriptor costs it as much as 26 KB on the wire (vLLM issue 48434).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...kernels.paged_tensors import PagedTensors


@dataclass(frozen=True, slots=True)
class Runs:
    """Copies of `nbytes[i]` bytes from address `src[i]` to address `dst[i]`, in any order. All [n] uint64."""

    dst: npt.NDArray[np.uint64]
    src: npt.NDArray[np.uint64]
    nbytes: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, dst: npt.ArrayLike, src: npt.ArrayLike, nbytes: npt.ArrayLike) -> Runs:
        """Make runs of addresses and sizes. Scalar addresses are one run; a scalar size is the size of every run."""
        to, from_ = (np.atleast_1d(np.asarray(a, dtype=np.uint64)) for a in (dst, src))
        return cls(to, from_, np.broadcast_to(np.asarray(nbytes, dtype=np.uint64), to.shape).copy())

    def __add__(self, other: Runs) -> Runs:
        pairs = ((self.dst, other.dst), (self.src, other.src), (self.nbytes, other.nbytes))
        return Runs(*(np.concatenate(pair) for pair in pairs))


@dataclass(frozen=True, slots=True)
class _ChunkTemplate:
    """The runs of any chunk in slot order, before its block ids and its slot are known. All [runs] int64."""

    block: npt.NDArray[np.int64]  # index of the block in the chunk
    page: npt.NDArray[np.int64]  # address if the block id were 0
    stride: npt.NDArray[np.int64]  # bytes from one block id to the next
    slot: npt.NDArray[np.int64]  # offset in the part
    nbytes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, paged: PagedTensors, blocks_per_chunk: int) -> _ChunkTemplate:
        rows = []
        offsets = paged.layout.plane_offsets(blocks_per_chunk)
        for plane, base, offset in zip(paged.layout.planes, paged.bases, offsets, strict=False):
            outer, stride_outer, inner, stride_inner, run = plane.runs
            block, o, i = (grid.ravel() for grid in np.indices((blocks_per_chunk, outer, inner)))
            columns = np.empty((5, len(block)), dtype=np.int64)
            columns[0] = block
            columns[1] = base + o * stride_outer + i * stride_inner
            columns[2] = plane.stride_block
            columns[3] = offset + block * plane.block_nbytes + (o * inner + i) * run
            columns[4] = run
            rows.append(columns)
        return cls(*np.concatenate(rows, axis=1))


def merged_runs(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32, none absent
    parts: npt.NDArray[np.int64],  # [n] int64, addresses of the chunks' parts
    to_slots: bool,
) -> Runs:
    """Return the fewest runs that move these chunks. They do not move the padding between planes: see `is_unpadded`."""
    per_chunk = block_ids.shape[1]
    t: _ChunkTemplate = paged.cached_plan(("dma", per_chunk), lambda: _ChunkTemplate.of(paged, per_chunk))
    pages = (t.page + block_ids[:, t.block].astype(np.int64) * t.stride).ravel()
    slots = (parts[:, None] + t.slot).ravel()
    nbytes = np.tile(t.nbytes, len(parts))
    if len(pages) == 0:
        return Runs.of([], [], [])
    breaks = (pages[1:] != pages[:-1] + nbytes[:-1]) | (slots[1:] != slots[:-1] + nbytes[:-1])
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    pages, slots, nbytes = pages[starts], slots[starts], np.add.reduceat(nbytes, starts)
    return Runs.of(slots, pages, nbytes) if to_slots else Runs.of(pages, slots, nbytes)


def count_runs(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32
) -> int:
    """Return how many runs `merged_runs` would give, without making them. Runs that join across planes count separately."""
    n, per_chunk = block_ids.shape
    neighbours = int((np.diff(block_ids.astype(np.int64), axis=1) == 1).sum())
    count = 0
    for plane in paged.layout.planes:
        outer, _, inner, _, run = plane.runs
        joined = neighbours if plane.stride_block == run == plane.block_nbytes else 0
        count += n * per_chunk * outer * inner - joined
    return count


def is_unpadded(paged: PagedTensors, blocks_per_chunk: int) -> bool:
    """Return True if the runs fill a whole part. If a plane ends in padding, DMA alone would leave its zeros unwritten."""
    sizes = sum(plane.block_nbytes for plane in paged.layout.planes) * blocks_per_chunk
    return sizes == paged.layout.part_nbytes(blocks_per_chunk)
