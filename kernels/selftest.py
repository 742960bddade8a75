"""Self-test of a layout: proves the claim by arithmetic, and the copies on spare tensors. The engine's blocks are only read.

    1. planes of the layout  ==  planes of the tensors' own indexing (`plane_views`)           no byte moves
    2. spare tensors with the same order of dimensions, filled with noise: gather, overwrite, scatter
                               every byte equals what tensor indexing shows, every other byte stays
    3. the engine's tensors:   gather the last block, and compare; scatter a chunk that has no blocks

An engine may compute meanwhile. Step 3 reads blocks that the engine may be writing, so it counts a difference only if
the bytes stood still. It makes the backend compile what it needs for these tensors, and shows addresses that are wrong
only far away from block 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .errors import LayoutError
from .layout import PagedLayout, Plane, layout_of_views, plane_views
from .paged_copy import Backend, checksum_chunks, gather_chunks, scatter_chunks
from .paged_tensors import PagedTensors

_ALIGNMENT = 64  # spare tensors begin at the same offset from a multiple of it as the engine's
_MAX_GAP_NBYTES = (
    4096  # unused bytes between two steps of a dimension; larger gaps are cut, so that spare memory is small
)
_READS = 3  # a difference in the engine's own blocks counts if so many reads in a row show it


def check_round_trip(
    paged: PagedTensors,
    blocks_per_chunk: int = 1,
    backend: Backend = "numba",
) -> None:
    """Raise LayoutError unless the layout fits the tensors, and blocks come back from a slot unchanged with equal checksums.

    Writes to no byte of the tensors, so an engine may use them meanwhile. Takes spare memory on the tensors' device: three
    times the bytes of `blocks_per_chunk + 2` blocks. Afterwards the backend has compiled everything that it needs for this
    layout and chunk size.
    """
    views = plane_views(paged.layout.name, paged.tensors, paged.layout.block_tokens)
    _check_claim(paged, views)
    spare, storages = _spare_tensors(paged, blocks_per_chunk + 2)
    _compare_copies(spare, storages, blocks_per_chunk, backend)
    _check_addresses(paged, views, blocks_per_chunk, backend)


# -- 1. the claim ----------------------------------------------------------------------------------------------------------


def _check_claim(paged: PagedTensors, views: list[torch.Tensor]) -> None:
    layout = paged.layout
    if len(views) != len(layout.planes):
        raise LayoutError(
            f"layout {layout.name!r} has {len(layout.planes)} planes, but its tensors make {len(views)} planes: "
            f"pass the tensors that the layout was made from"
        )
    if not np.array_equal(paged.bases, layout.bases(paged.tensors)):
        raise LayoutError(
            f"layout {layout.name!r} does not describe the tensors: it is bound to the addresses of other tensors, or the "
            f"tensors have moved. Bind it anew"
        )
    true = layout_of_views(layout.name, paged.tensors, views, layout.block_tokens)
    if layout.num_blocks > true.num_blocks:
        raise LayoutError(
            f"layout {layout.name!r} has {layout.num_blocks} blocks, but the tensors have {true.num_blocks}: pass the tensors "
            f"that the layout was made from"
        )
    for p, (claimed, found) in enumerate(zip(layout.planes, true.planes, strict=True)):
        if _address_terms(claimed) != _address_terms(found):
            raise LayoutError(f"layout {layout.name!r} does not describe the tensors: plane {p} is {claimed}, but the tensors "
                              f"have {found}. Make the layout from these tensors, in the same order")  # fmt: skip
        if _overlaps(found, layout.num_blocks):
            raise LayoutError(
                f"plane {p} of layout {layout.name!r} puts several blocks, tokens or heads into the same bytes ({found}): pass "
                f"tensors whose elements do not overlap"
            )


def _address_terms(plane: Plane) -> tuple[int, ...]:
    """Return what decides the plane's addresses. The stride of a dimension of one step decides nothing."""
    strides = (plane.stride_token * (plane.num_tokens > 1), plane.stride_head * (plane.num_heads > 1))
    sizes = (plane.num_tokens, plane.num_heads, plane.head_nbytes)
    return plane.tensor, plane.offset, plane.stride_block, *strides, *sizes


