"""Checks of a paged copy against tensor indexing, with sentinels around every output. For every backend."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from kvkern.kernels import layout as L
from kvkern.kernels.checksum import checksum
from kvkern.kernels.layout import PagedLayout, Plane, plane_views
from kvkern.kernels.paged_copy import Backend, checksum_chunks, gather_chunks, scatter_chunks
from kvkern.kernels.paged_tensors import PagedTensors
from tests.kernels.paged_cases import NUM_BLOCKS
from tests.support import GUARD, guarded, storage_bytes, twin

SENTINEL = np.uint64(0xDEADBEEFCAFEF00D)
# (chunks, blocks_per_chunk, bytes that the slots are off a 64-byte boundary)
COPY_SHAPES = [(1, 1, 0), (3, 2, 0), (2, 3, 1), (0, 2, 0), (1, 7, 32)]
CHECKSUM_SHAPES = [(1, 1), (3, 2), (0, 2), (1, 7)]  # (chunks, blocks_per_chunk)


class Slots:
    """Rows of slots between GUARD bytes, optionally at an odd address."""

    def __init__(self, count: int, part_nbytes: int, slack: int, shift: int) -> None:
        stride = -(-(part_nbytes + slack) // 64) * 64
        self.whole = np.full(count * stride + 256 + 64, GUARD, dtype=np.uint8)
        start = -self.whole.ctypes.data % 64 + 64 + shift
        self.rows = self.whole[start : start + count * stride].reshape(count, stride)


def expected_slot(paged: PagedTensors, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Return one chunk's part of a slot, read by tensor indexing. Absent blocks and padding are zeros."""
    layout = paged.layout
    offsets = layout.plane_offsets(len(ids))
    out = np.zeros(int(offsets[-1]), dtype=np.uint8)
    for p, (view, plane) in enumerate(
        zip(plane_views(layout.name, paged.tensors, layout.block_tokens), layout.planes, strict=True)
    ):
        for i, block in enumerate(ids):
            if block >= 0:
                data = view[int(block)].transpose(0, 1) if plane.head_major else view[int(block)]
                at = int(offsets[p]) + i * plane.block_nbytes
                out[at : at + plane.block_nbytes] = data.contiguous().view(torch.uint8).numpy().reshape(-1)
    return out


def draw_ids(n: int, blocks_per_chunk: int, num_blocks: int = NUM_BLOCKS, seed: int = 0) -> npt.NDArray[np.int32]:
    """Draw distinct block ids, about a quarter of them absent. Distinct, because a scatter has one writer per block."""
    rng = np.random.default_rng(seed)
    ids = np.full(n * blocks_per_chunk, -1, dtype=np.int32)
    known = min(len(ids), num_blocks)
    ids[:known] = rng.permutation(num_blocks)[:known]
    ids[rng.random(len(ids)) < 0.25] = -1
    return rng.permutation(ids).reshape(n, blocks_per_chunk).astype(np.int32)


def check_gather(
    paged: PagedTensors,  # host tensors
    ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk]
    shift: int,  # bytes that the slots are off a 64-byte boundary
    backend: Backend,
    device: str = "cpu",
) -> None:
    """Slots, checksums and everything around them equal the result of tensor indexing. The engine's memory does not change."""
    n, blocks_per_chunk = ids.shape
    part = paged.layout.part_nbytes(blocks_per_chunk)
    source = PagedTensors.bind(paged.layout, twin(paged.tensors, device))
    slot_ids = np.random.default_rng(1).permutation(n + 2)[:n].astype(np.int64)
    slots = Slots(n + 2, part, slack=70, shift=shift)
    want = slots.whole.copy()
    rows = want[slots.rows.ctypes.data - slots.whole.ctypes.data :]
    rows = rows[: slots.rows.size].reshape(slots.rows.shape)
    sums = np.full((n + 2, len(paged.layout.planes)), SENTINEL)
    for c, slot in enumerate(slot_ids):
        rows[slot, :part] = expected_slot(paged, ids[c])
    gather_chunks(source, ids, slots.rows, slot_ids, sums[1 : n + 1], backend)
    np.testing.assert_array_equal(slots.whole, want)
    check_sums(paged, rows, slot_ids, sums, blocks_per_chunk)
    for was, now in zip(storage_bytes(paged.tensors), storage_bytes(source.tensors), strict=True):
        np.testing.assert_array_equal(was, now)


