"""The self-test accepts every true layout, refuses every wrong one, and writes to no byte of the engine's tensors."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvkern.kernels import layout as L
from kvkern.kernels import selftest
from kvkern.kernels.errors import LayoutError
from kvkern.kernels.layout import Plane
from kvkern.kernels.paged_copy import Backend
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.kernels.selftest import check_round_trip
from tests.kernels.paged_cases import CASES, noise
from tests.support import storage_bytes


def check_untouched(paged: PagedTensors, run: Callable[[], None]) -> None:
    before = storage_bytes(paged.tensors)
    versions = [tensor._version for tensor in paged.tensors]  # torch counts its own writes, also of equal bytes
    try:
        run()
    finally:
        assert [tensor._version for tensor in paged.tensors] == versions
        for was, now in zip(before, storage_bytes(paged.tensors), strict=True):
            np.testing.assert_array_equal(was, now)


@pytest.mark.parametrize("backend", ["numba", "ref"])
@pytest.mark.parametrize("blocks_per_chunk", [1, 2, 9])
@pytest.mark.parametrize("name", CASES)
def test_a_true_layout_passes_and_its_blocks_are_untouched(name: str, blocks_per_chunk: int, backend: Backend) -> None:
    """Nine blocks per chunk are more than the cache has."""
    paged = CASES[name]()
    check_untouched(paged, lambda: check_round_trip(paged, blocks_per_chunk, backend))


def test_a_cache_of_one_block() -> None:
    tensor = noise(0, (2, 1, 4, 2, 8))
    paged = PagedTensors.bind(L.flash_attention([tensor]), [tensor])
    check_untouched(paged, lambda: check_round_trip(paged, 3))


def _swap_strides(p: Plane) -> Plane:
    return replace(p, stride_token=p.stride_head, stride_head=p.stride_token)


def _swap_heads_and_tokens(p: Plane) -> Plane:
    return replace(
        p, num_tokens=p.num_heads, num_heads=p.num_tokens, stride_token=p.stride_head, stride_head=p.stride_token
    )


def _next_block(p: Plane) -> Plane:
    return replace(p, offset=p.offset + p.stride_block)


LIES: dict[str, Callable[[list[Plane]], list[Plane]]] = {
    "token and head strides swapped": lambda ps: [_swap_strides(p) for p in ps],
    "token and head swapped": lambda ps: [_swap_heads_and_tokens(p) for p in ps],
    "one plane swapped": lambda ps: [*ps[:-1], _swap_strides(ps[-1])],
    "K and V swapped": lambda ps: [
        replace(a, offset=b.offset) for a, b in zip(ps, [ps[1], ps[0], *ps[2:]], strict=True)
    ],
    "V is K": lambda ps: [ps[0], replace(ps[1], offset=ps[0].offset), *ps[2:]],
    "one byte late": lambda ps: [replace(ps[0], offset=ps[0].offset + 1), *ps[1:]],
    "one head late": lambda ps: [replace(ps[0], offset=ps[0].offset + ps[0].stride_head), *ps[1:]],
    "block stride too short": lambda ps: [replace(p, stride_block=p.stride_block // 2) for p in ps],
    "layers swapped": lambda ps: [replace(p, tensor=1 - p.tensor) for p in ps],
}


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_layout_is_an_error_at_start(lie: str, blocks_per_chunk: int) -> None:
    """Without this error the engine would produce wrong text."""
    whole = [noise(i, (2, 8, 4, 3, 32)) for i in range(2)]
    tensors = [t[:, :7] for t in whole]  # leaves room behind the last block, so that bind accepts it
    true = L.flash_attention(tensors)
    false = replace(true, planes=tuple(LIES[lie](list(true.planes))))
    paged = PagedTensors.bind(false, tensors)

    def run() -> None:
        with pytest.raises(LayoutError, match="does not describe the tensors"):
            check_round_trip(paged, blocks_per_chunk)

    check_untouched(paged, run)


@pytest.mark.parametrize(("told", "true"), [("NHD", "HND"), ("HND", "NHD")])
def test_wrong_order_of_a_fused_cache(told: str, true: str) -> None:
    """Shapes alone cannot tell NHD from HND. The engine's strides can, if the claim is about the same tensor."""
    tensor = noise(0, (5, 4, 4, 32))  # as many heads as tokens
    claimed = L.fused_kv([tensor], told)
    engine = replace(claimed, name=f"fused_{true.lower()}")  # how the engine indexes
    paged = PagedTensors.bind(engine, [tensor])
    assert claimed.planes[0].head_major is (told == "HND")

    def run() -> None:
        with pytest.raises(LayoutError):
            check_round_trip(paged)

    check_untouched(paged, run)


