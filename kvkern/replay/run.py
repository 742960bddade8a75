"""`kvkern replay`: cells, a progress bar, a table, JSON and a plot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..demo.report import write_json
from ..errors import ConfigError
from ..policy.persist import Costs, Persist, checked_persist
from . import report
from .cells import MIN, Cell, Result, checked_policies, run


def replay(
    traces: Sequence[Path],
    policies: str,  # comma-separated
    capacities: str,  # comma-separated; see cells.capacity_chunks
    chunk_nbytes: int,
    hints: bool,
    workers: int | None,  # None: one a core
    remote_capacity: str,  # with it, two tiers
    persist: str,  # comma-separated modes of policy/persist.py
    costs: Costs,
    json_path: Path | None,
    plot_path: Path | None,
    console: Console,
) -> list[Result]:
    """Replay, print and write. Raises ConfigError before anything is replayed."""
    names = checked_policies(policies)
    if plot_path is not None:
        names += [name for name in ("lru", MIN) if name not in names]
    for path in traces:
        if not path.is_file():
            raise ConfigError(f"trace {path} is not a file; give .jsonl or .jsonl.gz files of the Mooncake format")
    if remote_capacity and plot_path is not None:
        raise ConfigError("a plot is of one tier; leave out --plot or --remote-capacity")
    modes = [checked_persist(mode.strip()) for mode in persist.split(",")] if remote_capacity else [Persist.ALL]
    sizes = [size.strip() for size in capacities.split(",")]
    cells = [
        Cell(path, name, size, chunk_nbytes, hints, remote_capacity, mode, costs.threshold)
        for path in traces for size in sizes for name in names for mode in modes
    ]  # fmt: skip
    workers = workers or len(os.sched_getaffinity(0))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("replaying", total=len(cells))
        results = run(cells, workers, lambda done: bar.advance(task, done))
    console.print(report.two_tier_table(results, costs.threshold) if remote_capacity else report.table(results))
    if json_path is not None:
        write_json(json_path, [asdict(result) for result in results], hints=hints)
    if plot_path is not None:
        report.draw(results, plot_path)
        console.print(f"plot: {plot_path}")
    return results
