"""The Triton copies, bit for bit against tensor indexing: in Triton's interpreter, and on a GPU if there is one.

`TRITON_INTERPRET=1` must be set before Triton is imported, so `make test` runs these tests in a phase of their own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings

from kvkern.kernels import layout as L
from kvkern.kernels.errors import LayoutError
from kvkern.kernels.paged_copy import gather_chunks, scatter_chunks
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.kernels.selftest import check_round_trip
from kvkern.kernels.target import interpreted
from tests.kernels.copy_checks import (
    CHECKSUM_SHAPES,
    COPY_SHAPES,
    check_any_strides,
    check_beyond_4_gib,
    check_checksums,
    check_gather,
    check_scatter,
    draw_ids,
    planes,
)
from tests.kernels.paged_cases import CASES, NUM_BLOCKS
from tests.support import storage_bytes, twin

interpret = pytest.mark.interpret
gpu = pytest.mark.gpu
devices = pytest.mark.parametrize("device", [pytest.param("cpu", marks=interpret), pytest.param("cuda", marks=gpu)])


@devices
@pytest.mark.parametrize(("n", "blocks_per_chunk", "shift"), COPY_SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_gather(name: str, n: int, blocks_per_chunk: int, shift: int, device: str) -> None:
    check_gather(CASES[name](), draw_ids(n, blocks_per_chunk), shift, "triton", device)


@devices
@pytest.mark.parametrize(("n", "blocks_per_chunk", "shift"), COPY_SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_scatter(name: str, n: int, blocks_per_chunk: int, shift: int, device: str) -> None:
    check_scatter(CASES[name](), draw_ids(n, blocks_per_chunk), shift, "triton", device)


@devices
@pytest.mark.parametrize(("n", "blocks_per_chunk"), CHECKSUM_SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_checksums_without_a_copy(name: str, n: int, blocks_per_chunk: int, device: str) -> None:
    check_checksums(CASES[name](), draw_ids(n, blocks_per_chunk), "triton", device)


def paged_over_tiles(name: str) -> PagedTensors:
    """Return paged tensors with blocks of several tiles, or tiles of several blocks, and a partial last tile."""
    shapes = {
        "two tiles": lambda: [torch.zeros((NUM_BLOCKS, 66 << 10), dtype=torch.uint8)],
        "18 KiB": lambda: [torch.zeros((NUM_BLOCKS, 18 << 10), dtype=torch.uint8)],
        "20,016 bytes": lambda: [torch.zeros((NUM_BLOCKS, 20_016), dtype=torch.uint8)],  # four blocks make whole rows
        "656 bytes": lambda: [torch.zeros((90, 656), dtype=torch.uint8)],
        "planes of two kinds": lambda: [torch.zeros((NUM_BLOCKS, n), dtype=torch.uint8) for n in (4096, 48, 4096, 7)],
    }
    pages = shapes[name]()
    for seed, page in enumerate(pages):
        page.copy_(torch.randint(0, 256, page.shape, generator=torch.Generator().manual_seed(seed)))
    return PagedTensors.bind(L.from_pages(pages, 16), pages)


def gather_by_reference(
    host: PagedTensors, ids: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
    """Return ([n, part_nbytes] slots, [n, planes] checksums) of a gather of n chunks by the reference."""
    n, blocks_per_chunk = ids.shape
    slots = np.zeros((n, host.layout.part_nbytes(blocks_per_chunk)), np.uint8)
    sums = np.zeros((n, len(host.layout.planes)), np.uint64)
    gather_chunks(host, ids, slots, np.arange(n), sums, "ref")
    return slots, sums


@devices
@pytest.mark.parametrize("blocks_per_chunk", [1, 6])
@pytest.mark.parametrize("name", ["two tiles", "18 KiB", "20,016 bytes", "656 bytes", "planes of two kinds"])
def test_tiles_groups_and_splits(name: str, blocks_per_chunk: int, device: str) -> None:
    """One chunk: several programs share its blocks, and add to one checksum."""
    paged = paged_over_tiles(name)
    ids = draw_ids(1, blocks_per_chunk if name != "656 bytes" else 13 * blocks_per_chunk, paged.layout.num_blocks)
    check_gather(paged, ids, 0, "triton", device)
    check_scatter(paged, ids, 0, "triton", device)
    check_checksums(paged, ids, "triton", device)


@devices
@pytest.mark.parametrize("max_ctas", [2, 32])
@pytest.mark.parametrize("stages", [3, 4])
@pytest.mark.parametrize("name", ["FA bf16", "MLA 656", "two tiles", "656 bytes", "pages, odd rows"])
def test_a_ring_gives_what_wide_tiles_give(name: str, stages: int, max_ctas: int, device: str) -> None:
    """The bytes and checksums are equal, although tiles and groups are cut in another way. A last group has fewer blocks."""
    from kvkern.kernels import paged_copy_triton

    host = CASES[name]() if name in CASES else paged_over_tiles(name)
    paged = PagedTensors.bind(host.layout, twin(host.tensors, device))
    blocks_per_chunk = 70 if name == "656 bytes" else 3
    ids = draw_ids(2, blocks_per_chunk, host.layout.num_blocks)
    want, want_sums = gather_by_reference(host, ids)
    slots = torch.full(want.shape, 0xA5, dtype=torch.uint8, device=device)
    slot_ids = torch.arange(2, device=device)
    sums = torch.zeros((3, *want_sums.shape), dtype=torch.uint64, device=device)
    on_device = torch.from_numpy(ids).to(device)
    paged_copy_triton.gather_chunks(paged, on_device, slots, slot_ids, sums[0], max_ctas, stages)
    paged_copy_triton.checksum_chunks(paged, on_device, sums[1], max_ctas, stages)
    for tensor in paged.tensors:
        tensor.zero_()
    paged_copy_triton.scatter_chunks(paged, on_device, slots, slot_ids, sums[2], max_ctas, stages)
    np.testing.assert_array_equal(slots.cpu().numpy(), want)
    np.testing.assert_array_equal(sums.cpu().numpy(), np.stack([want_sums] * 3))
    expected = PagedTensors.bind(host.layout, twin(host.tensors))
    for tensor in expected.tensors:
        tensor.zero_()
    scatter_chunks(expected, ids, want, np.arange(2), want_sums, "ref")
    for one, other in zip(storage_bytes(expected.tensors), storage_bytes(paged.tensors), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_depth_is_refused() -> None:
    from kvkern.kernels.paged_copy_triton import TileGeometry

    with pytest.raises(LayoutError, match=r"stages is 2, expected one of \(1, 3, 4\)"):
        TileGeometry.of((1, 1, 4096), 16, 1, 32, stages=2)


def test_odd_runs_have_no_ring() -> None:
    """cp.async moves at least 4 bytes. Triton would widen single bytes to a ring that is larger than any SM's memory."""
    from kvkern.kernels.paged_copy_triton import TileGeometry

    assert [TileGeometry.of((1, 1, run), 16, 8, 32, stages=3).STAGES for run in (997, 4096, 60)] == [1, 3, 3]


