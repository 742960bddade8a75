"""Chooses how to move a job between paged blocks and slots. A pure function of the calibration table; calls no device.

    job = `count` contiguous runs of `run_nbytes` on the GPU's side (neighbours already merged), `nbytes` in all; on the
          host's side it is whole parts of slots. Cut into `calls` pieces of at most 32 MiB, and piped:

    pipe(calls, a, b) = a + b + (calls - 1) * max(a, b)         two stages, a and b seconds a piece

              wall                                             CPU                                        thread blocks * time
    BATCH_DMA pipe(calls, launch + call + runs * descriptor,   calls * (launch + call)                    ctas * relayout / 2
                   wire)                                       + count * descriptor
      runs below 28 KiB: at least nbytes / short
      no batch: the same with a call a run, `copy` for `call + descriptor`, and no `short`
    STAGED    pipe(calls, launch + relayout, copy + wire)      calls * (launch + copy)                    ctas * relayout
    ZERO_COPY calls * launch + nbytes / rate(ctas)             calls * launch                             ctas * wall

    least wall; those within 25 % of it are ties, and of these the least of CPU + thread blocks * time / 4
    below 256 KiB in all only other numbers of thread blocks of the same method tie

Checksums are part of each: the other kernels have the bytes in registers, beside DMA one reads the blocks for them, which is
half of what a gather or scatter moves in HBM. What all have in common, ids up and sums down, is left out.

Why so: within one batch call the driver submits first and moves then, and submission that takes longer than the wire is a
cliff below `break_even_nbytes` (26.5 KB with the seeds of PCIe 5, 12.5 KB with those of PCIe 4). Loads have a steeper one below
28 KiB (vLLM pull request 42212, an H100): there the driver and the copy engine need more for a descriptor than its submission
takes, 1 GiB in runs of 18 KiB 150-170 ms where 29 ms are submission, and a faster CPU does not help. So a short descriptor
costs the wall max(submitted, done), and the CPU what it takes until submitted. A thread block that copies is taken from the
engine's own kernels, hence its price: with a quarter, runs of 32-64 KiB are staged and those of 128 KiB and more left to the
copy engine, as vLLM's and SGLang's measurements advise; a large job crosses PCIe by zero-copy never. Of a small one, one
launch is over in the time that the launch itself takes: nobody misses its thread blocks, and somebody waits for it.
Scaling all times of a table changes no choice of method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from .link_table import GB, SHORT_NBYTES, Calibration, Costs, Direction, Rate

__all__ = ["Choice", "Direction", "Estimate", "Method", "break_even_nbytes", "choose_method", "estimate_methods"]

DEFAULT_ZERO_COPY_CTAS, MAX_ZERO_COPY_CTAS = 8, 12
MIN_RELAYOUT_CTAS, MAX_RELAYOUT_CTAS = 16, 32  # full grids cost decode 47 % at p99: pegaflow issue 408
MIN_PIECE_NBYTES, MAX_PIECE_NBYTES = 16 << 20, 32 << 20
# A copy engine is first in, first out, and blind to priorities: the engine's own small copies wait for a piece.
MAX_COPY_ENGINE_HOLD_S = 0.7e-3
TIE_FACTOR = 1.25
SMALL_NBYTES = 256 << 10
CTA_PRICE = 1 / 4  # seconds of CPU that a second of a thread block is worth


class Method(StrEnum):
    """How bytes cross. Without a batch API (`Abilities.batch_api`) BATCH_DMA is a loop of plain copies."""

    STAGED = "staged"  # a kernel between paged blocks and a ring in HBM, one copy a contiguous part of a slot
    ZERO_COPY = "zero_copy"  # one kernel between paged blocks and registered host memory
    BATCH_DMA = "batch_dma"  # the copy engine moves every run; a kernel beside it sums


@dataclass(frozen=True, slots=True)
class Choice:
    """How to move a job."""

    method: Method
    max_ctas: int  # thread blocks of its kernel; 0: any
    piece_nbytes: int  # the most a launch or a submission moves


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a way of moving a job would cost."""

    method: Method
    ctas: int
    wall_s: float
    cpu_s: float
    cta_s: float  # thread blocks * time
    link_gb_s: float  # while it is on the link

    @property
    def price_s(self) -> float:
        """What it takes from others, in seconds of CPU."""
        return self.cpu_s + CTA_PRICE * self.cta_s


