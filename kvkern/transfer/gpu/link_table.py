"""The calibration table that the planner reads: what a GPU's link to its host can do. Numbers only; it calls no device.

A table starts as seeds: constants that others have published for the link's generation. `calibrate` replaces the values that
it measures on this machine. `measured` names the replaced values; the others are seeds. Sources of the seeds:

    copy engine      PCIe 4 x16 24.8 GB/s H2D, 25 D2H (nvbandwidth issue 53, A100); PCIe 5 x16 53 (vLLM blog 2026-01-08 and
                     vLLM issue 48434, H100); GH200 346 GB/s, GB300 210 H2D and 192 D2H (nvbandwidth issue 23, SGLang 40278)
    kernels          PCIe 5 x16: 35.2 GB/s H2D, 52.8 D2H (nvbandwidth issue 24); GH200 342 GB/s (nvbandwidth issue 23)
    batch copy       0.5 us of CPU a descriptor, 2.3-3.5 us a call (vLLM issue 48434); a plain copy 2.3-3.5 us (FlexKV 193)
    short runs       H2D on an H100, 10,000 to 100,000 of them in a call until done: 4 KiB 3.8-6.8 GB/s, 8 KiB 5.2-6.8, 16 KiB
                     6.3-7.1, 24 KiB 6.7 (10,000: 25.8), and from 28 KiB on 27.5-44, 64 KiB 39-52 (vLLM pull request 42212);
                     used for every PCIe: an A30 copies 4096 of 8 KiB 4.2 times as slowly as a kernel (vLLM issue 57555).
                     D2H and C2C: nothing is published, so only the cost of submission is assumed
    estimates        bytes in flight of a thread block over a round trip of 1.3 us; 0.8 TB/s read and write for a gather of 16
                     thread blocks; a launch of 4 us; PCIe 3 half of 4, PCIe 6 twice 5; narrower links in proportion
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated

from msgspec import Meta

GB = 1e9  # decimal, as links are sold
SHORT_NBYTES = 28 << 10  # shorter runs make a batch slow, see "short runs" above
# Limits that hold when a table is read from a file. A number outside them cannot be a measurement.
GBs = Annotated[float, Meta(gt=0, lt=1e6)]
Seconds = Annotated[float, Meta(gt=0, lt=1)]


class Direction(StrEnum):
    """Which way the bytes go."""

    D2H = "d2h"  # a store: paged blocks to slots
    H2D = "h2d"  # a load: slots to paged blocks


@dataclass(frozen=True, slots=True)
class HostLink:
    """The link between the GPU and host memory."""

    generation: int = 5  # of PCIe; 0: unknown
    width: int = 16  # lanes; 0: unknown
    c2c: bool = False  # NVLink-C2C, one address space: GH200, GB200, GB10


@dataclass(frozen=True, slots=True)
class Abilities:
    """What this driver and this host memory allow. The planner never chooses a method that needs a False one."""

    batch_api: bool = True  # cuMemcpyBatchAsync exists (CUDA 12.8); else one call per descriptor
    host_pointers: bool = True  # a kernel can use registered memory's host address; False under WSL2 and on some ROCm
    pinned: bool = True  # the arena is registered; else a kernel cannot reach it, and a copy blocks its caller


@dataclass(frozen=True, slots=True)
class Rate:
    """The rate of a kernel with `ctas` thread blocks."""

    ctas: Annotated[int, Meta(gt=0, lt=1 << 16)]
    gb_s: GBs  # 1e9 bytes of payload a second, each byte counted once


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of moving bytes in one direction."""

    copy_gb_s: GBs  # one large plain copy
    copy_s: Seconds  # CPU time of one plain copy
    call_s: Seconds  # CPU time of one batch copy, without its descriptors
    descriptor_s: Seconds  # CPU time of one descriptor of a batch, until submitted
    short_gb_s: GBs  # payload of a batch copy whose runs are below SHORT_NBYTES, from the call until it is done
    launch_s: Seconds  # CPU time of one kernel launch
    zero_copy: tuple[Rate, ...]  # a kernel between paged blocks and host memory, in ascending order of thread blocks
    relayout: tuple[Rate, ...]  # the gather (D2H) or scatter (H2D) between paged blocks and HBM, in the same order
    measured: tuple[str, ...] = ()  # fields that were measured on this machine
    tried: tuple[
        str, ...
    ] = ()  # fields that could not be measured well: they stay seeds, and no start tries them again


@dataclass(frozen=True, slots=True)
class Calibration:
    """All that the planner knows about a device."""

    d2h: Costs
    h2d: Costs
    link: HostLink = HostLink()
    abilities: Abilities = Abilities()

    def costs(self, direction: Direction) -> Costs:
        """Return the costs of one direction."""
        return self.d2h if direction is Direction.D2H else self.h2d

    def with_costs(self, direction: Direction, costs: Costs) -> Calibration:
        """Return this table with the costs of one direction replaced."""
        return replace(self, d2h=costs) if direction is Direction.D2H else replace(self, h2d=costs)


# by PCIe generation, x16: the copy engine's GB/s H2D and D2H, then a kernel's highest GB/s H2D and D2H
_PCIE = {
    3: (12.4, 12.5, 12.4, 12.5),
    4: (24.8, 25.0, 24.8, 25.0),
    5: (53.0, 53.0, 35.2, 52.8),
    6: (106.0, 106.0, 70.4, 105.6),
}
_C2C = (346.0, 346.0, 342.0, 342.0)
_SHORT_GB_S = 6.5  # H2D over PCIe
_LANES = 16
_ROUND_TRIP_S = 1.3e-6
# bytes that a thread block keeps in flight: 8 KiB as in vLLM's Triton kernel, and over C2C 64 KiB as in SGLang's TMA ring
_IN_FLIGHT_NBYTES, _IN_FLIGHT_C2C_NBYTES = 8 << 10, 64 << 10
_ZERO_COPY_CTAS = (4, 8, 12)
_RELAYOUT = (Rate(16, 400.0),)


def seed_calibration(link: HostLink, abilities: Abilities = Abilities()) -> Calibration:
    """Return the table before anything is measured. An unknown generation counts as 4, an unknown width as x16."""
    scale = 1.0 if link.c2c else min(1.0, (link.width or _LANES) / _LANES)
    generation = min(max(link.generation or 4, min(_PCIE)), max(_PCIE))
    copy_in, copy_out, kernel_in, kernel_out = _C2C if link.c2c else _PCIE[generation]
    in_flight = _IN_FLIGHT_C2C_NBYTES if link.c2c else _IN_FLIGHT_NBYTES

    def costs(copy: float, kernel: float, short: float) -> Costs:
        reached = [Rate(ctas, min(kernel * scale, ctas * in_flight / _ROUND_TRIP_S / GB)) for ctas in _ZERO_COPY_CTAS]
        return Costs(
            copy_gb_s=copy * scale,
            copy_s=3e-6,
            call_s=3e-6,
            descriptor_s=0.5e-6,
            short_gb_s=min(short, copy * scale),
            launch_s=4e-6,
            zero_copy=tuple(reached),
            relayout=_RELAYOUT,
        )

    short_in = copy_in if link.c2c else _SHORT_GB_S
    return Calibration(costs(copy_out, kernel_out, copy_out), costs(copy_in, kernel_in, short_in), link, abilities)