def test_a_plane_too_large_for_its_counters_is_refused() -> None:
    from kvkern.kernels.paged_copy_triton import TileGeometry

    with pytest.raises(LayoutError, match="the limit is 256 GiB"):
        TileGeometry.of((1, 1, 1 << 30), 16, 256, 32)


@devices
@pytest.mark.parametrize("max_ctas", [1, 2, 5])
def test_a_capped_grid_does_all_of_the_work(max_ctas: int, device: str) -> None:
    from kvkern.kernels import paged_copy_triton

    host = CASES["FA fp8"]()
    paged = PagedTensors.bind(host.layout, twin(host.tensors, device))
    ids = draw_ids(3, 2)
    want, want_sums = gather_by_reference(host, ids)
    slots = torch.zeros(want.shape, dtype=torch.uint8, device=device)
    sums = torch.zeros(want_sums.shape, dtype=torch.uint64, device=device)
    slot_ids = torch.arange(3, device=device)
    paged_copy_triton.gather_chunks(paged, torch.from_numpy(ids).to(device), slots, slot_ids, sums, max_ctas)
    np.testing.assert_array_equal(slots.cpu().numpy(), want)
    np.testing.assert_array_equal(sums.cpu().numpy(), want_sums)


@interpret
@settings(max_examples=60)
@given(planes())
def test_any_strides(case: tuple[PagedTensors, npt.NDArray[np.int32], int]) -> None:
    check_any_strides(case, ("ref", "triton"))


