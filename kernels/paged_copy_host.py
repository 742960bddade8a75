"""The Triton copies behind the host interface of `paged_copy`: host arrays in, host arrays out, done when it returns.

    on a GPU:        upload ids;  gather -> device rows -> slots,  or  slots -> device rows -> scatter;  download checksums
    interpreted:     everything is in host memory, and the kernels run on it as it is

Tests and the self-test use this. It is slow, because it keeps no buffers and streams. The GPU transfer keeps both, and calls
`paged_copy_triton` itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .errors import LayoutError
from .paged_tensors import PagedTensors
from .target import require_triton_device


def check_device(device: str) -> None:
    """Raise LayoutError unless Triton can run on tensors of this device."""
    if not device.startswith(able := require_triton_device()):
        raise LayoutError(
            f"the tensors are on {device}, but backend 'triton' copies only tensors on {able} here: move them there"
        )


def _upload(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    writable = array if array.flags.writeable else array.copy()  # torch takes no read-only arrays
    return torch.from_numpy(writable).to(device)


def copy_chunks(
    to_slots: bool,  # True: gather, False: scatter
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32
    slots: npt.NDArray[np.uint8],  # [num_slots, >= part_nbytes] uint8
    slot_ids: npt.NDArray[np.int64],  # [n] int64
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
) -> None:
    """See `paged_copy.CopyBackend`."""
    from . import paged_copy_triton

    if not len(slot_ids):
        return
    device = paged.tensors[0].device
    part_nbytes = paged.layout.part_nbytes(block_ids.shape[1])
    sums = torch.empty(checksums.shape, dtype=torch.uint64, device=device)
    row_ids = torch.arange(len(slot_ids), device=device)
    if device.type == "cpu":
        rows, row_ids = torch.from_numpy(slots) if to_slots else _upload(slots, device), _upload(slot_ids, device)
    elif to_slots:
        rows = torch.empty((len(slot_ids), part_nbytes), dtype=torch.uint8, device=device)
    else:
        rows = _upload(slots[slot_ids, :part_nbytes], device)
    copy = paged_copy_triton.gather_chunks if to_slots else paged_copy_triton.scatter_chunks
    copy(paged, _upload(block_ids, device), rows, row_ids, sums)
    if to_slots and device.type != "cpu":
        slots[slot_ids, :part_nbytes] = rows.cpu().numpy()
    checksums[:] = sums.cpu().numpy()


def checksum_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
) -> None:
    """See `paged_copy.CopyBackend`."""
    from . import paged_copy_triton

    if not len(block_ids):
        return
    device = paged.tensors[0].device
    sums = torch.empty(checksums.shape, dtype=torch.uint64, device=device)
    paged_copy_triton.checksum_chunks(paged, _upload(block_ids, device), sums)
    checksums[:] = sums.cpu().numpy()