def check_scatter(
    paged: PagedTensors,  # host tensors
    ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk], distinct but for -1
    shift: int,
    backend: Backend,
    device: str = "cpu",
) -> None:
    """Named blocks hold the slots' bytes, and nothing else changes. Checksums cover the whole slots as read."""
    n, blocks_per_chunk = ids.shape
    part = paged.layout.part_nbytes(blocks_per_chunk)
    slots = Slots(n + 1, part, slack=0, shift=shift)
    slots.rows[:] = np.random.default_rng(2).integers(0, 256, slots.rows.shape, dtype=np.uint8)
    slot_ids = np.random.default_rng(3).permutation(n + 1)[:n].astype(np.int64)
    frozen = slots.whole.copy()
    target = PagedTensors.bind(paged.layout, twin(paged.tensors, device))
    sums = np.full((n + 2, len(paged.layout.planes)), SENTINEL)
    scatter_chunks(target, ids, slots.rows, slot_ids, sums[1 : n + 1], backend)
    np.testing.assert_array_equal(slots.whole, frozen)
    check_sums(paged, slots.rows, slot_ids, sums, blocks_per_chunk)
    expected = PagedTensors.bind(paged.layout, twin(paged.tensors))
    views = plane_views(expected.layout.name, expected.tensors, expected.layout.block_tokens)
    offsets = expected.layout.plane_offsets(blocks_per_chunk)
    for c, slot in enumerate(slot_ids):
        for p, (view, plane) in enumerate(zip(views, expected.layout.planes, strict=True)):
            for i, block in enumerate(ids[c]):
                if block >= 0:
                    at = int(offsets[p]) + i * plane.block_nbytes
                    put_block(view[int(block)], plane, slots.rows[slot, at : at + plane.block_nbytes])
    for want, got in zip(storage_bytes(expected.tensors), storage_bytes(target.tensors), strict=True):
        np.testing.assert_array_equal(got, want)


def check_checksums(
    paged: PagedTensors,  # host tensors
    ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk]
    backend: Backend,
    device: str = "cpu",
) -> None:
    """The checksums equal those of a gather, and the engine's memory does not change."""
    n, blocks_per_chunk = ids.shape
    source = PagedTensors.bind(paged.layout, twin(paged.tensors, device))
    sums = np.full((n + 2, len(paged.layout.planes)), SENTINEL)
    checksum_chunks(source, ids, sums[1 : n + 1], backend)
    rows = np.array([expected_slot(paged, chunk) for chunk in ids]).reshape(
        n, paged.layout.part_nbytes(blocks_per_chunk)
    )
    check_sums(paged, rows, np.arange(n), sums, blocks_per_chunk)
    for was, now in zip(storage_bytes(paged.tensors), storage_bytes(source.tensors), strict=True):
        np.testing.assert_array_equal(was, now)


def check_sums(
    paged: PagedTensors,
    rows: npt.NDArray[np.uint8],  # the slots
    slot_ids: npt.NDArray[np.int64],  # [n]
    sums: npt.NDArray[np.uint64],  # [1 + n + 1, planes], sentinels at both ends
    blocks_per_chunk: int,
) -> None:
    offsets = paged.layout.plane_offsets(blocks_per_chunk)
    for c, slot in enumerate(slot_ids):
        for p in range(len(offsets) - 1):
            assert int(sums[c + 1, p]) == checksum(rows[slot, offsets[p] : offsets[p + 1]]), (c, p)
    assert (sums[[0, -1]] == SENTINEL).all()


def put_block(block: torch.Tensor, plane: Plane, data: npt.NDArray[np.uint8]) -> None:
    """Write the bytes of a block, given in slot order, through the engine's view of it."""
    shape = (plane.num_heads, plane.num_tokens) if plane.head_major else (plane.num_tokens, plane.num_heads)
    values = torch.from_numpy(data.copy()).view(*shape, plane.head_nbytes).view(block.dtype)
    block.copy_(values.transpose(0, 1) if plane.head_major else values)


