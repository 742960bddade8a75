"""The machine code of every Triton kernel, without a GPU: gates, and counts that must equal a golden file.

After an intended change run `python -m kvkern.kernels.aot --write tests/data/aot_counts.json`, and read the diff.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import triton

from kvkern.kernels import aot
from kvkern.kernels.target import TARGETS, Target, interpreted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1 replaces the compiler"),
]
GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "aot_counts.json").read_text())
ALL = [(target, variant) for target in TARGETS for variant in aot.kernel_variants(target)]
COPIES = [(target, variant) for target, variant in ALL if variant.moved_nbytes]


def each(cases: list[tuple[Target, aot.KernelVariant]]) -> pytest.MarkDecorator:
    """Parametrize a test. All tests of one kernel run in one process, which compiles it once."""
    names = [f"{target.name}-{variant.name}".replace(" ", "_") for target, variant in cases]
    params = [
        pytest.param(target, variant, id=name, marks=pytest.mark.xdist_group(name))
        for (target, variant), name in zip(cases, names, strict=True)
    ]
    return pytest.mark.parametrize(("target", "variant"), params)


every_kernel, every_copy = each(ALL), each(COPIES)


@cache
def built(target: Target, name: str) -> aot.CompiledKernel:
    return aot.compile_variant(next(v for v in aot.kernel_variants(target) if v.name == name), target)


@every_kernel
def test_nothing_spills_and_registers_are_bounded(target: Target, variant: aot.KernelVariant) -> None:
    result = built(target, variant.name)
    assert result.local_nbytes == 0
    limit = variant.max_registers if target.backend == "cuda" else 176  # of CDNA3's 512 per lane: two waves per SIMD
    assert result.registers <= limit


@every_copy
def test_the_copy_loop_moves_16_bytes_an_access(target: Target, variant: aot.KernelVariant) -> None:
    """The only narrower accesses read block ids: one per tile, or one per vector if a tile spans several blocks.

    A ring reads only past the registers. Checksums alone store nothing.
    """
    result = built(target, variant.name)
    loop = result.copy_loop
    assert loop is not None
    vectors = variant.moved_nbytes // 16
    if variant.constants["STORE"]:
        assert set(loop.stores) == {128}
        assert loop.stores[128] >= vectors  # AMD's compiler doubles one store for masked-off lanes
    else:
        assert loop.stores == {}
    reads = loop.asyncs if variant.constants["STAGES"] > 1 else loop.loads
    assert reads == {32: vectors if variant.constants["GROUP"] > 1 else 1, 128: vectors}
    assert {} in (loop.loads, loop.asyncs)


@every_copy
def test_a_ring_fits_shared_memory(target: Target, variant: aot.KernelVariant) -> None:
    """The ring takes one tile less than stages, and the block ids. sm_89 has the smallest limit: 99 KiB per program."""
    result, stages = built(target, variant.name), variant.constants["STAGES"]
    ring = (stages - 1) * variant.constants["UNROLL"] * 4096
    if stages == 1:
        assert result.shared_nbytes <= 1024  # for the reduction at the end
    else:
        assert ring <= result.shared_nbytes <= 64 << 10


@every_kernel
def test_counts_are_those_of_the_golden_file(target: Target, variant: aot.KernelVariant) -> None:
    if triton.__version__ != GOLDEN["triton"]:
        pytest.skip(f"the counts are of triton {GOLDEN['triton']}; installed is {triton.__version__}")
    assert (
        aot.golden_record(variant, built(target, variant.name)) == GOLDEN["counts"][f"{variant.name} | {target.name}"]
    )


def test_the_golden_file_holds_nothing_else() -> None:
    assert set(GOLDEN["counts"]) == {f"{variant.name} | {target.name}" for target, variant in ALL}


def test_a_narrower_access_would_be_seen() -> None:
    """The gate can fail: runs that are multiples of 8 bytes compile to 8-byte accesses, and the counts show it."""
    from kvkern.kernels import paged_copy_triton

    target = TARGETS[2]
    geometry = paged_copy_triton.TileGeometry.of((1, 1, 4096 + 8), 8, 4, target.warp_size)
    constants = {"TO_SLOTS": True, "STORE": True, **geometry.constants()}
    variant = aot.KernelVariant("8 bytes", paged_copy_triton.copy_chunks, constants, geometry.num_warps, 128, 1)
    loop = aot.compile_variant(variant, target).copy_loop
    assert loop is not None
    assert set(loop.stores) == {64}


def test_a_spill_would_be_seen() -> None:
    from dataclasses import replace

    target = TARGETS[2]
    variant = next(v for v in aot.kernel_variants(target) if v.name == "gather, split K/V 32 KiB")
    assert aot.compile_variant(replace(variant, max_registers=32), target).local_nbytes > 0
