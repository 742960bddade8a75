"""Prints the doctor's facts and findings: aligned for people, or as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import format_nbytes
from ..transfer.gpu.calibrate import rich_table
from .facts import ENGINES, OPTIONAL, VECTORS, Facts, Gpu
from .findings import Finding, Severity

_STYLES = {Severity.BROKEN: "bold red", Severity.SLOW: "yellow", Severity.NOTE: "cyan"}


def as_json(facts: Facts, found: Sequence[Finding]) -> str:
    """Return a JSON object with "facts" (calibration tables included) and "findings"."""
    return msgspec.json.encode({"facts": facts, "findings": found}, order="sorted").decode()


def print_report(facts: Facts, found: Sequence[Finding], console: Console | None = None) -> None:
    """Print facts, calibration and findings, by default to standard output."""
    console = console or Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _fact_rows(facts):
        table.add_row(Text(name), Text(value))
    console.print(table)
    for number, gpu in enumerate(facts.gpus):
        console.print(f"\ncalibration of GPU {number}" + ("" if gpu.is_saved else ", not measured yet"))
        console.print(rich_table(gpu.table))
        console.print("~ published by others or estimated; not measured here")
    console.print()
    for finding in found:
        console.print(Text(f"{finding.severity:<7}", _STYLES[finding.severity]) + Text(finding.what), soft_wrap=True)
        console.print(Text(f"       -> {finding.remedy}"), soft_wrap=True)
    if not any(finding.severity is not Severity.NOTE for finding in found):
        console.print("kvkern found nothing here that makes it slow")


def _fact_rows(facts: Facts) -> Iterator[tuple[str, Any]]:
    if not facts.gpus:
        yield "GPU", f"none found; {facts.nvml}"
    for number, gpu in enumerate(facts.gpus):
        yield f"GPU {number}", f"{gpu.info.name}, {format_nbytes(gpu.info.memory_nbytes)}, {gpu.info.bus_id}"
        yield "  link", _link_text(gpu)
        yield "  NUMA node", "unknown" if gpu.info.numa_node is None else str(gpu.info.numa_node)
    if facts.gpus:
        yield "driver", f"{facts.gpus[0].info.driver}, CUDA {facts.cuda // 1000}.{facts.cuda % 1000 // 10}"
        yield "batch copies", "yes" if facts.gpus[0].table.abilities.batch_api else "no"
    yield "CPU", f"{facts.cpu or facts.machine}, {len(facts.cpus)} for this process, {_vector_text(facts)}"
    nodes = ", ".join(map(str, facts.process_nodes)) or "-"
    yield "NUMA nodes", f"{max(1, len(facts.nodes))}, this process on {nodes}"
    yield "memory", f"{format_nbytes(facts.memory_nbytes)} free {facts.memory_source}"
    lock = "unlimited" if facts.memlock_nbytes is None else format_nbytes(facts.memlock_nbytes)
    yield "lockable", f"{lock}; an arena would take {format_nbytes(facts.needed_nbytes)}"
    total, free = format_nbytes(facts.arena_total_nbytes), format_nbytes(facts.arena_free_nbytes)
    yield facts.arena_dir, f"{facts.arena_fs or 'missing'}, {total}, {free} free"
    yield "huge pages", f"shmem_enabled {facts.shmem_huge or 'unknown'}, Linux {facts.kernel}"
    yield "numba cache", ("cold" if facts.numba_cold else "warm") + ("" if facts.numba_writable else ", read-only")
    yield (
        "versions",
        ", ".join(f"{n} {facts.versions[n]}" for n in ("numba", "numpy", *OPTIONAL, *ENGINES) if n in facts.versions),
    )
    if absent := [name for name in OPTIONAL if name not in facts.versions]:
        yield "  absent", ", ".join(absent)


def _link_text(gpu: Gpu) -> str:
    info = gpu.info
    if info.c2c:
        return "NVLink-C2C"
    now, built = f"{info.generation} x{info.width}", f"{info.generation_gpu} x{info.width_gpu}"
    return f"PCIe {now} now (P{info.power_state}), generation {info.generation_here} at most here, built for {built}"


def _vector_text(facts: Facts) -> str:
    if not facts.cpu_flags:
        return facts.machine
    return next(name for name in VECTORS if name in facts.cpu_flags).upper()
