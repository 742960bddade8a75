"""Paged blocks to and from contiguous slots, with the payload checksum fused in. Checks once; the backends assume.

Knows layouts, tensors and byte slots; knows nothing of keys, tiers or engines. Backends: `numba` (CPU production), `triton`
(GPU), `ref` (torch; what the others are compared with). All compute the same bytes and the same checksums.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from .errors import LayoutError
from .paged_tensors import PagedTensors

Backend = Literal["numba", "triton", "ref"]
BACKENDS: tuple[Backend, ...] = ("numba", "triton", "ref")


class CopyBackend(Protocol):
    """A module that copies and sums. Its arguments are checked already; see `gather_chunks` and `scatter_chunks`."""

    def copy_chunks(
        self,
        to_slots: bool,  # gather, else scatter
        paged: PagedTensors,
        block_ids: npt.NDArray[np.int32],
        slots: npt.NDArray[np.uint8],
        slot_ids: npt.NDArray[np.int64],
        checksums: npt.NDArray[np.uint64],
    ) -> None:
        """Copy every chunk and checksum each plane of it."""

    def checksum_chunks(
        self, paged: PagedTensors, block_ids: npt.NDArray[np.int32], checksums: npt.NDArray[np.uint64]
    ) -> None:
        """The checksums of a gather, without the copy."""


def _check_blocks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],
    checksums: npt.NDArray[np.uint64],
) -> None:
    if block_ids.ndim != 2 or block_ids.dtype != np.int32 or not block_ids.flags.c_contiguous:
        raise LayoutError(
            f"block_ids is {block_ids.dtype} {block_ids.shape}, expected int32 [chunks, blocks_per_chunk]"
        )
    n, blocks_per_chunk = block_ids.shape
    if blocks_per_chunk < 1:
        raise LayoutError(f"block_ids is {block_ids.shape}: a chunk has at least one block")
    planes = len(paged.layout.planes)
    if checksums.shape != (n, planes) or checksums.dtype != np.uint64 or not checksums.flags.c_contiguous:
        raise LayoutError(f"checksums is {checksums.dtype} {checksums.shape}, expected uint64 ({n}, {planes})")
    if n and (int(block_ids.max()) >= paged.layout.num_blocks or int(block_ids.min()) < -1):
        bad = int(block_ids.max()) if int(block_ids.max()) >= paged.layout.num_blocks else int(block_ids.min())
        raise LayoutError(f"block id {bad} is outside [-1, {paged.layout.num_blocks})")


def _check(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],
    slots: npt.NDArray[np.uint8],
    slot_ids: npt.NDArray[np.int64],
    checksums: npt.NDArray[np.uint64],
) -> None:
    _check_blocks(paged, block_ids, checksums)
    n, blocks_per_chunk = block_ids.shape
    if slot_ids.shape != (n,) or slot_ids.dtype != np.int64 or not slot_ids.flags.c_contiguous:
        raise LayoutError(f"slot_ids is {slot_ids.dtype} {slot_ids.shape}, expected int64 ({n},)")
    part_nbytes = paged.plan(("part_nbytes", blocks_per_chunk), lambda: paged.layout.part_nbytes(blocks_per_chunk))
    if slots.ndim != 2 or slots.dtype != np.uint8 or slots.shape[1] < part_nbytes or slots.strides[1] != 1:
        raise LayoutError(f"slots is {slots.dtype} {slots.shape}, expected uint8 [num_slots, >= {part_nbytes}]")
    if n and (int(slot_ids.max()) >= slots.shape[0] or int(slot_ids.min()) < 0):
        raise LayoutError(f"slot ids {slot_ids.min()}..{slot_ids.max()} are outside [0, {slots.shape[0]})")


def gather_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32; -1: absent, its bytes become zeros
    slots: npt.NDArray[np.uint8],  # [num_slots, >= part_nbytes] uint8, rows contiguous; see `Arena.parts`
    slot_ids: npt.NDArray[np.int64],  # [n] int64, distinct rows of `slots`
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
    backend: Backend = "numba",
) -> None:
    """Copy n chunks of paged blocks into slots and checksum each plane.

    Writes exactly `part_nbytes` of each named slot, padding included. Returns when the bytes are visible to every
    thread and process. Releases the GIL (numba). Raises LayoutError on any mismatch, before a byte is written.
    """
    _check(paged, block_ids, slots, slot_ids, checksums)
    _backend(backend, paged).copy_chunks(True, paged, block_ids, slots, slot_ids, checksums)


def scatter_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32; -1: the engine's block is left alone
    slots: npt.NDArray[np.uint8],  # [num_slots, >= part_nbytes] uint8, rows contiguous
    slot_ids: npt.NDArray[np.int64],  # [n] int64
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64, of what was read
    backend: Backend = "numba",
) -> None:
    """Copy n chunks out of slots into paged blocks and checksum what was read, whole planes even of partial chunks.

    The blocks are written before the checksum can be judged: until the caller has compared it, the blocks hold nothing.
    """
    _check(paged, block_ids, slots, slot_ids, checksums)
    _backend(backend, paged).copy_chunks(False, paged, block_ids, slots, slot_ids, checksums)


def checksum_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32; -1: absent, counts as zeros
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
    backend: Backend = "numba",
) -> None:
    """The checksums that `gather_chunks` would give, without moving anything: each block is read once.

    For blocks that DMA moves. Of a scatter with absent blocks it is not the checksum: that one covers the whole slot.
    """
    _check_blocks(paged, block_ids, checksums)
    _backend(backend, paged).checksum_chunks(paged, block_ids, checksums)


def _backend(name: Backend, paged: PagedTensors) -> CopyBackend:
    if name == "numba":
        if paged.device != "cpu":
            raise LayoutError(f"the tensors are on {paged.device}; the numba backend copies host memory only")
        from . import paged_copy_numba

        return paged_copy_numba
    if name == "triton":
        from . import paged_copy_host

        paged_copy_host.check_device(paged.device)
        return paged_copy_host
    if name == "ref":
        from . import paged_copy_ref

        return paged_copy_ref
    raise LayoutError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
