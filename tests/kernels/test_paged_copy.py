"""The host backends against tensor indexing and against each other, bit for bit, for every layout."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings

from kvkern.kernels import layout as L
from kvkern.kernels.errors import LayoutError
from kvkern.kernels.paged_copy import Backend, checksum_chunks, gather_chunks, scatter_chunks
from kvkern.kernels.paged_tensors import PagedTensors
from tests.kernels.copy_checks import (
    CHECKSUM_SHAPES,
    COPY_SHAPES,
    SENTINEL,
    Slots,
    check_any_strides,
    check_beyond_4_gib,
    check_checksums,
    check_gather,
    check_scatter,
    draw_ids,
    planes,
)
from tests.kernels.paged_cases import CASES, NUM_BLOCKS
from tests.support import GUARD, storage_bytes

BACKENDS: tuple[Backend, ...] = ("numba", "ref")  # the tests of triton have a file of their own
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize(("n", "blocks_per_chunk", "shift"), COPY_SHAPES)
@pytest.mark.parametrize("name", CASES)
@each_backend
def test_gather(backend: Backend, name: str, n: int, blocks_per_chunk: int, shift: int) -> None:
    check_gather(CASES[name](), draw_ids(n, blocks_per_chunk), shift, backend)


@pytest.mark.parametrize(("n", "blocks_per_chunk", "shift"), COPY_SHAPES)
@pytest.mark.parametrize("name", CASES)
@each_backend
def test_scatter(backend: Backend, name: str, n: int, blocks_per_chunk: int, shift: int) -> None:
    check_scatter(CASES[name](), draw_ids(n, blocks_per_chunk), shift, backend)


@pytest.mark.parametrize(("n", "blocks_per_chunk"), CHECKSUM_SHAPES)
@pytest.mark.parametrize("name", CASES)
@each_backend
def test_checksums_without_a_copy(backend: Backend, name: str, n: int, blocks_per_chunk: int) -> None:
    check_checksums(CASES[name](), draw_ids(n, blocks_per_chunk), backend)


def test_checksums_of_long_and_short_runs() -> None:
    """Runs of several prefetch distances, of whole rows and of others, with several blocks per chunk."""
    for nbytes in (64, 4096, 4160, 20_016, 66 << 10):
        pages = [torch.randint(0, 256, (NUM_BLOCKS, nbytes), dtype=torch.uint8) for _ in range(2)]
        check_checksums(PagedTensors.bind(L.from_pages(pages, 16), pages), draw_ids(2, 3), "numba")


@pytest.mark.parametrize("name", ["FA bf16", "MLA 656", "pages, odd rows"])
@each_backend
def test_all_blocks_absent(backend: Backend, name: str) -> None:
    """The engine's memory is neither read nor written. Checksums are those of zeros (gather) or of the whole slot (scatter)."""
    ids = np.full((2, 2), -1, dtype=np.int32)
    check_checksums(CASES[name](), ids, backend)
    check_gather(CASES[name](), ids, 0, backend)
    check_scatter(CASES[name](), ids, 0, backend)


@each_backend
def test_one_block_gathered_into_several_chunks(backend: Backend) -> None:
    check_gather(CASES["FA bf16"](), np.array([[3, 3], [3, -1]], dtype=np.int32), 0, backend)


@settings(max_examples=150)
@given(planes())
def test_backends_agree_on_any_strides(case: tuple[PagedTensors, npt.NDArray[np.int32], int]) -> None:
    check_any_strides(case, BACKENDS)


def test_offsets_beyond_4_gib() -> None:
    check_beyond_4_gib(BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [NUM_BLOCKS, -2, 2**31 - 1, -(2**31)])
def test_a_block_out_of_range_is_refused_before_a_byte_is_written(bad: int, backend: Backend) -> None:
    paged = CASES["FA bf16"]()
    ids = np.array([[0, 1], [2, bad]], dtype=np.int32)
    slots = Slots(2, paged.layout.part_nbytes(2), 0, 0)
    sums = np.full((2, 4), SENTINEL)
    before = storage_bytes(paged.tensors)
    for copy in (gather_chunks, scatter_chunks):
        with pytest.raises(LayoutError, match=rf"block id {bad} is outside \[-1, {NUM_BLOCKS}\)"):
            copy(paged, ids, slots.rows, np.arange(2), sums, backend)
    with pytest.raises(LayoutError, match=rf"block id {bad} is outside \[-1, {NUM_BLOCKS}\)"):
        checksum_chunks(paged, ids, sums, backend)
    assert (slots.whole == GUARD).all()
    assert (sums == SENTINEL).all()
    for was, now in zip(before, storage_bytes(paged.tensors), strict=True):
        np.testing.assert_array_equal(was, now)