@interpret
def test_offsets_beyond_4_gib() -> None:
    check_beyond_4_gib(("triton",))


@gpu
def test_offsets_beyond_4_gib_on_a_gpu() -> None:
    pages = torch.zeros(((5 << 30) >> 20, 1 << 20), dtype=torch.int8, device="cuda")
    paged = PagedTensors.bind(L.from_pages([pages], 16), [pages])
    ids = np.array([[len(pages) - 1], [2050]], dtype=np.int32)
    pages[ids[:, 0].tolist()] = torch.tensor([[3], [4]], dtype=torch.int8, device="cuda")
    slots, sums = np.zeros((2, 1 << 20), np.uint8), np.zeros((2, 1), np.uint64)
    gather_chunks(paged, ids, slots, np.arange(2), sums, "triton")
    assert [set(row.tolist()) for row in slots] == [{3}, {4}]


@devices
def test_strided_indices_are_refused(device: str) -> None:
    """The kernels ignore strides of tables. With a view of a wider table they would write sums into its other columns."""
    from kvkern.kernels import paged_copy_triton

    host = CASES["FA bf16"]()
    paged = PagedTensors.bind(host.layout, twin(host.tensors, device))
    slots = torch.zeros((1, paged.layout.part_nbytes(1)), dtype=torch.uint8, device=device)
    ids, slot_ids = (
        torch.zeros((1, 1), dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    wide = torch.zeros((2, 8), dtype=torch.uint64, device=device)[:, :4]
    with pytest.raises(LayoutError, match="checksums has strides"):
        paged_copy_triton.gather_chunks(
            paged, ids.expand(2, 1).contiguous(), slots, slot_ids.expand(2).contiguous(), wide
        )


@devices
@pytest.mark.parametrize("name", ["FA bf16", "MLA 656", "fused HND (0, 1, 2)", "pages, odd rows"])
def test_self_test_of_the_layout(name: str, device: str) -> None:
    host = CASES[name]()
    check_round_trip(PagedTensors.bind(host.layout, twin(host.tensors, device)), 2, "triton")


@gpu
def test_slots_in_pinned_host_memory() -> None:
    """Kernels write and read pinned host memory through its device address, without a staging buffer."""
    from kvkern.kernels import paged_copy_triton

    host = CASES["MLA 576 bf16"]()
    paged = PagedTensors.bind(host.layout, twin(host.tensors, "cuda"))
    ids = draw_ids(3, 2)
    want, want_sums = gather_by_reference(host, ids)
    slots = torch.zeros(want.shape, dtype=torch.uint8, pin_memory=True)
    sums = torch.zeros(want_sums.shape, dtype=torch.uint64, device="cuda")
    on_device = (torch.from_numpy(ids).cuda(), slots, torch.arange(3, device="cuda"), sums)
    paged_copy_triton.gather_chunks(paged, *on_device)
    torch.cuda.synchronize()
    np.testing.assert_array_equal(slots.numpy(), want)
    np.testing.assert_array_equal(sums.cpu().numpy(), want_sums)
    sums.zero_()
    paged_copy_triton.scatter_chunks(paged, *on_device)
    np.testing.assert_array_equal(sums.cpu().numpy(), want_sums)


@pytest.mark.skipif(interpreted() or torch.cuda.is_available(), reason="Triton can run here")
def test_host_tensors_are_refused_where_nothing_can_run_it() -> None:
    with pytest.raises(LayoutError, match="needs a GPU, or TRITON_INTERPRET=1"):
        check_round_trip(CASES["FA bf16"](), 1, "triton")
