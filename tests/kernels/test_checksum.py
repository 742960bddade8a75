"""The checksum's formula, its numba twin, and every fault that it must detect."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvkern.kernels import layout as L
from kvkern.kernels.checksum import LANE_WEIGHT, LENGTH_WEIGHT, ROW_WEIGHT, checksum, splitmix64
from kvkern.kernels.paged_copy import gather_chunks
from kvkern.kernels.paged_tensors import PagedTensors

MASK = (1 << 64) - 1
SIZES = [0, 1, 3, 63, 64, 65, 127, 128, 1000, 4096]


def noise(nbytes: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def formula(data: bytes) -> int:
    """Compute the formula of the module's docstring in Python integers."""
    total = len(data) * LENGTH_WEIGHT
    padded = data + bytes(-len(data) % 64)
    for at in range(0, len(padded), 4):
        row, lane = divmod(at // 4, 16)
        total += int.from_bytes(padded[at : at + 4], "little") * (int(LANE_WEIGHT[lane]) + row * int(ROW_WEIGHT[lane]))
    return total & MASK


def numba_checksum(data: npt.NDArray[np.uint8], run: int = 0) -> int:
    """Return the checksum that the production gather computes of one plane: whole, or in runs of `run` bytes."""
    page = torch.from_numpy(data.copy()).view(-1, run or data.size)
    paged = PagedTensors.bind(L.from_pages([page], 1), [page])
    slots, sums = np.zeros((1, data.size + 64), np.uint8), np.zeros((1, 1), np.uint64)
    gather_chunks(paged, np.arange(len(page), dtype=np.int32)[None], slots, np.zeros(1, np.int64), sums)
    return int(sums[0, 0])


def test_splitmix64_is_the_published_one() -> None:
    """Compare with the first outputs of the generator seeded with 0."""
    assert [splitmix64(i) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_weights_are_odd_and_distinct() -> None:
    assert (LANE_WEIGHT & np.uint64(1) == 1).all()
    assert (ROW_WEIGHT & np.uint64(3) == 2).all()
    assert LENGTH_WEIGHT % 2 == 1
    assert len({*LANE_WEIGHT.tolist(), *ROW_WEIGHT.tolist(), LENGTH_WEIGHT}) == 33


@pytest.mark.parametrize("nbytes", SIZES)
def test_formula(nbytes: int) -> None:
    data = noise(nbytes)
    assert checksum(data) == formula(data.tobytes())


def test_golden_values() -> None:
    """Arenas and remote stores hold version 1, so these values never change."""
    assert checksum(np.zeros(0, np.uint8)) == 0
    assert checksum(np.zeros(64, np.uint8)) == 64 * LENGTH_WEIGHT & MASK
    assert checksum(np.arange(200, dtype=np.uint8)) == formula(bytes(range(200))) == 0x17C21A43F31FE17C


@pytest.mark.parametrize("nbytes", [n for n in SIZES if n and n % 64 == 0])
def test_numba_is_the_formula(nbytes: int) -> None:
    data = noise(nbytes)
    assert numba_checksum(data) == checksum(data)


@pytest.mark.parametrize("run", [1, 7, 64, 128, 448])
def test_numba_sums_runs_as_one_plane(run: int) -> None:
    data = noise(448 * 4)
    assert numba_checksum(data, run) == checksum(data)


def test_a_numba_plane_is_padded_with_zeros() -> None:
    """A plane of 30 bytes takes 64 in a slot. The checksum covers the padded plane."""
    data = noise(30)
    assert numba_checksum(data) == checksum(np.pad(data, (0, 34)))


def test_all_bits_set_do_not_overflow() -> None:
    data = np.full(1 << 20, 255, np.uint8)
    assert numba_checksum(data) == checksum(data) == formula(data.tobytes())


def test_any_flipped_bit() -> None:
    data = noise(200)
    want = checksum(data)
    seen = {want}
    for bit in range(8 * data.size):
        data[bit // 8] ^= 1 << (bit % 8)
        seen.add(checksum(data))
        data[bit // 8] ^= 1 << (bit % 8)
    assert len(seen) == 8 * data.size + 1
    assert checksum(data) == want


@given(st.integers(1, 300), st.integers(0, 8 * 300 - 1), st.integers(0, 8 * 300 - 1), st.integers(0, 3))
def test_any_two_flipped_bits(nbytes: int, a: int, b: int, seed: int) -> None:
    data = noise(nbytes, seed)
    a, b = a % (8 * nbytes), b % (8 * nbytes)
    flipped = data.copy()
    flipped[a // 8] ^= 1 << (a % 8)
    flipped[b // 8] ^= 1 << (b % 8)
    assert (checksum(flipped) == checksum(data)) == (a == b)


def test_two_flipped_top_bits() -> None:
    """64-bit sums with even weights fail here: 2^31 * w + 2^31 * w' must not vanish."""
    data = np.zeros((8, 16), "<u4")
    want = checksum(data.view(np.uint8))
    cells = [(row, lane) for row in range(8) for lane in range(16)]
    for i, first in enumerate(cells):
        for second in cells[i + 1 :]:
            data[first] = data[second] = 1 << 31
            assert checksum(data.view(np.uint8)) != want, (first, second)
            data[first] = data[second] = 0


def test_swapped_rows_and_lanes() -> None:
    rows = noise(64 * 9).view("<u4").reshape(9, 16)
    want = checksum(rows.view(np.uint8))
    for i in range(9):
        for j in range(i):
            order = list(range(9))
            order[i], order[j] = j, i
            assert checksum(np.ascontiguousarray(rows[order]).view(np.uint8)) != want, ("rows", i, j)
    for i in range(16):
        for j in range(i):
            order = list(range(16))
            order[i], order[j] = j, i
            assert checksum(np.ascontiguousarray(rows[:, order]).view(np.uint8)) != want, ("lanes", i, j)


def test_shifted_rotated_and_torn() -> None:
    data = noise(64 * 6)
    want = checksum(data)
    for shift in (1, 4, 8, 32, 64, 128):
        assert checksum(np.roll(data, shift)) != want, shift
    other = noise(64 * 6, seed=1)
    for cut in range(64, 64 * 6, 64):
        assert checksum(np.concatenate([data[:cut], other[cut:]])) != want, cut


@pytest.mark.parametrize("nbytes", [1, 63, 64, 65, 200])
def test_truncated_or_extended(nbytes: int) -> None:
    """Extending by zeros also changes the checksum. Zeros add nothing to the sum of lanes, but the length has a weight."""
    data = noise(nbytes)
    assert len({checksum(data[:n]) for n in range(nbytes + 1)}) == nbytes + 1
    zeros = np.zeros(nbytes, np.uint8)
    assert len({checksum(zeros[:n]) for n in range(nbytes + 1)}) == nbytes + 1


def test_shape_and_strides_do_not_matter() -> None:
    data = noise(256)
    assert checksum(data.reshape(4, 64)) == checksum(data)
    assert checksum(np.repeat(data, 2)[::2]) == checksum(data)
