"""The copy engine is told to move every byte that the layout's formula names, once, in the fewest runs."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvkern.kernels import layout as L
from kvkern.kernels.paged_copy import gather_chunks, scatter_chunks
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.transfer.gpu.dma_runs import Runs, count_runs, is_unpadded, merged_runs
from tests.kernels.paged_cases import CASES, NUM_BLOCKS
from tests.support import storage_bytes


def move(runs: Runs) -> None:
    for dst, src, nbytes in zip(runs.dst.tolist(), runs.src.tolist(), runs.nbytes.tolist(), strict=True):
        ctypes.memmove(dst, src, nbytes)


def slots_of(paged: PagedTensors, chunks: int, per_chunk: int) -> npt.NDArray[np.uint8]:
    return np.zeros((chunks + 1, paged.layout.part_nbytes(per_chunk) + 64), dtype=np.uint8)  # rows that do not touch


def addresses(slots: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    return np.arange(len(slots)) * slots.strides[0] + slots.ctypes.data


@st.composite
def tables(draw: st.DrawFn, repeats: bool) -> npt.NDArray[np.int32]:
    """Draw [n, blocks_per_chunk] block ids in which runs of neighbours are likely."""
    per_chunk, chunks = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    ids = list(range(NUM_BLOCKS))
    if draw(st.booleans()):
        ids = draw(st.permutations(ids))
    if repeats and draw(st.booleans()):
        ids = draw(st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=6, max_size=6))
    return np.array(ids[: chunks * per_chunk], dtype=np.int32).reshape(chunks, per_chunk)


@given(name=st.sampled_from(sorted(CASES)), ids=tables(repeats=True))
def test_stores_move_what_a_gather_moves(name: str, ids: npt.NDArray[np.int32]) -> None:
    paged = CASES[name]()
    want, got = slots_of(paged, *ids.shape), slots_of(paged, *ids.shape)
    sums = np.zeros((len(ids), len(paged.layout.planes)), dtype=np.uint64)
    gather_chunks(paged, ids, want, np.arange(len(ids)), sums, "ref")
    runs = merged_runs(paged, ids, addresses(got)[:-1], to_slots=True)
    move(runs)
    np.testing.assert_array_equal(got, want)
    assert int(runs.nbytes.sum()) == paged.layout.block_nbytes * ids.size


@given(name=st.sampled_from(sorted(CASES)), ids=tables(repeats=False))
def test_loads_move_what_a_scatter_moves(name: str, ids: npt.NDArray[np.int32]) -> None:
    want, got = CASES[name](), CASES[name]()
    slots = slots_of(want, *ids.shape)
    slots[:] = np.random.default_rng(0).integers(0, 256, slots.shape, dtype=np.uint8)
    sums = np.zeros((len(ids), len(want.layout.planes)), dtype=np.uint64)
    scatter_chunks(want, ids, slots, np.arange(len(ids)), sums, "ref")
    move(merged_runs(got, ids, addresses(slots)[:-1], to_slots=False))
    for a, b in zip(storage_bytes(want.tensors), storage_bytes(got.tensors), strict=True):
        np.testing.assert_array_equal(a, b)  # guards included


@given(name=st.sampled_from(sorted(CASES)), ids=tables(repeats=True), to_slots=st.booleans())
def test_no_two_runs_could_be_one(name: str, ids: npt.NDArray[np.int32], to_slots: bool) -> None:
    paged = CASES[name]()
    runs = merged_runs(paged, ids, addresses(slots_of(paged, *ids.shape))[:-1], to_slots)
    ends = {(int(d + n), int(s + n)) for d, s, n in zip(runs.dst, runs.src, runs.nbytes, strict=True)}
    assert not ends & {(int(d), int(s)) for d, s in zip(runs.dst, runs.src, strict=True)}
    assert len(runs.dst) <= count_runs(paged, ids)
    if not any(plane.block_nbytes * ids.shape[1] % 64 == 0 for plane in paged.layout.planes):
        assert len(runs.dst) == count_runs(paged, ids)  # padding keeps planes apart


@pytest.mark.parametrize(("ids", "runs"), [
    ([[0, 1, 2, 3]], 2),  # one for each of two layers
    ([[3, 2, 1, 0]], 8),
    ([[0, 1, 3, 4]], 4),
    ([[0, 1, 2, 3], [4, 5, 6, 7]], 4),  # slots do not touch
])  # fmt: skip
def test_neighbours_are_one_run(ids: list[list[int]], runs: int) -> None:
    pages = [torch.zeros((8, 256), dtype=torch.uint8) for _ in range(2)]
    paged = PagedTensors.bind(L.from_pages(pages, 16), pages)
    table = np.array(ids, dtype=np.int32)
    assert len(merged_runs(paged, table, addresses(slots_of(paged, *table.shape))[:-1], True).dst) == runs
    assert count_runs(paged, table) == runs


def test_a_part_with_padding_is_not_for_dma_alone() -> None:
    assert is_unpadded(CASES["pages"](), 2)
    assert not is_unpadded(CASES["pages, odd rows"](), 2)
    assert is_unpadded(CASES["pages, odd rows"](), 64)  # 64 odd rows are whole lines again