def _overlaps(plane: Plane, num_blocks: int) -> bool:
    steps = (
        (plane.stride_block, num_blocks),
        (plane.stride_token, plane.num_tokens),
        (plane.stride_head, plane.num_heads),
    )
    extent = plane.head_nbytes
    for stride, count in sorted(step for step in steps if step[1] > 1):
        if stride < extent:
            return True
        extent += (count - 1) * stride
    return False


# -- 2. the copies, on spare tensors -----------------------------------------------------------------------------------------


def _spare_tensors(paged: PagedTensors, num_blocks: int) -> tuple[PagedTensors, list[torch.Tensor]]:
    """Return tensors of `num_blocks` blocks that are laid out like the engine's, and the uint8 storages behind them."""
    layout = paged.layout
    tensors, storages = [], []
    for tensor in paged.tensors:
        shape, stride = _spare_shape(tensor, layout, num_blocks)
        size = tensor.element_size()
        nbytes = (1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))) * size
        storage = torch.empty(nbytes + 2 * _ALIGNMENT, dtype=torch.uint8, device=tensor.device)
        shift = (tensor.data_ptr() - storage.data_ptr()) % _ALIGNMENT
        tensors.append(storage[shift : shift + nbytes].view(tensor.dtype).as_strided(shape, stride, shift // size))
        storages.append(storage)
    views = plane_views(layout.name, tensors, layout.block_tokens)
    return PagedTensors.bind(layout_of_views(layout.name, tensors, views, layout.block_tokens), tensors), storages


def _spare_shape(tensor: torch.Tensor, layout: PagedLayout, num_blocks: int) -> tuple[list[int], list[int]]:
    """Return shape and strides, in elements, of a spare tensor: fewer blocks, the same order of dimensions."""
    shape, stride = list(tensor.shape), list(tensor.stride())
    block_dim = 1 if layout.name == "flash_attention" else 0
    shape[block_dim] = num_blocks * (layout.block_tokens if layout.name == "token_pool" else 1)
    was = extent = 1  # elements of one step of the dimension, in the engine's tensor and in the spare one
    for dim in sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim])):
        gap, most = max(0, tensor.stride(dim) - was), _MAX_GAP_NBYTES // tensor.element_size()
        stride[dim] = extent + (gap if gap <= most else most + gap % _ALIGNMENT)
        was, extent = tensor.stride(dim) * tensor.shape[dim], stride[dim] * shape[dim]
    return shape, stride


def _fill_with_noise(target: torch.Tensor, seed: int) -> None:
    """Overwrite a tensor with random bytes. Its last dimension must be contiguous."""
    shape = (*target.shape[:-1], target.shape[-1] * target.element_size())
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    target.copy_(noise.view(target.dtype).to(target.device))


