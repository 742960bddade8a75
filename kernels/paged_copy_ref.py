"""Reference for `paged_copy`: torch views and index_select, no cleverness. What every other backend is compared with.

    gather:   slot[chunk][plane][block] <- paged[plane][block_ids[chunk, block]]     and the checksum of each plane
    scatter:  the other way; the checksum is of the slot as read, absent blocks included

Slow on purpose: whatever is faster must give the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from .checksum import checksum
from .layout import Plane

if TYPE_CHECKING:
    from .paged_copy import PagedTensors


def _byte_view(tensor: torch.Tensor, plane: Plane, num_blocks: int) -> torch.Tensor:
    """[num_blocks, outer, inner, run] uint8 view of one plane, in slot order."""
    outer, stride_outer, inner, stride_inner, run = plane.runs
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    start = tensor.storage_offset() * tensor.element_size() + plane.offset
    shape, strides = (num_blocks, outer, inner, run), (plane.stride_block, stride_outer, stride_inner, 1)
    return storage.as_strided(shape, strides, start)


def gather_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32; -1: absent, its bytes become zeros
    slots: npt.NDArray[np.uint8],  # [num_slots, >= part_nbytes] uint8, rows contiguous
    slot_ids: npt.NDArray[np.int64],  # [n] int64, distinct rows of `slots`
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
) -> None:
    """Copy n chunks of blocks into slots. See `paged_copy.gather_chunks`."""
    offsets = paged.layout.plane_offsets(block_ids.shape[1])
    for p, plane in enumerate(paged.layout.planes):
        view = _byte_view(paged.tensors[plane.tensor], plane, paged.layout.num_blocks)
        for c, slot_id in enumerate(slot_ids):
            out = slots[slot_id, offsets[p] : offsets[p + 1]]
            out[:] = 0
            blocks = torch.from_numpy(out)[: block_ids.shape[1] * plane.block_nbytes].view(block_ids.shape[1], -1)
            present = torch.from_numpy(np.flatnonzero(block_ids[c] >= 0))
            ids = torch.from_numpy(block_ids[c][block_ids[c] >= 0].astype(np.int64))
            blocks[present] = view.index_select(0, ids.to(view.device)).reshape(len(ids), plane.block_nbytes).cpu()
            checksums[c, p] = checksum(out)


def scatter_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32; -1: leave the engine's block alone
    slots: npt.NDArray[np.uint8],  # [num_slots, >= part_nbytes] uint8, rows contiguous
    slot_ids: npt.NDArray[np.int64],  # [n] int64
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
) -> None:
    """Copy n chunks out of slots into blocks. See `paged_copy.scatter_chunks`."""
    offsets = paged.layout.plane_offsets(block_ids.shape[1])
    for p, plane in enumerate(paged.layout.planes):
        view = _byte_view(paged.tensors[plane.tensor], plane, paged.layout.num_blocks)
        for c, slot_id in enumerate(slot_ids):
            source = slots[slot_id, offsets[p] : offsets[p + 1]]
            blocks = torch.from_numpy(source)[: block_ids.shape[1] * plane.block_nbytes]
            blocks = blocks.view(block_ids.shape[1], *view.shape[1:])
            for i, block_id in enumerate(block_ids[c]):
                if block_id >= 0:
                    view[int(block_id)].copy_(blocks[i])
            checksums[c, p] = checksum(source)


def checksum_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32; -1: absent, counts as zeros
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
) -> None:
    """The checksums of a gather, by a gather. See `paged_copy.checksum_chunks`."""
    slots = np.empty((len(block_ids), paged.layout.part_nbytes(block_ids.shape[1])), dtype=np.uint8)
    gather_chunks(paged, block_ids, slots, np.arange(len(block_ids)), checksums)
