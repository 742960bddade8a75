"""Measures the speed of a device's link, in about 20 ms at the first start. Knows `TimedOperations`, not CUDA.

    for round in 5:                    rounds are outermost: a slow device runs every probe once before it runs one twice
      for probe in probes, most important first:
        for size in (small, large):    skipped if it would end after the deadline
          time it
    take the least time of each size and fit a line through both:  slope = seconds a byte (or descriptor), rest = seconds a call

The least time is the right one, because noise only adds time. The slope excludes what every operation costs at any size.
Compiling and warming up come first and do not count against the 20 ms. A descriptor has two costs: the CPU time until it is
submitted (`descriptor_s`), and the time until it is done (`short_gb_s`), which is a multiple of the first on some GPUs.

A probe has measured nothing if it lacks a size, if its slope is not above 0, or if the two best rounds of a size differ by more
than a quarter of the difference between the times of the two sizes. Then its seed stays, the table marks it, and later starts
do not try again.
The table is saved. The ranks of a host share its memory, so one rank measures at a time, and the others read the saved table.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table

from . import calibration_file
from .calibration_file import DeviceId
from .link_table import GB, Abilities, Calibration, Costs, Direction, Rate, seed_calibration
from .planner import MAX_ZERO_COPY_CTAS, break_even_nbytes

logger = logging.getLogger("kvkern")

BUDGET_S = 0.02
ROUNDS = 5
ZERO_COPY_CTAS, RELAYOUT_CTAS = (4, 8, MAX_ZERO_COPY_CTAS), (16, 32)
_COPY_NBYTES = (1 << 20, 8 << 20)
_ZERO_COPY_NBYTES = (1 << 19, 2 << 20)
_RELAYOUT_NBYTES = (32 << 20, 64 << 20)  # read and written, so together more than an H100's L2 of 50 MB
_DESCRIPTORS = (2, 128)  # a batch of one is a plain copy
_SHORT_RUNS = (64, 512)  # 8 MiB: 1.3 ms at 6.5 GB/s
SHORT_RUN_NBYTES = 16 << 10  # clearly below SHORT_NBYTES
_MIN_TIME_S, _MIN_SLOPE_S = 1e-9, 1e-15  # smaller values mean that the clock did not advance
_MAX_SPREAD = 0.25
HOST_NBYTES, DEVICE_NBYTES = (
    16 << 20,
    64 << 20,
)  # the probes need: pinned host memory; device memory, for pages and for rows each
LOCK_WAIT_S = 60.0  # how long to wait for another process that measures; most of its time is compiling


class TimedOperations(Protocol):
    """Operations on one GPU and registered host memory. Each call runs once and returns the seconds that it took.

    "Until submitted" is from the call until it returns, by the host's clock. "Until done" is from start to end by the device's
    clock, which does not depend on when a thread wakes up. Implementations compile and warm up before they are measured.
    """

    def copy(self, direction: Direction, nbytes: int) -> float:
        """One plain copy, until done."""

    def submit_copy(self, direction: Direction) -> float:
        """One plain copy of a page, until submitted."""

    def submit_batch(self, direction: Direction, count: int) -> float:
        """One batch copy of `count` > 1 pages that do not touch, until submitted. Called only if there is a batch API."""

    def short_runs(self, direction: Direction, count: int) -> float:
        """One batch copy of `count` > 1 runs of SHORT_RUN_NBYTES that do not touch, from its call until done.

        Called only if there is a batch API.
        """

    def launch(self) -> float:
        """One kernel, launched as copies launch theirs, until submitted."""

    def zero_copy(self, direction: Direction, ctas: int, nbytes: int) -> float:
        """The kernel between paged blocks and host memory, until done, without its launch. Called only if it can run."""

    def relayout(self, direction: Direction, ctas: int, nbytes: int) -> float:
        """The gather (D2H) or scatter (H2D) between paged blocks and HBM, until done, without its launch."""


@dataclass
class _Probe:
    """One operation at one or two sizes, and the measured times of each size."""

    name: str
    direction: Direction
    sizes: tuple[int, ...]
    run: Callable[[int], float]
    ctas: int = 0
    times: dict[int, list[float]] = field(
        default_factory=dict
    )  # size: the seconds that the operation returned, ascending
    wall_s: dict[int, float] = field(default_factory=dict)  # size: the least wall time of a call, waiting included

    def expected_s(self, size: int) -> float:
        """Return about how long this size will take; 0 if no time is known."""
        if size in self.wall_s:
            return self.wall_s[size]
        return max((s * size / known for known, s in self.wall_s.items() if known < size), default=0.0)

    def measure(self, size: int, clock: Callable[[], float]) -> None:
        """Run the operation once at this size, and keep its times."""
        begin = clock()
        seconds = self.run(size)
        took = clock() - begin
        self.wall_s[size] = min(took, self.wall_s.get(size, took))
        self.times[size] = sorted([*self.times.get(size, []), seconds])

    def fit_line(self) -> tuple[float, float] | None:
        """Return (seconds per unit of size, seconds per call). None if the times are missing or too noisy."""
        if len(self.times) < len(self.sizes):
            return None
        small, large = self.sizes[0], self.sizes[-1]
        least = {size: times[0] for size, times in self.times.items()}
        if small == large:
            return (0.0, least[small]) if least[small] > _MIN_TIME_S else None
        difference = least[large] - least[small]
        slope = difference / (large - small)
        spread = max(times[1] - times[0] if len(times) > 1 else 0.0 for times in self.times.values())
        if slope <= _MIN_SLOPE_S or spread > _MAX_SPREAD * difference:
            return None
        return slope, max(least[small] - slope * small, _MIN_TIME_S)


def calibrate(
    device: TimedOperations,
    start: Calibration,  # seeds and abilities
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Return `start` with its seeds replaced by what could be measured in `budget_s`.

    It exceeds the budget by at most one operation of a probe's smallest size, whose time is not known before. Raises what the
    device raises.
    """
    deadline = clock() + budget_s
    probes = list(_probes(device, start.abilities))
    for _ in range(ROUNDS):
        for probe in probes:
            for size in probe.sizes:
                now = clock()
                if now >= deadline or now + probe.expected_s(size) > deadline:
                    break
                probe.measure(size, clock)
    table = start
    for direction in Direction:
        mine = [probe for probe in probes if probe.direction is direction]
        table = table.with_costs(direction, _fitted(table.costs(direction), mine))
    return table