I32, I64, U8, U64 = np.int32, np.int64, np.uint8, np.uint64
PART = 4 * 2 * 2048  # part_nbytes of two blocks of "FA bf16": 4 planes with 2048 bytes per block


@pytest.mark.parametrize(("replace", "message"), [
    ({"block_ids": np.zeros((2, 2), I64)}, "block_ids is int64"),
    ({"block_ids": np.zeros(4, I32)}, r"block_ids is int32 \(4,\)"),
    ({"block_ids": np.zeros((2, 4), I32)[:, ::2]}, "block_ids"),
    ({"slot_ids": np.zeros(3, I64)}, r"slot_ids is int64 \(3,\)"),
    ({"slot_ids": np.zeros(2, I32)}, "slot_ids is int32"),
    ({"slot_ids": np.array([0, 2])}, r"slot ids 0..2 are outside \[0, 2\)"),
    ({"slot_ids": np.array([-1, 0])}, r"slot ids -1..0 are outside"),
    ({"slots": np.zeros((2, PART - 1), U8)}, "expected uint8"),
    ({"slots": np.zeros((2, PART), I32)}, "slots is int32"),
    ({"slots": np.zeros((2, 2 * PART), U8)[:, ::2]}, "expected uint8"),
    ({"slots": np.zeros(PART, U8)}, "expected uint8"),
    ({"checksums": np.zeros((2, 3), U64)}, r"checksums is uint64 \(2, 3\)"),
    ({"checksums": np.zeros((2, 4), I64)}, "checksums is int64"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(replace: dict[str, npt.NDArray[np.generic]], message: str) -> None:
    paged = CASES["FA bf16"]()
    good = {
        "block_ids": np.zeros((2, 2), I32), "slots": np.zeros((2, paged.layout.part_nbytes(2)), U8),
        "slot_ids": np.arange(2), "checksums": np.zeros((2, 4), U64),
    }  # fmt: skip
    for copy in (gather_chunks, scatter_chunks):
        copy(paged, **good)  # type: ignore[arg-type]
        with pytest.raises(LayoutError, match=message):
            copy(paged, **{**good, **replace})  # type: ignore[arg-type]


def test_an_unknown_backend_is_named() -> None:
    paged = CASES["FA bf16"]()
    with pytest.raises(LayoutError, match="unknown backend 'cuda'; known: numba, triton, ref"):
        gather_chunks(
            paged, np.zeros((0, 1), I32), np.zeros((1, 9999), U8), np.zeros(0, I64), np.zeros((0, 4), U64), "cuda"
        )  # type: ignore[arg-type]


@each_backend
def test_chunks_of_no_blocks(backend: Backend) -> None:
    with pytest.raises(LayoutError, match="a chunk has at least one block"):
        gather_chunks(
            CASES["FA bf16"](),
            np.zeros((2, 0), I32),
            np.zeros((2, 64), U8),
            np.arange(2),
            np.zeros((2, 4), U64),
            backend,
        )


def test_numba_refuses_tensors_off_the_cpu() -> None:
    """The backend must touch no byte through an address of another device. 'meta' stands for one (its address is 0)."""
    meta = torch.empty(2, 4, 16, 2, 8, device="meta")
    paged = PagedTensors.bind(L.flash_attention([meta]), [meta])
    none = np.zeros((0, 1), I32)  # no chunk, so that code without the check would not crash the test
    with pytest.raises(LayoutError, match="meta"):
        gather_chunks(paged, none, np.zeros((1, 1 << 16), U8), np.zeros(0, I64), np.zeros((0, 2), U64))


def test_read_only_indices() -> None:
    """Arrays over a received message are read-only, and so are those of frozen engines."""
    paged = CASES["FA bf16"]()
    ids, slot_ids = np.zeros((1, 1), I32), np.zeros(1, I64)
    ids.flags.writeable = slot_ids.flags.writeable = False
    gather_chunks(paged, ids, np.zeros((1, PART), U8), slot_ids, np.zeros((1, 4), U64))


def test_concurrent_calls_on_distinct_slots() -> None:
    """The kernels hold no state: eight threads at once write the same bytes as one thread."""
    paged = CASES["FA bf16"]()
    n = 64
    ids = np.random.default_rng(0).integers(-1, NUM_BLOCKS, (n, 2)).astype(I32)
    part = paged.layout.part_nbytes(2)
    alone, together = np.zeros((n, part), U8), np.zeros((n, part), U8)
    want, got = np.zeros((n, 4), U64), np.zeros((n, 4), U64)
    gather_chunks(paged, ids, alone, np.arange(n), want)

    def work(first: int) -> None:
        for _ in range(20):
            rows = slice(first, first + 8)
            gather_chunks(paged, ids[rows], together, np.arange(first, first + 8), got[rows])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(0, n, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(want, got)
