"""Reference of `paged_copy`: torch views and index_select. Every other backend is compared with it.

    gather:   slot[chunk][plane][block] <- paged[plane][block_ids[chunk, block]]     and the checksum of each plane
    scatter:  the other way; the checksum covers the whole slot as read, absent blocks included

Slow on purpose. Faster backends must give the same bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .checksum import checksum
from .layout import Plane
from .paged_tensors import PagedTensors


def _byte_view(tensor: torch.Tensor, plane: Plane, num_blocks: int) -> torch.Tensor:
    """Return a [num_blocks, outer, inner, run] uint8 view of one plane, in slot order."""
    outer, stride_outer, inner, stride_inner, run = plane.runs
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    start = tensor.storage_offset() * tensor.element_size() + plane.offset
    shape, strides = (num_blocks, outer, inner, run), (plane.stride_block, stride_outer, stride_inner, 1)
    return storage.as_strided(shape, strides, start)


def copy_chunks(
    to_slots: bool,  # True: gather, False: scatter
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32
    slots: npt.NDArray[np.uint8],  # [num_slots, >= part_nbytes] uint8
    slot_ids: npt.NDArray[np.int64],  # [n] int64
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
) -> None:
    """See `paged_copy.CopyBackend`."""
    blocks_per_chunk = block_ids.shape[1]
    offsets = paged.layout.plane_offsets(blocks_per_chunk)
    for p, plane in enumerate(paged.layout.planes):
        view = _byte_view(paged.tensors[plane.tensor], plane, paged.layout.num_blocks)
        for c, slot_id in enumerate(slot_ids):
            memory = slots[slot_id, offsets[p] : offsets[p + 1]]
            blocks = torch.from_numpy(memory)[: blocks_per_chunk * plane.block_nbytes]
            if to_slots:
                memory[:] = 0
                _gather(view, block_ids[c], blocks.view(blocks_per_chunk, -1))
            else:
                _scatter(blocks.view(blocks_per_chunk, *view.shape[1:]), block_ids[c], view)
            checksums[c, p] = checksum(memory)


def _gather(view: torch.Tensor, block_ids: npt.NDArray[np.int32], blocks: torch.Tensor) -> None:
    present = block_ids >= 0
    ids = torch.from_numpy(block_ids[present].astype(np.int64))
    found = view.index_select(0, ids.to(view.device)).reshape(len(ids), blocks.shape[1])
    blocks[torch.from_numpy(np.flatnonzero(present))] = found.cpu()


def _scatter(blocks: torch.Tensor, block_ids: npt.NDArray[np.int32], view: torch.Tensor) -> None:
    for i, block_id in enumerate(block_ids):
        if block_id >= 0:
            view[int(block_id)].copy_(blocks[i])


def checksum_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
) -> None:
    """See `paged_copy.CopyBackend`. This is a gather that throws its bytes away."""
    slots = np.empty((len(block_ids), paged.layout.part_nbytes(block_ids.shape[1])), dtype=np.uint8)
    copy_chunks(True, paged, block_ids, slots, np.arange(len(block_ids)), checksums)