def load_or_calibrate(
    make: Callable[[], TimedOperations],  # called only if something is to be measured: it compiles and takes memory
    identity: DeviceId,
    abilities: Abilities,
    folder: Path,  # the user's cache directory
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
    wait_s: float = LOCK_WAIT_S,
) -> Calibration:
    """Return the device's table: saved by an earlier start or another rank, or else measured now and saved. Logged at INFO.

    If another process measures for longer than `wait_s`, this start uses estimates: two measurements at once would each see
    half the speed.
    """
    start = seed_calibration(identity.link, abilities)
    table = calibration_file.load(identity, start, folder)
    if table is None or untried(table):  # untried: this start can measure more than the start that saved the table
        with calibration_file.measuring_lock(folder, wait_s) as alone:
            found = calibration_file.load(identity, start, folder, warn=False)
            if found is not None and not untried(found):
                table = found
            elif alone:
                table = _measured(make, identity, start, folder, budget_s, clock)
            else:
                table = found or start
                logger.warning(
                    "kvkern: another process still measures its GPU after %(waited_s).0f s, so this start uses "
                    "estimates. A later start measures this GPU.", {"event": "gpu_not_measured", "waited_s": wait_s},
                )  # fmt: skip
    for row in (str(identity), *table_text(table).splitlines()):
        logger.info("kvkern: %(row)s", {"event": "gpu_calibration", "row": row})
    return table


def _measured(
    make: Callable[[], TimedOperations], identity: DeviceId, start: Calibration, folder: Path, budget_s: float,
    clock: Callable[[], float],
) -> Calibration:  # fmt: skip
    device, begin = make(), clock()
    table = calibrate(device, start, budget_s, clock)
    logger.info(
        "kvkern: measured the link of %(device)s in %(ms).0f ms",
        {"event": "gpu_measured", "device": identity, "ms": (clock() - begin) * 1e3},
    )
    if left := unmeasured(table):
        logger.warning(
            "kvkern: the calibration did not measure everything well within %(budget_ms).0f ms, so estimates are used for: "
            "%(estimated)s. Delete %(path)s to measure again at the next start.",
            {
                "event": "gpu_partly_measured",
                "budget_ms": budget_s * 1e3,
                "estimated": ", ".join(left),
                "path": calibration_file.path_of(identity, folder),
            },
        )  # fmt: skip
    for direction in Direction:
        tried = tuple(name for d, name in map(str.split, left) if d == direction)
        table = table.with_costs(direction, replace(table.costs(direction), tried=tried))
    calibration_file.save(identity, table, folder)
    return table


def unmeasured(table: Calibration) -> list[str]:
    """Return the costs that could be measured on this device but are still seeds, such as "d2h copy_gb_s"."""
    able = table.abilities
    names = ["copy_gb_s", "copy_s"]
    if able.pinned:
        names += ["launch_s", "relayout"]
    if able.pinned and able.batch_api:
        names += ["descriptor_s", "call_s", "short_gb_s"]
    if able.pinned and able.host_pointers:
        names.append("zero_copy")
    return [f"{d.value} {name}" for d in Direction for name in names if name not in table.costs(d).measured]


def untried(table: Calibration) -> list[str]:
    """Return the unmeasured costs that no start has tried to measure."""
    tried = {f"{d.value} {name}" for d in Direction for name in table.costs(d).tried}
    return [name for name in unmeasured(table) if name not in tried]


