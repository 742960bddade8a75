"""The Triton copies behind the host interface of `paged_copy`: host arrays in, host arrays out, done when it returns.

    on a GPU:        ids up;  gather -> device rows -> slots,  or  slots -> device rows -> scatter;  checksums down
    interpreted:     everything is host memory already; the kernels run on it as it is

What proves the kernels and moves little. Who moves much keeps buffers and streams, and calls `paged_copy_triton` itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from .errors import LayoutError
from .target import require_device

if TYPE_CHECKING:
    from .paged_copy import PagedTensors


def check_device(device: str) -> None:
    """Raise LayoutError unless Triton can launch on tensors of this device."""
    if not device.startswith(able := require_device()):
        raise LayoutError(f"the tensors are on {device}; backend 'triton' copies those on {able} here")


def _to(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    writable = array if array.flags.writeable else array.copy()  # torch has no read-only tensors
    return torch.from_numpy(writable).to(device)


def gather_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32; -1: absent, its bytes become zeros
    slots: npt.NDArray[np.uint8],  # [num_slots, >= part_nbytes] uint8, rows contiguous
    slot_ids: npt.NDArray[np.int64],  # [n] int64, distinct rows of `slots`
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
) -> None:
    """See `paged_copy.gather_chunks`."""
    from . import paged_copy_triton

    if not len(slot_ids):
        return
    device = paged.tensors[0].device
    sums = torch.empty(checksums.shape, dtype=torch.uint64, device=device)
    if device.type == "cpu":
        rows, row_ids = torch.from_numpy(slots), _to(slot_ids, device)
    else:
        rows = torch.empty(
            (len(slot_ids), paged.layout.part_nbytes(block_ids.shape[1])), dtype=torch.uint8, device=device
        )
        row_ids = torch.arange(len(slot_ids), device=device)
    paged_copy_triton.gather_chunks(paged, _to(block_ids, device), rows, row_ids, sums)
    if device.type != "cpu":
        slots[slot_ids, : rows.shape[1]] = rows.cpu().numpy()
    checksums[:] = sums.cpu().numpy()


def scatter_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32; -1: the engine's block is left alone
    slots: npt.NDArray[np.uint8],  # [num_slots, >= part_nbytes] uint8, rows contiguous
    slot_ids: npt.NDArray[np.int64],  # [n] int64
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
) -> None:
    """See `paged_copy.scatter_chunks`."""
    from . import paged_copy_triton

    if not len(slot_ids):
        return
    device = paged.tensors[0].device
    sums = torch.empty(checksums.shape, dtype=torch.uint64, device=device)
    if device.type == "cpu":
        rows, row_ids = _to(slots, device), _to(slot_ids, device)
    else:
        rows = torch.from_numpy(slots[slot_ids, : paged.layout.part_nbytes(block_ids.shape[1])]).to(device)
        row_ids = torch.arange(len(slot_ids), device=device)
    paged_copy_triton.scatter_chunks(paged, _to(block_ids, device), rows, row_ids, sums)
    checksums[:] = sums.cpu().numpy()
