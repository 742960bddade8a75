"""Chooses how to move a job between paged blocks and slots. A pure function of the calibration table; it calls no device.

    job = `count` contiguous runs of `run_nbytes` on the GPU's side (neighbours already merged), `nbytes` in all; on the
          host's side whole parts of slots. It is cut into `calls` pieces of at most 32 MiB, which are pipelined:

    pipe(calls, a, b) = a + b + (calls - 1) * max(a, b)         two stages, a and b seconds a piece

              wall                                             CPU                                        thread blocks * time
    BATCH_DMA pipe(calls, launch + call + runs * descriptor,   calls * (launch + call)                    ctas * relayout / 2
                   wire)                                       + count * descriptor
      runs below 28 KiB: at least nbytes / short
      without a batch API: the same with one call per run, `copy` in place of `call + descriptor`, and no `short`
    STAGED    pipe(calls, launch + relayout, copy + wire)      calls * (launch + copy)                    ctas * relayout
    ZERO_COPY calls * launch + nbytes / rate(ctas)             calls * launch                             ctas * wall

    the fastest way, and every way whose wall time is within 25 % of it, are ties;
    among ties the least CPU + thread blocks * time / 4 wins
    below 256 KiB in all, ways of another method are no ties: only the number of thread blocks may differ

Checksums are part of every method. The gather and scatter kernels have the bytes in registers. Beside DMA another kernel reads
the blocks to sum them, which is half of what a gather or scatter moves in HBM. Costs that all methods share (ids up, sums down)
are left out.

Why the formulas have this form:
- Within one batch call the driver first submits, then moves. If submission takes longer than the wire, the rate falls sharply:
  that is the case for runs below `break_even_nbytes` (26.5 KB with the seeds of PCIe 5, 12.5 KB with those of PCIe 4).
- Loads are slower still below 28 KiB (vLLM pull request 42212, an H100). There the driver and the copy engine need longer for a
  descriptor than its submission takes: 1 GiB in runs of 18 KiB takes 150-170 ms, of which 29 ms are submission. A faster CPU
  does not help. So a short descriptor costs max(submitted, done) of wall time, and the time until submitted of CPU time.
- A thread block that copies is taken from the engine's own kernels, so it has a price. With a price of a quarter, runs of
  32-64 KiB are staged, and runs of 128 KiB and more are left to the copy engine, as the measurements of vLLM and SGLang advise.
  A large job never crosses PCIe by zero-copy.
- A small job is one launch, which ends about as fast as the launch itself takes. The engine hardly misses its thread blocks,
  and a request waits for it. So its wall time decides.
- Scaling all times of a table changes no choice of method.
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
# A copy engine is first in, first out, and knows no priorities: the engine's own small copies wait for a whole piece.
MAX_COPY_ENGINE_HOLD_S = 0.7e-3
TIE_FACTOR = 1.25
SMALL_NBYTES = 256 << 10
CTA_PRICE = 1 / 4  # a second of a thread block counts as this many seconds of CPU


class Method(StrEnum):
    """How bytes cross the link. Without a batch API (`Abilities.batch_api`) BATCH_DMA is a loop of plain copies."""

    STAGED = "staged"  # a kernel between paged blocks and a ring in HBM, and one copy per contiguous part of a slot
    ZERO_COPY = "zero_copy"  # one kernel between paged blocks and registered host memory
    BATCH_DMA = "batch_dma"  # the copy engine moves every run; a kernel beside it sums


@dataclass(frozen=True, slots=True)
class Choice:
    """How to move a job."""

    method: Method
    max_ctas: int  # most thread blocks of its kernel; 0: any number
    piece_nbytes: int  # most bytes of a launch or a submission


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated cost of one way to move a job."""

    method: Method
    ctas: int
    wall_s: float
    cpu_s: float
    cta_s: float  # thread blocks * time
    link_gb_s: float  # while it is on the link

    @property
    def price_s(self) -> float:
        """The cost to other work on host and GPU, in seconds of CPU."""
        return self.cpu_s + CTA_PRICE * self.cta_s


def choose_method(
    table: Calibration,
    direction: Direction,
    run_nbytes: int,
    count: int,
    nbytes: int,
    zero_copy_ctas: int = DEFAULT_ZERO_COPY_CTAS,  # at most 12, for layer-wise loads
) -> Choice:
    """Return the best way to move `count` runs of `run_nbytes`, `nbytes` in all (the last run may be shorter).

    It never returns a method that the table's abilities exclude. Deterministic. Sizes of 0 are allowed.
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
    """Yield the cost of every way that the table allows, by the formulas above. BATCH_DMA is always among them."""
    costs, able = table.costs(direction), table.abilities
    calls = max(1, math.ceil(nbytes / MAX_PIECE_NBYTES))
    relayout = [rate for rate in costs.relayout if MIN_RELAYOUT_CTAS <= rate.ctas <= MAX_RELAYOUT_CTAS]
    if not able.pinned:  # a copy from or to pageable memory blocks its caller, so staging would overlap with nothing
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
    """Return the run length whose submission takes as long as its transfer. Shorter runs leave the link idle in any number.

    This is about submission only. Runs below SHORT_NBYTES may be slow for another reason, see `Costs.short_gb_s`.
    """
    costs = table.costs(direction)
    batch = table.abilities.batch_api and table.abilities.pinned
    return (costs.descriptor_s if batch else costs.copy_s) * costs.copy_gb_s * GB


def _estimate_copies(
    costs: Costs, batch: bool, summing: Rate | None, run_nbytes: int, count: int, nbytes: int
) -> Estimate:
    """Estimate BATCH_DMA. `summing` is the gather rate of the kernel that sums beside it; None: there is no such kernel."""
    runs = max(1, MAX_PIECE_NBYTES // max(1, run_nbytes))  # in a piece; a run is never cut
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