def check_any_strides(case: tuple[PagedTensors, npt.NDArray[np.int32], int], backends: Sequence[Backend]) -> None:
    """Backends agree on a drawn plane, and a scatter reads the bytes that the gather wrote."""
    paged, ids, shift = case
    n, part = len(ids), paged.layout.part_nbytes(ids.shape[1])
    slot_ids = np.arange(n, dtype=np.int64)
    results = []
    for backend in backends:
        slots = Slots(n, part, 64, shift)
        total = np.zeros((n, 1), dtype=np.uint64)
        gather_chunks(paged, ids, slots.rows, slot_ids, total, backend)
        alone = np.zeros((n, 1), dtype=np.uint64)
        checksum_chunks(paged, ids, alone, backend)
        np.testing.assert_array_equal(alone, total)
        target = PagedTensors.bind(paged.layout, twin(paged.tensors))
        target.tensors[0].fill_(0x5A)
        read = np.zeros((n, 1), dtype=np.uint64)
        scatter_chunks(target, ids, slots.rows, slot_ids, read, backend)
        np.testing.assert_array_equal(total, read)
        results.append((slots.rows, total, storage_bytes(target.tensors)[0]))
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@st.composite
def planes(draw: st.DrawFn) -> tuple[PagedTensors, npt.NDArray[np.int32], int]:
    """Draw a random nesting of block, token and head, with random gaps, at any address."""
    sizes = {"block": draw(st.integers(1, 5)), "token": draw(st.integers(1, 6)), "head": draw(st.integers(1, 4))}
    nbytes = draw(st.sampled_from([1, 2, 7, 16, 60, 64, 65, 128, 192]))
    strides, reach = {}, nbytes
    for name in draw(st.permutations(list(sizes))):
        strides[name] = reach + draw(st.sampled_from([0, 0, 1, 64]))
        reach = strides[name] * sizes[name]
    offset = draw(st.sampled_from([0, 1, 64]))
    tensor = guarded(offset + reach, seed=draw(st.integers(0, 9)))[0]
    plane = Plane(0, offset, *(strides[n] for n in ("block", "token", "head")), sizes["token"], sizes["head"], nbytes)
    layout = PagedLayout("drawn", (plane,), sizes["block"], sizes["token"])
    ids = draw_ids(draw(st.integers(0, 3)), draw(st.integers(1, 4)), sizes["block"], seed=draw(st.integers(0, 99)))
    return PagedTensors.bind(layout, [tensor]), ids, draw(st.sampled_from([0, 1, 8]))


def untouched(nbytes: int) -> torch.Tensor:
    """Return a tensor whose pages exist only once they are touched. It may be larger than the machine's memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE; Python has a name for it from 3.13 on
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)


def check_beyond_4_gib(backends: Sequence[Backend]) -> None:
    """Blocks past 2^31 and 2^32 bytes of a tensor whose untouched pages cost no memory."""
    num_blocks, block = 5 << 8, (16, 16, 4096)  # 1 MiB per block and plane, 2.5 GiB in all
    cache = untouched(2 * num_blocks << 20).view(2, num_blocks, *block)
    layout = L.flash_attention([cache])
    assert layout.planes[1].offset + (num_blocks - 1) * layout.planes[1].stride_block > 1 << 31
    _check_far_blocks(PagedTensors.bind(layout, [cache]), cache[1], num_blocks, backends)
    pages = untouched((5 << 30) + (1 << 20)).view(-1, 1 << 20)
    _check_far_blocks(PagedTensors.bind(L.from_pages([pages], 16), [pages]), pages, len(pages), backends)


def _check_far_blocks(paged: PagedTensors, plane: torch.Tensor, num_blocks: int, backends: Sequence[Backend]) -> None:
    ids = np.array([[num_blocks - 1], [(1 << 31) // (1 << 20) % num_blocks], [0]], dtype=np.int32)
    for i, block in enumerate(ids[:, 0]):
        plane[int(block)].fill_(i + 1)
    for backend in backends:
        slots = np.zeros((3, paged.layout.part_nbytes(1)), dtype=np.uint8)
        sums = np.zeros((3, len(paged.layout.planes)), dtype=np.uint64)
        gather_chunks(paged, ids, slots, np.arange(3), sums, backend)
        last = slots[:, -paged.layout.planes[-1].block_nbytes :]
        assert [set(row.tolist()) for row in last] == [{1}, {2}, {3}]
        slots += 10
        scatter_chunks(paged, ids, slots, np.arange(3), sums, backend)
        assert [plane[int(b)].unique().tolist() for b in ids[:, 0]] == [[11], [12], [13]]
        slots -= 10
        scatter_chunks(paged, ids, slots, np.arange(3), sums, backend)