def test_other_tensors_than_the_layout_was_made_from() -> None:
    big, small = noise(0, (2, 7, 4, 3, 32)), noise(1, (2, 6, 4, 3, 32))
    layout = L.flash_attention([small])
    paged = PagedTensors.bind(layout, [big])  # it has enough bytes, but V lies elsewhere

    def run() -> None:
        with pytest.raises(LayoutError):
            check_round_trip(paged)

    check_untouched(paged, run)


def test_planes_and_tensors_must_match_in_number() -> None:
    tensors = [noise(i, (4, 4, 36)) for i in range(2)]
    layout = L.mla(tensors)
    paged = PagedTensors(layout, (tensors[0], tensors[1], tensors[1]), layout.bases(tensors))
    with pytest.raises(LayoutError, match="has 2 planes, but its tensors make 3 planes"):
        check_round_trip(paged)


@pytest.mark.parametrize("stride", [0, 16])
def test_blocks_in_the_same_bytes_are_refused(stride: int) -> None:
    tensor = noise(0, (4, 4, 36)).as_strided((4, 4, 36), (stride, 36, 1))
    paged = PagedTensors.bind(L.mla([tensor]), [tensor])
    with pytest.raises(LayoutError, match="into the same bytes"):
        check_round_trip(paged)


def test_an_engine_that_computes_meanwhile_loses_no_write_and_sees_no_error() -> None:
    """Every block keeps the last value that the engine wrote. A read of half-written blocks is no error of the layout."""
    tensor = noise(0, (2, 40, 4, 3, 32))
    paged = PagedTensors.bind(L.flash_attention([tensor]), [tensor])
    lost: list[int] = []
    stop = threading.Event()

    def compute() -> None:
        for step in itertools.count():
            if stop.is_set():
                return
            tensor.fill_(step % 100)
            if not bool((tensor == step % 100).all()):
                lost.append(step)

    engine = threading.Thread(target=compute)
    engine.start()
    try:
        for _ in range(20):
            check_round_trip(paged, 2)
    finally:
        stop.set()
        engine.join()
    assert lost == []


@pytest.mark.parametrize("which", ["checksum_chunks", "scatter_chunks"])
def test_checksums_that_differ_are_an_error_at_start(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this error every load would be a miss, and nobody would know why."""
    true = getattr(selftest, which)

    def wrong(*args: Any) -> None:
        true(*args)
        args[-2][0, 1] += np.uint64(1)

    monkeypatch.setattr(selftest, which, wrong)
    tensor = noise(0, (2, 7, 4, 3, 32))
    paged = PagedTensors.bind(L.flash_attention([tensor]), [tensor])

    def run() -> None:
        with pytest.raises(LayoutError, match="checksums differ"):
            check_round_trip(paged, 2)

    check_untouched(paged, run)


def test_kernels_that_miss_the_engines_addresses_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own tensors count too: a kernel may be wrong only far away from block 0."""
    tensor = noise(0, (2, 7, 4, 3, 32))
    paged = PagedTensors.bind(L.flash_attention([tensor]), [tensor])
    true = selftest.gather_chunks

    def wrong(*args: Any) -> None:
        true(*args)
        if args[0] is paged:
            args[2][0, 3] ^= 1

    monkeypatch.setattr(selftest, "gather_chunks", wrong)
    with pytest.raises(LayoutError, match="reads other bytes than the engine's tensor holds"):
        check_round_trip(paged, 2)


def test_blocks_of_nan_are_no_error() -> None:
    """Float payloads are bytes: NaN payloads and negative zeros are equal to themselves."""
    tensor = torch.full((2, 3, 4, 2, 8), float("nan"), dtype=torch.float32)
    tensor[0, 0] = -0.0
    tensor.view(torch.int32)[1, 2] = 0x7FA00001  # a signalling NaN
    paged = PagedTensors.bind(L.flash_attention([tensor]), [tensor])
    check_untouched(paged, lambda: check_round_trip(paged, 2))
