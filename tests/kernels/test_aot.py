"""What the compiler made of every Triton kernel, for GPUs that need not be here: gates, and counts against a golden file.

After a change that is meant: `python -m kvkern.kernels.aot --write tests/data/aot_counts.json`, and read the diff.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton

from kvkern.kernels import aot
from kvkern.kernels.target import TARGETS, Target, interpreted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1 replaces the compiler"),
]
GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "aot_counts.json").read_text())
ALL = [(target, variant) for target in TARGETS for variant in aot.variants(target)]
COPIES = [(target, variant) for target, variant in ALL if variant.moved_nbytes]


def label(case: Any) -> str:
    return case.name.replace(" ", "_") if hasattr(case, "name") else str(case)


every_kernel = pytest.mark.parametrize(("target", "variant"), ALL, ids=label)
every_copy = pytest.mark.parametrize(("target", "variant"), COPIES, ids=label)


@cache
def built(target: Target, name: str) -> aot.Built:
    return aot.compile_variant(next(v for v in aot.variants(target) if v.name == name), target)


@every_kernel
def test_nothing_spills_and_registers_are_bounded(target: Target, variant: aot.Variant) -> None:
    result = built(target, variant.name)
    assert result.local_nbytes == 0
    limit = variant.max_registers if target.backend == "cuda" else 176  # of 512 a lane of CDNA3 has: two waves a SIMD
    assert result.registers <= limit


@every_copy
def test_the_copy_loop_moves_16_bytes_an_access(target: Target, variant: aot.Variant) -> None:
    """Nothing narrower but block ids: one a tile, or one a vector where a tile spans several blocks.

    A ring reads only past the registers; checksums alone store nothing.
    """
    result = built(target, variant.name)
    loop = result.copy_loop
    assert loop is not None
    vectors = variant.moved_nbytes // 16
    if variant.constants["STORE"]:
        assert set(loop.stores) == {128}
        assert loop.stores[128] >= vectors  # AMD's compiler doubles one for its masked-off lanes
    else:
        assert loop.stores == {}
    reads = loop.asyncs if variant.constants["STAGES"] > 1 else loop.loads
    assert reads == {32: vectors if variant.constants["GROUP"] > 1 else 1, 128: vectors}
    assert {} in (loop.loads, loop.asyncs)


@every_copy
def test_a_ring_fits_shared_memory(target: Target, variant: aot.Variant) -> None:
    """One tile less than stages, and the ids; far below the 99 KiB that a program may have on sm_89, the least of them."""
    result, stages = built(target, variant.name), variant.constants["STAGES"]
    ring = (stages - 1) * variant.constants["UNROLL"] * 4096
    if stages == 1:
        assert result.shared_nbytes <= 1024  # of the reduction at the end
    else:
        assert ring <= result.shared_nbytes <= 64 << 10


@every_kernel
def test_counts_are_those_of_the_golden_file(target: Target, variant: aot.Variant) -> None:
    if triton.__version__ != GOLDEN["triton"]:
        pytest.skip(f"the counts are of triton {GOLDEN['triton']}; installed is {triton.__version__}")
    assert aot.counts(variant, built(target, variant.name)) == GOLDEN["counts"][f"{variant.name} | {target.name}"]


def test_the_golden_file_holds_nothing_else() -> None:
    assert set(GOLDEN["counts"]) == {f"{variant.name} | {target.name}" for target, variant in ALL}


def test_a_narrower_access_would_be_seen() -> None:
    """The gate can fail: runs of 8-byte multiples compile to 8-byte accesses, and their loop says so."""
    from kvkern.kernels import paged_copy_triton

    target = TARGETS[2]
    geometry = paged_copy_triton.Geometry.of((1, 1, 4096 + 8), 8, 4, target.warp_size)
    constants = {"TO_SLOTS": True, "STORE": True, **geometry.constants()}
    variant = aot.Variant("8 bytes", paged_copy_triton.copy_chunks, constants, geometry.num_warps, 128, 1)
    loop = aot.compile_variant(variant, target).copy_loop
    assert loop is not None
    assert set(loop.stores) == {64}


def test_a_spill_would_be_seen() -> None:
    from dataclasses import replace

    target = TARGETS[2]
    variant = next(v for v in aot.variants(target) if v.name == "gather, split K/V 32 KiB")
    assert aot.compile_variant(replace(variant, max_registers=32), target).local_nbytes > 0
