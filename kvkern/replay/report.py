"""Turns results into tables and a plot. Replays nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from .grid import MIN, Result

STYLES = {  # policy -> colour, line, width; other policies get matplotlib's defaults
    MIN: ("#52606d", "--", 1.4), "lru": ("#9aa5b1", "-", 1.4), "grit": ("#e4572e", "-", 2.2),
    "arc": ("#4c78a8", "-", 1.2), "s3fifo": ("#54a24b", "-", 1.2), "lirs": ("#b279a2", "-", 1.2),
}  # fmt: skip
NAMES = {MIN: "MIN", "lru": "LRU", "grit": "GRIT", "arc": "ARC", "s3fifo": "S3-FIFO", "lirs": "LIRS"}


def hit_ratio_tables(results: Sequence[Result]) -> Group:
    """Make a table for each trace: a row for each capacity, a column for each policy, the best policy in bold."""
    tables: list[RenderableType] = ["\nhit ratio: chunks of the longest cached prefix as a share of all chunks"]
    for trace, mine in _by_trace(results):
        policies = list(dict.fromkeys(result.policy for result in mine))
        shown = _table(trace, "capacity\nchunks", "of\nunique", *(NAMES.get(policy, policy) for policy in policies))
        for capacity in dict.fromkeys(result.capacity_chunks for result in mine):
            row = {result.policy: result for result in mine if result.capacity_chunks == capacity}
            best = max((result.hit_ratio for result in row.values() if result.policy != MIN), default=0.0)
            fraction = next(iter(row.values())).capacity_fraction
            shown.add_row(f"{capacity:,}", f"{fraction:.1%}", *(_ratio(row.get(policy), best) for policy in policies))
        tables.append(shown)
    return Group(*tables)


def two_tier_tables(results: Sequence[Result], threshold: float) -> Group:
    """Make a table for each trace: hits by tier, and the chunks written to the remote."""
    tables: list[RenderableType] = [
        f"\npredicted: writes a chunk if it returns with a probability above {threshold:.3f}"
    ]
    for trace, mine in _by_trace(results):
        shown = _table(
            trace,
            "DRAM\nchunks",
            "remote\nchunks",
            "policy",
            "persist",
            "hit\nratio",
            "of it\nDRAM",
            "written\nof unique",
        )
        for r in mine:
            remote = "" if r.remote_capacity_chunks is None else f"{r.remote_capacity_chunks:,}"
            dram = "" if r.dram_hit_ratio is None else f"{r.dram_hit_ratio:.4f}"
            written = "" if r.written_chunks is None else f"{r.written_chunks / r.unique_chunks:.1%}"
            name = NAMES.get(r.policy, r.policy)
            shown.add_row(f"{r.capacity_chunks:,}", remote, name, r.persist or "", f"{r.hit_ratio:.4f}", dram, written)
        tables.append(shown)
    return Group(*tables)


def _by_trace(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    traces = dict.fromkeys(result.trace for result in results)
    return [(trace, [result for result in results if result.trace == trace]) for trace in traces]


def _table(title: str, *headings: str) -> Table:
    """Make a table that fits into 80 columns, so that no digit is cut off."""
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    return shown


def draw_plot(results: Sequence[Result], path: Path) -> None:
    """Draw hit ratio against capacity, a panel for each trace, and write it to `path`. Replaces the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    traces = _by_trace(results)
    columns = min(len(traces), 2)
    rows = -(-len(traces) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.4 * rows + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(traces) :]:
        panel.set_visible(False)
    for (trace, mine), axes in zip(traces, panels.flat, strict=False):
        _panel(axes, trace, mine)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axes: Any, trace: str, results: Sequence[Result]) -> None:
    for policy in dict.fromkeys(result.policy for result in results):
        points = sorted((r.capacity_fraction * 100, r.hit_ratio) for r in results if r.policy == policy)
        colour, line, width = STYLES.get(policy, (None, "-", 1.2))
        axes.plot(*zip(*points, strict=True), line, color=colour, linewidth=width, marker="o", markersize=3.5,
                  label=NAMES.get(policy, policy))  # fmt: skip
    ticks = sorted({round(result.capacity_fraction * 100, 2) for result in results})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(trace, fontsize=10)
    axes.set_xlabel("capacity [% of the unique chunks]", fontsize=9)
    axes.set_ylabel("hit ratio", fontsize=9)
    axes.grid(color="#e6e8eb")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _ratio(result: Result | None, best: float) -> str:
    if result is None:
        return ""
    text = f"{result.hit_ratio:.4f}"
    return f"[bold]{text}[/bold]" if result.policy != MIN and result.hit_ratio == best else text
