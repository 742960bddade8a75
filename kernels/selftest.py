"""Self-test of a layout: copies random blocks out and back through the registered tensors, and compares.

The engine's view of a block comes from `layout.plane_views` (tensor indexing). The layout's view comes from the strided
formula and the production copy. Both must agree on every byte, and the blocks beside the tested ones must not change.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .errors import LayoutError
from .layout import Plane, plane_views
from .paged_copy import Backend, checksum_chunks, gather_chunks, scatter_chunks
from .paged_tensors import PagedTensors


def _block_bytes(view: torch.Tensor, plane: Plane, block: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of one block of a plane in slot order, read by tensor indexing."""
    data = view[block].transpose(0, 1) if plane.head_major else view[block]
    return data.contiguous().cpu().view(torch.uint8).numpy().reshape(-1)


def check_round_trip(
    paged: PagedTensors,
    blocks_per_chunk: int = 1,
    backend: Backend = "numba",
) -> None:
    """Raise LayoutError unless blocks come back from a slot unchanged, with equal checksums of gather, scatter and sum alone.

    Call this before the engine computes: it overwrites up to `blocks_per_chunk + 2` blocks at both ends of the cache, and then
    restores them. It also makes the backend compile everything it needs for this layout and chunk size.
    """
    layout = paged.layout
    views = plane_views(layout.name, paged.tensors, layout.block_tokens)
    if len(views) != len(layout.planes):
        raise LayoutError(
            f"layout {layout.name!r} has {len(layout.planes)} planes, but its tensors make {len(views)} planes: "
            f"pass the tensors that the layout was made from"
        )
    count = min(blocks_per_chunk, layout.num_blocks)
    tested = np.array([layout.num_blocks - 1, *range(count - 1)][:count], dtype=np.int32)
    watched = sorted(
        {0, 1, layout.num_blocks // 2, layout.num_blocks - 1, *map(int, tested)} & set(range(layout.num_blocks))
    )
    saved = [[view[b].clone() for b in watched] for view in views]
    try:
        _compare_copies(paged, views, tested, watched, blocks_per_chunk, backend)
    finally:
        for view, blocks in zip(views, saved, strict=True):
            for block, data in zip(watched, blocks, strict=True):
                view[block].copy_(data)


def _fill_with_noise(views: list[torch.Tensor], blocks: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for view in views:
        for block in blocks:
            shape = (*view[block].shape[:-1], view.shape[-1] * view.element_size())
            noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            view[block].copy_(noise.view(view.dtype).to(view.device))


def _snapshot(paged: PagedTensors, views: list[torch.Tensor], blocks: list[int]) -> list[npt.NDArray[np.uint8]]:
    pairs = zip(views, paged.layout.planes, strict=True)
    return [np.stack([_block_bytes(view, plane, b) for b in blocks]) for view, plane in pairs]


def _compare_copies(
    paged: PagedTensors,
    views: list[torch.Tensor],
    tested: npt.NDArray[np.int32],
    watched: list[int],
    blocks_per_chunk: int,
    backend: Backend,
) -> None:
    layout = paged.layout
    block_ids = np.full((1, blocks_per_chunk), -1, dtype=np.int32)
    block_ids[0, : len(tested)] = tested
    offsets = layout.plane_offsets(blocks_per_chunk)
    slot = np.zeros((1, int(offsets[-1])), dtype=np.uint8)
    out, back, alone = np.zeros((3, 1, len(layout.planes)), dtype=np.uint64)  # checksums
    slot_ids = np.zeros(1, dtype=np.int64)
    _fill_with_noise(views, watched, seed=1)
    before = _snapshot(paged, views, watched)
    gather_chunks(paged, block_ids, slot, slot_ids, out, backend)
    checksum_chunks(paged, block_ids, alone, backend)
    for p, plane in enumerate(layout.planes):
        want = np.concatenate([before[p][watched.index(int(b))] for b in tested])
        if not np.array_equal(slot[0, offsets[p] : offsets[p] + len(want)], want):
            raise LayoutError(f"layout {layout.name!r} does not round-trip: plane {p} ({plane}) reads other bytes than the "
                              f"engine's tensor holds. Check strides and the order of heads and tokens")  # fmt: skip
    _fill_with_noise(views, [int(b) for b in tested], seed=2)
    scatter_chunks(paged, block_ids, slot, slot_ids, back, backend)
    for p, (was, now) in enumerate(zip(before, _snapshot(paged, views, watched), strict=True)):
        if not np.array_equal(was, now):
            raise LayoutError(f"layout {layout.name!r} does not round-trip: plane {p} ({layout.planes[p]}) writes other bytes "
                              f"than it read. Check strides and the order of heads and tokens")  # fmt: skip
    if not (np.array_equal(out, back) and np.array_equal(out, alone)):
        raise LayoutError(
            f"layout {layout.name!r} does not round-trip: checksums differ: {out} by gather, {back} by scatter, {alone} "
            f"by checksum_chunks. The kernels of backend {backend!r} or the memory are faulty: "
            f"try another backend, and report this"
        )
