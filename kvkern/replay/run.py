"""`kvkern replay`: runs the grid with a progress bar; prints tables and writes JSON and a plot."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import ConfigError
from ..measurement_json import write_json
from ..option_values import checked_input_file, checked_output_file
from ..policy.persist_modes import Costs
from . import report
from .grid import MIN, Cell, Result, capacity_chunks, checked_policies, run_grid
from .trace import trace_name
from .two_tier import checked_persist_mode, persist_modes_of


def replay(
    traces: Sequence[Path],
    policies: str,  # comma-separated
    capacities: str,  # comma-separated; see grid.capacity_chunks
    chunk_nbytes: int,
    hints: bool,
    workers: int | None,  # None: one a core
    remote_capacity: str,  # not empty: replay two tiers
    persist: str,  # comma-separated modes of policy/persist_modes.py, or `oracle`; empty: all that a policy can do
    costs: Costs,
    json_path: Path | None,
    plot_path: Path | None,
    console: Console,
) -> list[Result]:
    """Replay traces, print the tables, and write JSON and plot.

    Raises ConfigError before anything is replayed if an argument is bad, and later if a trace or an output file fails.
    """
    names = checked_policies(policies)
    if plot_path is not None:
        names += [name for name in ("lru", MIN) if name not in names]
    _check_paths(traces, json_path, plot_path)
    if remote_capacity and plot_path is not None:
        raise ConfigError("--plot draws one tier, but --remote-capacity asks for two; leave out one of them")
    sizes = list(dict.fromkeys(size.strip() for size in capacities.split(",")))
    for size in [*sizes, remote_capacity or "1"]:
        capacity_chunks(size, 1, chunk_nbytes)
    modes = {name: _selected_modes(name, persist) if remote_capacity and name != MIN else ["all"] for name in names}
    cells = [
        Cell(path, name, size, chunk_nbytes, hints, remote_capacity, mode, costs.threshold)
        for path in traces for size in sizes for name in names for mode in modes[name]
    ]  # fmt: skip
    workers = workers or len(os.sched_getaffinity(0))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("replaying", total=len(cells))
        results = run_grid(cells, workers, lambda done: bar.advance(task, done))
    console.print(
        report.two_tier_tables(results, costs.threshold) if remote_capacity else report.hit_ratio_tables(results)
    )
    for trace, count in {result.trace: result.num_backwards for result in results if result.num_backwards}.items():
        console.print(
            f"{trace}: {count:,} requests are older than the request above them; they are replayed at its time"
        )
    try:
        if json_path is not None:
            write_json(json_path, [result.row() for result in results], hints=hints)
        if plot_path is not None:
            report.draw_plot(results, plot_path)
            console.print(f"plot: {plot_path}")
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}; give another path") from error
    return results


def _selected_modes(policy: str, persist: str) -> list[str]:
    """Return the persist modes to replay, each once. Raises ConfigError if the policy cannot do one."""
    modes = list(dict.fromkeys(mode.strip() for mode in persist.split(","))) if persist else persist_modes_of(policy)
    for mode in modes:
        checked_persist_mode(mode, policy)
    return modes


def _check_paths(traces: Sequence[Path], json_path: Path | None, plot_path: Path | None) -> None:
    """Check the paths before the replay, which may take minutes. Raises ConfigError."""
    for path in traces:
        checked_input_file(path, "a trace")
    names = [trace_name(path) for path in traces]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two traces are named {name!r}, and results are listed by name; rename one or replay it alone"
            )
    for name, out in (("json", json_path), ("plot", plot_path)):
        if out is not None:
            checked_output_file(out, name)
    if plot_path is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed; pip install 'kvkern[demo]'")