def _block_bytes(view: torch.Tensor, plane: Plane, block: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of one block of a plane in slot order, read by tensor indexing."""
    data = view[block].transpose(0, 1) if plane.head_major else view[block]
    return data.contiguous().cpu().view(torch.uint8).numpy().reshape(-1)


def _compare_copies(paged: PagedTensors, storages: list[torch.Tensor], blocks_per_chunk: int, backend: Backend) -> None:
    layout = paged.layout
    views = plane_views(layout.name, paged.tensors, layout.block_tokens)
    tested = [layout.num_blocks - 1, *range(blocks_per_chunk - 1)]
    block_ids = np.array([tested], dtype=np.int32)
    offsets = layout.plane_offsets(blocks_per_chunk)
    slot = np.zeros((1, int(offsets[-1])), dtype=np.uint8)
    out, back, alone = np.zeros((3, 1, len(layout.planes)), dtype=np.uint64)  # checksums
    slot_ids = np.zeros(1, dtype=np.int64)
    for i, storage in enumerate(storages):
        _fill_with_noise(storage, seed=i)
    before = [storage.clone() for storage in storages]
    nothing = np.full_like(block_ids, -1)
    scatter_chunks(paged, nothing, slot, slot_ids, back, backend)  # a chunk without blocks: it must write nothing
    _check_unchanged(layout, before, storages, backend)
    gather_chunks(paged, block_ids, slot, slot_ids, out, backend)
    checksum_chunks(paged, block_ids, alone, backend)
    for p, (plane, view) in enumerate(zip(layout.planes, views, strict=True)):
        want = np.concatenate([_block_bytes(view, plane, block) for block in tested])
        if not np.array_equal(slot[0, offsets[p] : offsets[p] + len(want)], want):
            raise LayoutError(f"layout {layout.name!r} does not round-trip: plane {p} ({plane}) reads other bytes than the "
                              f"spare tensors hold. The kernels of backend {backend!r} are faulty: report this")  # fmt: skip
    for i, view in enumerate(views):
        for block in tested:
            _fill_with_noise(view[block], seed=len(storages) + i)
    scatter_chunks(paged, block_ids, slot, slot_ids, back, backend)
    _check_unchanged(layout, before, storages, backend)
    if not (np.array_equal(out, back) and np.array_equal(out, alone)):
        raise LayoutError(
            f"layout {layout.name!r} does not round-trip: checksums differ: {out} by gather, {back} by scatter, {alone} "
            f"by checksum_chunks. The kernels of backend {backend!r} or the memory are faulty: "
            f"try another backend, and report this"
        )


def _check_unchanged(
    layout: PagedLayout, before: list[torch.Tensor], storages: list[torch.Tensor], backend: Backend
) -> None:
    if not all(torch.equal(was, now) for was, now in zip(before, storages, strict=True)):
        raise LayoutError(
            f"layout {layout.name!r} does not round-trip: a scatter wrote other bytes than the gather had read, or other "
            f"blocks. The kernels of backend {backend!r} are faulty: report this"
        )


# -- 3. the engine's tensors, without writing ---------------------------------------------------------------------------------


def _check_addresses(paged: PagedTensors, views: list[torch.Tensor], blocks_per_chunk: int, backend: Backend) -> None:
    layout, last = paged.layout, paged.layout.num_blocks - 1
    block_ids = np.full((1, blocks_per_chunk), -1, dtype=np.int32)
    offsets = layout.plane_offsets(blocks_per_chunk)
    slot = np.zeros((1, int(offsets[-1])), dtype=np.uint8)
    sums, slot_ids = np.zeros((1, len(layout.planes)), dtype=np.uint64), np.zeros(1, dtype=np.int64)
    scatter_chunks(paged, block_ids, slot, slot_ids, sums, backend)  # writes nothing, because the chunk has no blocks
    block_ids[0, 0] = last
    checksum_chunks(paged, block_ids, sums, backend)
    for _ in range(_READS):
        seen = [_block_bytes(view, plane, last) for view, plane in zip(views, layout.planes, strict=True)]
        gather_chunks(paged, block_ids, slot, slot_ids, sums, backend)
        now = [_block_bytes(view, plane, last) for view, plane in zip(views, layout.planes, strict=True)]
        wrong = [
            p
            for p, (was, still) in enumerate(zip(seen, now, strict=True))
            if not np.array_equal(slot[0, offsets[p] : offsets[p] + len(was)], was) and np.array_equal(was, still)
        ]
        if not wrong:
            return
    p = wrong[0]
    raise LayoutError(f"layout {layout.name!r} does not round-trip: plane {p} ({layout.planes[p]}) reads other bytes than the "
                      f"engine's tensor holds. The kernels of backend {backend!r} are faulty: report this")  # fmt: skip