def choose_method(
    table: Calibration,
    direction: Direction,
    run_nbytes: int,
    count: int,
    nbytes: int,
    zero_copy_ctas: int = DEFAULT_ZERO_COPY_CTAS,  # 12 at most, for layer-wise loads
) -> Choice:
    """The best way to move `count` runs of `run_nbytes`, `nbytes` in all (the last run may be shorter).

    Never a method that the table's abilities exclude. Deterministic; sizes of 0 are allowed.
    """
    ways = list(estimate_methods(table, direction, run_nbytes, count, nbytes, zero_copy_ctas))
    fastest = min(ways, key=lambda way: way.wall_s)
    ties = [way for way in ways if way.wall_s <= TIE_FACTOR * fastest.wall_s]
    if nbytes < SMALL_NBYTES:
        ties = [way for way in ties if way.method is fastest.method]
    best = min(ties, key=lambda way: (way.price_s, way.ctas))
    fits = _transfer_s(MAX_PIECE_NBYTES, best.link_gb_s) <= MAX_COPY_ENGINE_HOLD_S
    return Choice(best.method, best.ctas, MAX_PIECE_NBYTES if fits else MIN_PIECE_NBYTES)


def estimate_methods(
    table: Calibration,
    direction: Direction,
    run_nbytes: int,
    count: int,
    nbytes: int,
    zero_copy_ctas: int = DEFAULT_ZERO_COPY_CTAS,
) -> Iterator[Estimate]:
    """Every way that the table allows, with what it would cost; see the formulas above. Copies are always among them."""
    costs, able = table.costs(direction), table.abilities
    calls = max(1, math.ceil(nbytes / MAX_PIECE_NBYTES))
    relayout = [rate for rate in costs.relayout if MIN_RELAYOUT_CTAS <= rate.ctas <= MAX_RELAYOUT_CTAS]
    if not able.pinned:  # a copy from or to pageable memory holds its caller: nothing to overlap, nothing to stage for
        yield _estimate_copies(costs, False, None, run_nbytes, count, nbytes)
        return
    yield _estimate_copies(costs, able.batch_api, relayout[0] if relayout else None, run_nbytes, count, nbytes)
    for rate in relayout:
        yield _estimate_staged(costs, rate, calls, nbytes)
    if able.host_pointers:
        for rate in costs.zero_copy:
            if rate.ctas <= min(zero_copy_ctas, MAX_ZERO_COPY_CTAS):
                wall_s = calls * costs.launch_s + _transfer_s(nbytes, rate.gb_s)
                cpu_s = calls * costs.launch_s
                yield Estimate(Method.ZERO_COPY, rate.ctas, wall_s, cpu_s, rate.ctas * wall_s, rate.gb_s)


def break_even_nbytes(table: Calibration, direction: Direction) -> float:
    """The run whose submission takes as long as its transfer. Shorter ones leave the link idle, however many there are.

    Of submission alone: what is below SHORT_NBYTES may be slow for another reason, see `Costs.short_gb_s`.
    """
    costs = table.costs(direction)
    batch = table.abilities.batch_api and table.abilities.pinned
    return (costs.descriptor_s if batch else costs.copy_s) * costs.copy_gb_s * GB


def _estimate_copies(
    costs: Costs, batch: bool, summing: Rate | None, run_nbytes: int, count: int, nbytes: int
) -> Estimate:
    """`summing`: how fast the kernel beside it would gather; None: there is none."""
    runs = max(1, MAX_PIECE_NBYTES // max(1, run_nbytes))  # of a piece; a run is never cut
    pieces = max(1, math.ceil(count / runs))
    cpu_s = pieces * costs.call_s + count * costs.descriptor_s if batch else count * costs.copy_s
    calls = pieces if batch else max(1, count)
    ctas, cta_s = 0, 0.0
    if summing is not None:
        cpu_s += pieces * costs.launch_s
        ctas, cta_s = summing.ctas, summing.ctas * _transfer_s(nbytes, 2 * summing.gb_s)
    wall_s = _pipelined_s(calls, cpu_s / calls, _transfer_s(nbytes, costs.copy_gb_s) / calls)
    if batch and run_nbytes < SHORT_NBYTES:
        wall_s = max(wall_s, _transfer_s(nbytes, costs.short_gb_s))
    return Estimate(Method.BATCH_DMA, ctas, wall_s, cpu_s, cta_s, costs.copy_gb_s)


def _estimate_staged(costs: Costs, rate: Rate, calls: int, nbytes: int) -> Estimate:
    relayout_s, wire_s = _transfer_s(nbytes, rate.gb_s), _transfer_s(nbytes, costs.copy_gb_s)
    cpu_s = calls * (costs.launch_s + costs.copy_s)
    wall_s = _pipelined_s(calls, costs.launch_s + relayout_s / calls, costs.copy_s + wire_s / calls)
    return Estimate(Method.STAGED, rate.ctas, wall_s, cpu_s, rate.ctas * relayout_s, costs.copy_gb_s)


def _pipelined_s(calls: int, first_s: float, second_s: float) -> float:
    return first_s + second_s + (calls - 1) * max(first_s, second_s)


def _transfer_s(nbytes: int, gb_s: float) -> float:
    return nbytes / (gb_s * GB)