def _probes(device: TimedOperations, able: Abilities) -> Iterator[_Probe]:
    def each(
        name: str, sizes: tuple[int, ...], run: Callable[[Direction, int], float], ctas: int = 0
    ) -> Iterator[_Probe]:
        for direction in Direction:
            yield _Probe(name, direction, sizes, lambda size, d=direction: run(d, size), ctas)  # type: ignore[misc]

    yield from each("copy_gb_s", _COPY_NBYTES, device.copy)
    yield from each("copy_s", (1,), lambda direction, _: device.submit_copy(direction))
    if not able.pinned:
        return
    yield from each("launch_s", (1,), lambda direction, _: device.launch())
    if able.batch_api:
        yield from each("batch", _DESCRIPTORS, device.submit_batch)
        yield from each("short_gb_s", _SHORT_RUNS, device.short_runs)
    if able.host_pointers:
        for ctas in ZERO_COPY_CTAS:
            yield from each("zero_copy", _ZERO_COPY_NBYTES, lambda d, size, n=ctas: device.zero_copy(d, n, size), ctas)  # type: ignore[misc]
    for ctas in RELAYOUT_CTAS:
        yield from each("relayout", _RELAYOUT_NBYTES, lambda d, size, n=ctas: device.relayout(d, n, size), ctas)  # type: ignore[misc]


def _fitted(costs: Costs, probes: list[_Probe]) -> Costs:
    """Return these costs with the results of this direction's probes in place."""
    rates: dict[str, list[Rate]] = {}
    values: dict[str, float] = {}
    for probe in probes:
        if (line := probe.fit_line()) is None:
            continue
        slope, rest = line
        if probe.ctas:
            rates.setdefault(probe.name, []).append(Rate(probe.ctas, 1 / slope / GB))
        elif probe.name == "copy_gb_s":
            values["copy_gb_s"] = 1 / slope / GB
        elif probe.name == "short_gb_s":
            values["short_gb_s"] = SHORT_RUN_NBYTES / slope / GB
        elif probe.name == "batch":
            values |= {"descriptor_s": slope, "call_s": rest}
        else:
            values[probe.name] = rest
    found = {**values, **{name: tuple(of) for name, of in rates.items()}}
    return replace(costs, **found, measured=tuple(sorted(found)))  # type: ignore[arg-type]


def table_text(table: Calibration, width: int = 100) -> str:
    """Return the table as plain aligned text. `~` marks seeds."""
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(rich_table(table))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def rich_table(table: Calibration) -> Table:
    """Return the table for a terminal. `~` marks estimates and values published by others, not measured on this device."""
    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    shown.add_column("")
    for title in ("D2H (store)", "H2D (load)"):
        shown.add_column(title, justify="right")

    def row(name: str, field: str, cell: Callable[[Costs], str]) -> None:
        marks = ["" if field in table.costs(d).measured else "~" for d in Direction]
        shown.add_row(name, *(mark + cell(table.costs(d)) for mark, d in zip(marks, Direction, strict=True)))

    able = table.abilities
    row("copy engine, one large copy", "copy_gb_s", lambda costs: f"{costs.copy_gb_s:.1f} GB/s")
    row("  a plain copy", "copy_s", lambda costs: f"{costs.copy_s * 1e6:.2f} us CPU")
    if able.batch_api and able.pinned:
        row("  a batch call", "call_s", lambda costs: f"{costs.call_s * 1e6:.2f} us CPU")
        row("  a descriptor in it", "descriptor_s", lambda costs: f"{costs.descriptor_s * 1e6:.2f} us CPU")
        row("  runs below 28 KiB, until done", "short_gb_s", lambda costs: f"{costs.short_gb_s:.1f} GB/s")
    if able.pinned:
        row("kernel launch", "launch_s", lambda costs: f"{costs.launch_s * 1e6:.2f} us CPU")
        kinds = [("gather or scatter in HBM", "relayout")]
        if able.host_pointers:
            kinds.insert(0, ("zero-copy kernel", "zero_copy"))
        for name, field in kinds:
            for ctas in sorted({rate.ctas for d in Direction for rate in getattr(table.costs(d), field)}):
                row(f"{name}, {ctas} thread blocks", field, lambda costs, f=field, n=ctas: _rate(costs, f, n))  # type: ignore[misc]
    cells = [f"{break_even_nbytes(table, d) / 1e3:.1f} KB" for d in Direction]
    shown.add_row("run whose submission takes as long as its transfer", *cells)
    return shown


def _rate(costs: Costs, field: str, ctas: int) -> str:
    rates: dict[int, float] = {rate.ctas: rate.gb_s for rate in getattr(costs, field)}
    return f"{rates[ctas]:.1f} GB/s" if ctas in rates else "-"
