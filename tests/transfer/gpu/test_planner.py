"""The planner's choices: break-evens of published measurements, odd tables, and properties that hold for every table."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkern.transfer.gpu.link_table import Abilities, Calibration, Costs, Direction, HostLink, Rate, seed_calibration
from kvkern.transfer.gpu.planner import (
    MAX_PIECE_NBYTES,
    MIN_PIECE_NBYTES,
    Choice,
    Estimate,
    Method,
    break_even_nbytes,
    choose_method,
    estimate_methods,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
GEN5, GEN4 = seed_calibration(HostLink(5)), seed_calibration(HostLink(4))
GH200 = seed_calibration(HostLink(5, c2c=True))
both_ways = pytest.mark.parametrize("direction", list(Direction))
pcie = pytest.mark.parametrize("table", [GEN4, GEN5], ids=["gen4", "gen5"])


def method(table: Calibration, direction: Direction, run_nbytes: int, nbytes: int) -> Method:
    return choose_method(table, direction, run_nbytes, -(-nbytes // run_nbytes), nbytes).method


@both_ways
def test_break_even_of_a_descriptor(direction: Direction) -> None:
    """Submission takes as long as the wire at 26.5 KB and 12.5 KB."""
    assert break_even_nbytes(GEN5, direction) == pytest.approx(26_500, rel=0.01)
    assert break_even_nbytes(GEN4, direction) == pytest.approx(12_500, rel=0.01)
    assert break_even_nbytes(seed_calibration(HostLink(5), Abilities(batch_api=False)), direction) == pytest.approx(
        6 * 26_500, rel=0.01
    )


@pcie
@both_ways
@pytest.mark.parametrize("run_nbytes", [656, 1152, 18 * KIB])
def test_mla_is_staged(table: Calibration, direction: Direction, run_nbytes: int) -> None:
    """DeepSeek-V3: 656 B and 1152 B a token and layer, 18 KiB a block and layer."""
    for nbytes in (2 * MIB, 64 * MIB, GIB):
        assert method(table, direction, run_nbytes, nbytes) is Method.STAGED


@pcie
@both_ways
@pytest.mark.parametrize("run_nbytes", [128 * KIB, 256 * KIB, 2 * MIB])
def test_long_runs_are_the_copy_engine_s(table: Calibration, direction: Direction, run_nbytes: int) -> None:
    for nbytes in (2 * MIB, 64 * MIB, GIB):
        assert method(table, direction, run_nbytes, nbytes) is Method.BATCH_DMA


@pcie
@both_ways
@pytest.mark.parametrize("run_nbytes", [1152, 4 * KIB, 18 * KIB, 32 * KIB, 64 * KIB, 128 * KIB])
def test_small_jobs_are_one_launch(table: Calibration, direction: Direction, run_nbytes: int) -> None:
    """One launch takes less time than a launch and a copy."""
    assert method(table, direction, run_nbytes, 128 * KIB) is Method.ZERO_COPY


@pcie
@both_ways
@pytest.mark.parametrize("count", [64, 256, 32_768])
def test_llama_blocks_are_staged(table: Calibration, direction: Direction, count: int) -> None:
    """Llama-3.1-8B, K and V apart: 32 KiB a block and layer."""
    assert choose_method(table, direction, 32 * KIB, count, count * 32 * KIB).method is Method.STAGED


@pytest.mark.parametrize("nbytes", [64 * KIB, 192 * KIB, 255 * KIB])
@pytest.mark.parametrize("run_nbytes", [656, 18 * KIB, 32 * KIB, 64 * KIB])
@pcie
@both_ways
def test_below_256_kib_the_wall_decides(table: Calibration, direction: Direction, run_nbytes: int, nbytes: int) -> None:
    """This holds in both directions, whatever the price of thread blocks. For larger loads over PCIe 5 the price decides."""
    assert method(table, direction, run_nbytes, nbytes) is Method.ZERO_COPY
    assert method(GEN5, Direction.H2D, run_nbytes, 256 * KIB) is Method.STAGED
    assert method(table, direction, run_nbytes, MIB) is Method.STAGED


def test_short_runs_to_the_gpu_take_the_published_time() -> None:
    """1 GiB to the GPU in runs of 18 KiB takes the copy engine 150-170 ms, of which 29 ms are submission.

    From the GPU it takes only submission and the wire.
    """
    count = GIB // (18 * KIB)
    for table in (GEN4, GEN5):
        ways = {way.method: way for way in estimate_methods(table, Direction.H2D, 18 * KIB, count, GIB)}
        assert 0.150 < ways[Method.BATCH_DMA].wall_s < 0.170
        assert ways[Method.BATCH_DMA].cpu_s == pytest.approx(0.029, rel=0.02)
        assert ways[Method.STAGED].wall_s < 0.3 * ways[Method.BATCH_DMA].wall_s
    out = {way.method: way for way in estimate_methods(GEN5, Direction.D2H, 18 * KIB, count, GIB)}
    assert out[Method.BATCH_DMA].wall_s == pytest.approx(0.029, rel=0.05)
    longer = {way.method: way for way in estimate_methods(GEN5, Direction.H2D, 28 * KIB, GIB // (28 * KIB), GIB)}
    assert GIB / longer[Method.BATCH_DMA].wall_s / 1e9 > 39.9  # as published for 50,000 of them


@pytest.mark.parametrize("run_nbytes", [4 * KIB, 8 * KIB, 18 * KIB, 24 * KIB])
def test_a_fast_cpu_does_not_make_short_runs_fast(run_nbytes: int) -> None:
    """By a submission time of 50 ns alone, all of these would go to the copy engine."""
    fast = GEN5.with_costs(Direction.H2D, replace(GEN5.h2d, descriptor_s=50e-9, call_s=1e-6))
    assert break_even_nbytes(fast, Direction.H2D) < 4 * KIB
    assert method(fast, Direction.H2D, run_nbytes, 64 * MIB) is Method.STAGED
    ways = {
        way.method: way for way in estimate_methods(fast, Direction.H2D, run_nbytes, 64 * MIB // run_nbytes, 64 * MIB)
    }
    assert ways[Method.BATCH_DMA].wall_s == pytest.approx(64 * MIB / 6.5e9)
    free = fast.with_costs(Direction.H2D, replace(fast.h2d, short_gb_s=fast.h2d.copy_gb_s))
    quick = {
        way.method: way for way in estimate_methods(free, Direction.H2D, run_nbytes, 64 * MIB // run_nbytes, 64 * MIB)
    }
    assert quick[Method.BATCH_DMA].wall_s <= 1.25 * quick[Method.STAGED].wall_s


def test_the_rate_of_short_runs_applies_to_batches_only() -> None:
    """It does not apply to long runs, nor to one call per run."""
    slow = GEN5.with_costs(Direction.H2D, replace(GEN5.h2d, short_gb_s=0.5))
    for table, run_nbytes in ((slow, 28 * KIB), (replace(slow, abilities=Abilities(batch_api=False)), 4 * KIB)):
        way = next(iter(estimate_methods(table, Direction.H2D, run_nbytes, 1000, 1000 * run_nbytes)))
        assert way.wall_s < 1000 * run_nbytes / 0.5e9 / 2


@both_ways
@pytest.mark.parametrize("run_nbytes", [18 * KIB, 32 * KIB, 64 * KIB])
@pytest.mark.parametrize("nbytes", [2 * MIB, 64 * MIB, GIB])
def test_one_address_space_needs_no_staging(direction: Direction, run_nbytes: int, nbytes: int) -> None:
    """On GH200 a kernel reaches the rate of the copy engine."""
    assert method(GH200, direction, run_nbytes, nbytes) is Method.ZERO_COPY


@both_ways
@pytest.mark.parametrize("nbytes", [64 * KIB, 2 * MIB, GIB])
def test_host_addresses_that_no_kernel_may_use(direction: Direction, nbytes: int) -> None:
    """Under WSL2 the device sees registered memory at another address."""
    for link in (HostLink(4), HostLink(5), HostLink(5, c2c=True)):
        table = seed_calibration(link, Abilities(host_pointers=False))
        assert method(table, direction, 8 * KIB, nbytes) is not Method.ZERO_COPY


@both_ways
@pytest.mark.parametrize("nbytes", [8 * KIB, 128 * KIB, GIB])
def test_pageable_memory_is_copied_plainly(direction: Direction, nbytes: int) -> None:
    table = seed_calibration(HostLink(5), Abilities(pinned=False))
    assert method(table, direction, 8 * KIB, nbytes) is Method.BATCH_DMA
    (only,) = estimate_methods(table, direction, 8 * KIB, nbytes // (8 * KIB), nbytes)
    assert only.cpu_s == pytest.approx(nbytes // (8 * KIB) * table.costs(direction).copy_s)  # a call a run


def test_without_a_batch_api_long_runs_are_staged_sooner() -> None:
    table = seed_calibration(HostLink(5), Abilities(batch_api=False))
    assert method(table, Direction.D2H, 128 * KIB, GIB) is Method.STAGED
    assert method(table, Direction.D2H, 2 * MIB, GIB) is Method.BATCH_DMA


def test_directions_are_their_own() -> None:
    """On a host with slow loads (11 GB/s beside 25), loads wait for the wire, whichever method submits them."""
    slow = replace(GEN4.h2d, copy_gb_s=11.0, zero_copy=(Rate(8, 11.0),))
    table = GEN4.with_costs(Direction.H2D, slow)
    assert table.costs(Direction.D2H) == GEN4.d2h
    assert break_even_nbytes(table, Direction.H2D) == pytest.approx(5_500)
    ways = {way.method: way for way in estimate_methods(table, Direction.H2D, 64 * KIB, 16, MIB)}
    assert ways[Method.BATCH_DMA].wall_s == pytest.approx(4e-6 + 3e-6 + 16 * 0.5e-6 + MIB / 11e9)
    assert method(table, Direction.H2D, 128 * KIB, MIB) is Method.BATCH_DMA


def test_formulas_by_hand() -> None:
    """64 MiB of 32 KiB runs on PCIe 5: two pieces."""
    ways = {(way.method, way.ctas): way for way in estimate_methods(GEN5, Direction.D2H, 32 * KIB, 2048, 64 * MIB)}
    wire, gather = 32 * MIB / 53e9, 32 * MIB / 400e9
    submit = 4e-6 + 3e-6 + 1024 * 0.5e-6
    assert set(ways) == {
        (Method.BATCH_DMA, 16), (Method.STAGED, 16), (Method.ZERO_COPY, 4), (Method.ZERO_COPY, 8),
    }  # fmt: skip
    batch, staged, direct = ways[Method.BATCH_DMA, 16], ways[Method.STAGED, 16], ways[Method.ZERO_COPY, 8]
    assert batch.wall_s == pytest.approx(submit + wire + max(submit, wire))
    assert batch.cpu_s == pytest.approx(2 * submit)
    assert batch.cta_s == pytest.approx(16 * gather)  # it reads what a gather reads and writes
    assert staged.wall_s == pytest.approx(4e-6 + gather + 2 * (3e-6 + wire))
    assert staged.cpu_s == pytest.approx(2 * 7e-6)
    assert staged.cta_s == pytest.approx(16 * 2 * gather)
    assert direct.wall_s == pytest.approx(2 * 4e-6 + 64 * MIB / (8 * 8 * KIB / 1.3e-6))
    assert direct.cta_s == pytest.approx(8 * direct.wall_s)
    assert direct.price_s == pytest.approx(8e-6 + direct.cta_s / 4)


def test_pieces_hold_the_copy_engine_briefly() -> None:
    """32 MiB take 0.63 ms on PCIe 5. On slower links a piece has half of that."""
    assert choose_method(GEN5, Direction.D2H, 2 * MIB, 512, GIB).piece_nbytes == 32 * MIB
    assert choose_method(GEN4, Direction.D2H, 2 * MIB, 512, GIB).piece_nbytes == 16 * MIB


def test_more_thread_blocks_only_where_asked_for() -> None:
    loads = {n: choose_method(GEN5, Direction.D2H, 4 * KIB, 32, 128 * KIB, zero_copy_ctas=n) for n in (8, 12, 1000)}
    assert [choice.max_ctas for choice in loads.values()] == [8, 8, 8]  # 12 gain 5 %: a tie
    table = GEN5.with_costs(
        Direction.D2H, replace(GEN5.d2h, zero_copy=(Rate(8, 10.0), Rate(12, 50.0), Rate(64, 500.0)))
    )
    asked = {n: choose_method(table, Direction.D2H, 4 * KIB, 64, 256 * KIB, zero_copy_ctas=n) for n in (8, 12, 1000)}
    assert [(c.method, c.max_ctas) for c in asked.values()] == [
        (Method.STAGED, 16), (Method.ZERO_COPY, 12), (Method.ZERO_COPY, 12),
    ]  # fmt: skip


@both_ways
def test_nothing_to_move(direction: Direction) -> None:
    assert choose_method(GEN5, direction, 0, 0, 0).piece_nbytes in (MIN_PIECE_NBYTES, MAX_PIECE_NBYTES)
    assert choose_method(GEN5, direction, 1, 1, 1).piece_nbytes in (MIN_PIECE_NBYTES, MAX_PIECE_NBYTES)


# -- any table -------------------------------------------------------------------------------------------------------------

speeds = st.floats(0.1, 5000.0)
times = st.floats(1e-8, 1e-3)


def rates(*ctas: int) -> st.SearchStrategy[tuple[Rate, ...]]:
    return st.tuples(*(speeds.map(lambda gb_s, n=n: Rate(n, gb_s)) for n in ctas))  # type: ignore[misc]


costs = st.builds(
    Costs, speeds, times, times, times, speeds, times, rates(1, 2, 4, 8, 12, 16, 64), rates(8, 16, 24, 32, 64)
)
tables = st.builds(
    Calibration, costs, costs, st.just(HostLink()), st.builds(Abilities, st.booleans(), st.booleans(), st.booleans())
)
directions = st.sampled_from(Direction)
sizes = st.tuples(st.integers(1, 4 * MIB), st.integers(1, 5000))


def scaled(of: Costs, by: float) -> Costs:
    """Return costs where everything takes `by` times as long."""
    values = {f.name: getattr(of, f.name) for f in fields(of)}
    for name, value in values.items():
        if name.endswith("gb_s"):
            values[name] = value / by
        elif name.endswith("_s"):
            values[name] = value * by
        elif name in ("zero_copy", "relayout"):
            values[name] = tuple(Rate(rate.ctas, rate.gb_s / by) for rate in value)
    return Costs(**values)


@given(tables, directions, sizes, st.integers(0, 100))
def test_no_table_leads_outside_the_limits(
    table: Calibration, direction: Direction, size: tuple[int, int], asked: int
) -> None:
    run_nbytes, count = size
    choice = choose_method(table, direction, run_nbytes, count, run_nbytes * count, asked)
    able = table.abilities
    assert choice.method is not Method.ZERO_COPY or (able.host_pointers and able.pinned)
    assert choice.method is Method.BATCH_DMA or able.pinned
    low, high = {
        Method.BATCH_DMA: (0, 32), Method.STAGED: (16, 32), Method.ZERO_COPY: (1, min(asked, 12)),
    }[choice.method]  # fmt: skip
    assert low <= choice.max_ctas <= high
    assert MIN_PIECE_NBYTES <= choice.piece_nbytes <= MAX_PIECE_NBYTES <= 64_000_000


@given(tables, directions, sizes, st.sampled_from([2.0**-10, 0.25, 2.0, 2.0**10]))
def test_scaling_all_costs_changes_nothing(
    table: Calibration, direction: Direction, size: tuple[int, int], by: float
) -> None:
    """Floating point scales powers of two exactly. The size of a piece is the only limit in seconds, and is not compared."""
    run_nbytes, count = size
    other = replace(table, d2h=scaled(table.d2h, by), h2d=scaled(table.h2d, by))
    a, b = (choose_method(t, direction, run_nbytes, count, run_nbytes * count) for t in (table, other))
    assert (a.method, a.max_ctas) == (b.method, b.max_ctas)


@given(tables, directions, sizes)
def test_the_choice_is_among_the_fastest(table: Calibration, direction: Direction, size: tuple[int, int]) -> None:
    run_nbytes, count = size
    job = (table, direction, run_nbytes, count, run_nbytes * count)
    ways, choice = list(estimate_methods(*job)), choose_method(*job)
    (mine,) = (way for way in ways if (way.method, way.ctas) == (choice.method, choice.max_ctas))
    assert mine.wall_s <= 1.25 * min(way.wall_s for way in ways)
    alike = [way for way in ways if way.method is mine.method or run_nbytes * count >= 256 * KIB]
    assert all(way.price_s >= mine.price_s for way in alike if way.wall_s <= min(w.wall_s for w in ways) * 1.25)


@given(tables, directions, sizes, st.integers(1, 64))
def test_more_to_move_never_costs_less(
    table: Calibration, direction: Direction, size: tuple[int, int], more: int
) -> None:
    run_nbytes, count = size

    def ways(count: int) -> dict[tuple[Method, int], Estimate]:
        found = estimate_methods(table, direction, run_nbytes, count, run_nbytes * count)
        return {(way.method, way.ctas): way for way in found}

    few, many = ways(count), ways(count + more)
    assert few.keys() == many.keys()
    for way, cost in few.items():
        assert cost.cpu_s <= many[way].cpu_s
        assert cost.wall_s <= many[way].wall_s * (1 + 1e-9)


@given(directions, st.integers(1, 4096), st.integers(10, 20))
def test_longer_runs_never_turn_away_from_the_copy_engine(direction: Direction, count: int, bits: int) -> None:
    """At the same total size, if DMA is best for short runs, it is also best for long runs."""
    nbytes = count << bits
    for table in (GEN4, GEN5, GH200):
        if choose_method(table, direction, 1 << bits, count, nbytes).method is Method.BATCH_DMA:
            assert choose_method(table, direction, 2 << bits, -(-count // 2), nbytes).method is Method.BATCH_DMA


def test_a_choice_is_a_value() -> None:
    assert choose_method(GEN5, Direction.D2H, 2 * MIB, 512, GIB) == Choice(Method.BATCH_DMA, 16, 32 * MIB)
