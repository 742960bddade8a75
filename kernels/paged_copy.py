"""Copies of paged blocks to and from contiguous slots, with the payload checksum fused in.

This module checks the arguments once; the backends check nothing again. It knows layouts, tensors and byte slots, and nothing
of keys, tiers or engines. Backends: `numba` (CPU production), `triton` (GPU), and `ref` (torch), the reference of the tests.
All compute the same bytes and the same checksums.
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
    """A backend module. `gather_chunks`, `scatter_chunks` and `checksum_chunks` below have already checked its arguments."""

    def copy_chunks(
        self,
        to_slots: bool,  # True: gather, False: scatter
        paged: PagedTensors,
        block_ids: npt.NDArray[np.int32],
        slots: npt.NDArray[np.uint8],
        slot_ids: npt.NDArray[np.int64],
        checksums: npt.NDArray[np.uint64],
    ) -> None:
        """Copy every chunk and compute the checksum of each plane."""

    def checksum_chunks(
        self, paged: PagedTensors, block_ids: npt.NDArray[np.int32], checksums: npt.NDArray[np.uint64]
    ) -> None:
        """Compute the checksums of a gather, without the copy."""


def _check_blocks_and_checksums(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],
    checksums: npt.NDArray[np.uint64],
) -> None:
    if block_ids.ndim != 2 or block_ids.dtype != np.int32 or not block_ids.flags.c_contiguous:
        raise LayoutError(
            f"block_ids is {block_ids.dtype} {block_ids.shape}, expected contiguous int32 [chunks, blocks_per_chunk]"
        )
    n, blocks_per_chunk = block_ids.shape
    if blocks_per_chunk < 1:
        raise LayoutError(
            f"block_ids is {block_ids.shape}, but a chunk has at least one block: use blocks_per_chunk >= 1"
        )
    planes = len(paged.layout.planes)
    if checksums.shape != (n, planes) or checksums.dtype != np.uint64 or not checksums.flags.c_contiguous:
        raise LayoutError(
            f"checksums is {checksums.dtype} {checksums.shape}, expected contiguous uint64 ({n}, {planes})"
        )
    if n and (int(block_ids.max()) >= paged.layout.num_blocks or int(block_ids.min()) < -1):
        bad = int(block_ids.max()) if int(block_ids.max()) >= paged.layout.num_blocks else int(block_ids.min())
        raise LayoutError(
            f"block id {bad} is outside [-1, {paged.layout.num_blocks}): pass ids of this layout's blocks, or -1 for none"
        )


def _check_copy(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],
    slots: npt.NDArray[np.uint8],
    slot_ids: npt.NDArray[np.int64],
    checksums: npt.NDArray[np.uint64],
) -> None:
    _check_blocks_and_checksums(paged, block_ids, checksums)
    n, blocks_per_chunk = block_ids.shape
    if slot_ids.shape != (n,) or slot_ids.dtype != np.int64 or not slot_ids.flags.c_contiguous:
        raise LayoutError(f"slot_ids is {slot_ids.dtype} {slot_ids.shape}, expected contiguous int64 ({n},)")
    part_nbytes = paged.cached_plan(
        ("part_nbytes", blocks_per_chunk), lambda: paged.layout.part_nbytes(blocks_per_chunk)
    )
    if slots.ndim != 2 or slots.dtype != np.uint8 or slots.shape[1] < part_nbytes or slots.strides[1] != 1:
        raise LayoutError(
            f"slots is {slots.dtype} {slots.shape}, expected uint8 [num_slots, >= {part_nbytes}] with contiguous rows"
        )
    if n and (int(slot_ids.max()) >= slots.shape[0] or int(slot_ids.min()) < 0):
        raise LayoutError(
            f"slot ids {slot_ids.min()}..{slot_ids.max()} are outside [0, {slots.shape[0]}): pass rows of `slots`"
        )


def gather_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[
        np.int32
    ],  # [n, blocks_per_chunk] int32; -1: absent block, its bytes in the slot become zeros
    slots: npt.NDArray[np.uint8],  # [num_slots, >= part_nbytes] uint8, rows contiguous; see `Arena.parts`
    slot_ids: npt.NDArray[np.int64],  # [n] int64, distinct rows of `slots`
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
    backend: Backend = "numba",
) -> None:
    """Copy n chunks of paged blocks into slots and compute the checksum of each plane.

    Writes exactly `part_nbytes` of each named slot, padding included. Returns when the bytes are visible to every
    thread and process. The numba backend releases the GIL. Raises LayoutError on any mismatch, before a byte is written.
    """
    _check_copy(paged, block_ids, slots, slot_ids, checksums)
    _load_backend(backend, paged).copy_chunks(True, paged, block_ids, slots, slot_ids, checksums)


def scatter_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32; -1: absent block, nothing is written for it
    slots: npt.NDArray[np.uint8],  # [num_slots, >= part_nbytes] uint8, rows contiguous
    slot_ids: npt.NDArray[np.int64],  # [n] int64
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64, of the bytes that were read
    backend: Backend = "numba",
) -> None:
    """Copy n chunks out of slots into paged blocks and compute the checksum of the bytes that were read.

    The checksum covers whole planes, absent blocks included. The blocks are written before the checksum is known: treat them
    as garbage until you have compared it. Raises LayoutError on any mismatch, before a byte is written.
    """
    _check_copy(paged, block_ids, slots, slot_ids, checksums)
    _load_backend(backend, paged).copy_chunks(False, paged, block_ids, slots, slot_ids, checksums)


def checksum_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32; -1: absent block, counts as zeros
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
    backend: Backend = "numba",
) -> None:
    """Compute the checksums that `gather_chunks` would give, without moving a byte. Reads each block once.

    Use this for blocks that DMA moves. If blocks are absent, `scatter_chunks` gives another checksum: it covers the whole slot.
    Raises LayoutError on any mismatch.
    """
    _check_blocks_and_checksums(paged, block_ids, checksums)
    _load_backend(backend, paged).checksum_chunks(paged, block_ids, checksums)


def _load_backend(name: Backend, paged: PagedTensors) -> CopyBackend:
    if name == "numba":
        if paged.device != "cpu":
            raise LayoutError(
                f"the tensors are on {paged.device}, but backend 'numba' copies host memory only: use backend 'triton'"
            )
        from . import paged_copy_numba

        return paged_copy_numba
    if name == "triton":
        from . import paged_copy_host

        paged_copy_host.check_device(paged.device)
        return paged_copy_host
    if name == "ref":
        from . import paged_copy_ref

        return paged_copy_ref
    raise LayoutError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}. Use one of these")
