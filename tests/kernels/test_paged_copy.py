"""Both backends against tensor indexing and against each other, bit for bit, over every layout."""

from __future__ import annotations

import mmap
import threading

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkern.kernels import layout as L
from kvkern.kernels.checksum import checksum
from kvkern.kernels.errors import LayoutError
from kvkern.kernels.layout import PagedLayout, Plane, plane_views
from kvkern.kernels.paged_copy import Backend, PagedTensors, gather_chunks, scatter_chunks
from tests.kernels.paged_cases import CASES, NUM_BLOCKS
from tests.support import GUARD, guarded, storage_bytes, twin

BACKENDS: tuple[Backend, ...] = ("numba", "ref")
SENTINEL = np.uint64(0xDEADBEEFCAFEF00D)


class Slots:
    """Rows of slots with GUARD bytes around, optionally at an odd address."""

    def __init__(self, count: int, part_nbytes: int, slack: int, shift: int) -> None:
        stride = -(-(part_nbytes + slack) // 64) * 64
        self.whole = np.full(count * stride + 256 + 64, GUARD, dtype=np.uint8)
        start = -self.whole.ctypes.data % 64 + 64 + shift
        self.rows = self.whole[start : start + count * stride].reshape(count, stride)


def expected_slot(paged: PagedTensors, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """One chunk's part, read by tensor indexing; absent blocks and padding are zeros."""
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
    """Distinct blocks (a scatter has one writer a block), about a quarter of them absent."""
    rng = np.random.default_rng(seed)
    ids = np.full(n * blocks_per_chunk, -1, dtype=np.int32)
    known = min(len(ids), num_blocks)
    ids[:known] = rng.permutation(num_blocks)[:known]
    ids[rng.random(len(ids)) < 0.25] = -1
    return rng.permutation(ids).reshape(n, blocks_per_chunk).astype(np.int32)


def check_gather(paged: PagedTensors, ids: npt.NDArray[np.int32], shift: int) -> None:
    n, blocks_per_chunk = ids.shape
    part = paged.layout.part_nbytes(blocks_per_chunk)
    before = storage_bytes(paged.tensors)
    slot_ids = np.random.default_rng(1).permutation(n + 2)[:n].astype(np.int64)
    for backend in BACKENDS:
        slots = Slots(n + 2, part, slack=70, shift=shift)
        want = slots.whole.copy()
        rows = want[slots.rows.ctypes.data - slots.whole.ctypes.data :]
        rows = rows[: slots.rows.size].reshape(slots.rows.shape)
        sums = np.full((n + 2, len(paged.layout.planes)), SENTINEL)
        for c, slot in enumerate(slot_ids):
            rows[slot, :part] = expected_slot(paged, ids[c])
        gather_chunks(paged, ids, slots.rows, slot_ids, sums[1 : n + 1], backend)
        np.testing.assert_array_equal(slots.whole, want, err_msg=backend)
        offsets = paged.layout.plane_offsets(blocks_per_chunk)
        for c, slot in enumerate(slot_ids):
            for p in range(len(offsets) - 1):
                assert int(sums[c + 1, p]) == checksum(rows[slot, offsets[p] : offsets[p + 1]]), (backend, c, p)
        assert (sums[[0, -1]] == SENTINEL).all(), backend
    for was, now in zip(before, storage_bytes(paged.tensors), strict=True):
        np.testing.assert_array_equal(was, now)


def check_scatter(paged: PagedTensors, ids: npt.NDArray[np.int32], shift: int) -> None:
    n, blocks_per_chunk = ids.shape
    part = paged.layout.part_nbytes(blocks_per_chunk)
    slots = Slots(n + 1, part, slack=0, shift=shift)
    slots.rows[:] = np.random.default_rng(2).integers(0, 256, slots.rows.shape, dtype=np.uint8)
    slot_ids = np.random.default_rng(3).permutation(n + 1)[:n].astype(np.int64)
    frozen = slots.whole.copy()
    results = []
    for backend in BACKENDS:
        target = PagedTensors.bind(paged.layout, twin(paged.tensors))
        sums = np.full((n + 2, len(paged.layout.planes)), SENTINEL)
        scatter_chunks(target, ids, slots.rows, slot_ids, sums[1 : n + 1], backend)
        np.testing.assert_array_equal(slots.whole, frozen, err_msg=backend)
        assert (sums[[0, -1]] == SENTINEL).all(), backend
        results.append((storage_bytes(target.tensors), sums))
        views = plane_views(target.layout.name, target.tensors, target.layout.block_tokens)
        offsets = target.layout.plane_offsets(blocks_per_chunk)
        for c, slot in enumerate(slot_ids):
            for p, (view, plane) in enumerate(zip(views, target.layout.planes, strict=True)):
                assert int(sums[c + 1, p]) == checksum(slots.rows[slot, offsets[p] : offsets[p + 1]]), (backend, c, p)
                for i, block in enumerate(ids[c]):
                    if block >= 0:
                        data = view[int(block)].transpose(0, 1) if plane.head_major else view[int(block)]
                        at = int(offsets[p]) + i * plane.block_nbytes
                        want = slots.rows[slot, at : at + plane.block_nbytes]
                        np.testing.assert_array_equal(data.contiguous().view(torch.uint8).numpy().reshape(-1), want)
        # nothing but the named blocks changed: putting the old bytes back gives the old storage
        originals = plane_views(paged.layout.name, paged.tensors, paged.layout.block_tokens)
        for view, original in zip(views, originals, strict=True):
            for block in ids[ids >= 0]:
                view[int(block)].copy_(original[int(block)])
        for was, now in zip(storage_bytes(paged.tensors), storage_bytes(target.tensors), strict=True):
            np.testing.assert_array_equal(was, now, err_msg=backend)
    for mine, theirs in zip(*(r[0] for r in results), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize(("n", "blocks_per_chunk", "shift"), [(1, 1, 0), (3, 2, 0), (2, 3, 1), (0, 2, 0), (1, 7, 32)])
@pytest.mark.parametrize("name", CASES)
def test_gather(name: str, n: int, blocks_per_chunk: int, shift: int) -> None:
    check_gather(CASES[name](), draw_ids(n, blocks_per_chunk), shift)


@pytest.mark.parametrize(("n", "blocks_per_chunk", "shift"), [(1, 1, 0), (3, 2, 0), (2, 3, 1), (0, 2, 0), (1, 7, 32)])
@pytest.mark.parametrize("name", CASES)
def test_scatter(name: str, n: int, blocks_per_chunk: int, shift: int) -> None:
    check_scatter(CASES[name](), draw_ids(n, blocks_per_chunk), shift)


@pytest.mark.parametrize("name", ["FA bf16", "MLA 656", "pages, odd rows"])
def test_all_blocks_absent(name: str) -> None:
    """Nothing of the engine is read or written, and the checksums are those of zeros, or of the whole slot."""
    ids = np.full((2, 2), -1, dtype=np.int32)
    check_gather(CASES[name](), ids, 0)
    check_scatter(CASES[name](), ids, 0)


def test_one_block_gathered_into_several_chunks() -> None:
    check_gather(CASES["FA bf16"](), np.array([[3, 3], [3, -1]], dtype=np.int32), 0)


@st.composite
def planes(draw: st.DrawFn) -> tuple[PagedTensors, npt.NDArray[np.int32], int]:
    """A random nesting of block, token and head with random gaps, at any address."""
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


@settings(max_examples=150)
@given(planes())
def test_backends_agree_on_any_strides(case: tuple[PagedTensors, npt.NDArray[np.int32], int]) -> None:
    paged, ids, shift = case
    n, part = len(ids), paged.layout.part_nbytes(ids.shape[1])
    slot_ids = np.arange(n, dtype=np.int64)
    filled, sums, targets = [], [], []
    for backend in BACKENDS:
        slots = Slots(n, part, 64, shift)
        total = np.zeros((n, 1), dtype=np.uint64)
        gather_chunks(paged, ids, slots.rows, slot_ids, total, backend)
        target = PagedTensors.bind(paged.layout, twin(paged.tensors))
        target.tensors[0].fill_(0x5A)
        read = np.zeros((n, 1), dtype=np.uint64)
        scatter_chunks(target, ids, slots.rows, slot_ids, read, backend)
        np.testing.assert_array_equal(total, read)  # what was written is what is read back
        filled.append(slots.rows)
        sums.append(total)
        targets.append(storage_bytes(target.tensors)[0])
    np.testing.assert_array_equal(filled[0], filled[1])
    np.testing.assert_array_equal(sums[0], sums[1])
    np.testing.assert_array_equal(targets[0], targets[1])


def untouched(nbytes: int) -> torch.Tensor:
    """Address space whose pages exist once touched; more than the machine has is fine."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)


def test_offsets_beyond_4_gib() -> None:
    """Blocks past 2^31 and 2^32 bytes of a tensor whose untouched pages cost no memory."""
    num_blocks, block = 5 << 8, (16, 16, 4096)  # 1 MiB of K and V a block and plane, 2.5 GiB in all
    cache = untouched(2 * num_blocks << 20).view(2, num_blocks, *block)
    assert cache.nbytes > 2 << 30
    layout = L.flash_attention([cache])
    paged = PagedTensors.bind(layout, [cache])
    assert layout.planes[1].offset + (num_blocks - 1) * layout.planes[1].stride_block > 1 << 31
    check_far_blocks(paged, cache[1], num_blocks)
    pages = untouched((5 << 30) + (1 << 20)).view(-1, 1 << 20)
    assert pages.nbytes > 5 << 30
    check_far_blocks(PagedTensors.bind(L.from_pages([pages], 16), [pages]), pages, len(pages))


def check_far_blocks(paged: PagedTensors, plane: torch.Tensor, num_blocks: int) -> None:
    ids = np.array([[num_blocks - 1], [(1 << 31) // (1 << 20) % num_blocks], [0]], dtype=np.int32)
    for i, block in enumerate(ids[:, 0]):
        plane[int(block)].fill_(i + 1)
    for backend in BACKENDS:
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
    assert (slots.whole == GUARD).all()
    assert (sums == SENTINEL).all()
    for was, now in zip(before, storage_bytes(paged.tensors), strict=True):
        np.testing.assert_array_equal(was, now)


I32, I64, U8, U64 = np.int32, np.int64, np.uint8, np.uint64
PART = 4 * 2 * 2048  # of two blocks of "FA bf16": 2048 bytes a block and plane, 4 planes


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
    with pytest.raises(LayoutError, match="unknown backend 'cuda'; known: numba, ref"):
        gather_chunks(
            paged, np.zeros((0, 1), I32), np.zeros((1, 9999), U8), np.zeros(0, I64), np.zeros((0, 4), U64), "cuda"
        )  # type: ignore[arg-type]


def test_chunks_of_no_blocks() -> None:
    """Either refused, or both backends answer with the checksum of nothing."""
    paged = CASES["FA bf16"]()
    for backend in BACKENDS:
        sums = np.full((2, 4), SENTINEL)
        try:
            gather_chunks(paged, np.zeros((2, 0), I32), np.zeros((2, 64), U8), np.arange(2), sums, backend)
        except LayoutError:
            continue
        assert (sums == 0).all(), backend


def test_numba_refuses_tensors_off_the_cpu() -> None:
    """No byte may be touched through an address of another device; 'meta' stands for one (its address is 0)."""
    meta = torch.empty(2, 4, 16, 2, 8, device="meta")
    paged = PagedTensors.bind(L.flash_attention([meta]), [meta])
    none = np.zeros((0, 1), I32)  # no chunk, so that the unfixed code does not crash the test
    with pytest.raises(LayoutError, match="meta"):
        gather_chunks(paged, none, np.zeros((1, 1 << 16), U8), np.zeros(0, I64), np.zeros((0, 2), U64))


def test_read_only_indices() -> None:
    """Arrays over a received message are read-only; so are those of frozen engines."""
    paged = CASES["FA bf16"]()
    ids, slot_ids = np.zeros((1, 1), I32), np.zeros(1, I64)
    ids.flags.writeable = slot_ids.flags.writeable = False
    gather_chunks(paged, ids, np.zeros((1, PART), U8), slot_ids, np.zeros((1, 4), U64))


def test_concurrent_calls_on_distinct_slots() -> None:
    """The kernels hold no state: eight threads at once write what one would."""
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
