"""Draws charts from the JSON of the GPU benches. They show measured values only. A dry run's chart says so across its width.

gpu_copy.svg           GB/s of the kernels against thread blocks and run length, with the ceilings of the same run
gpu_paths.svg          GB/s of whole transfers against run length, a line a method, with the link's ceiling
gpu_interference.svg   decode steps with transfers beside them, p50 and p99 over those without
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]
LABELS = {
    "staged": "staged", "zero_copy": "zero-copy", "batch_dma": "batch DMA", "planned": "planned",
    "vllm": "vLLM swap_blocks_batch",
}  # fmt: skip


def draw_all(results: Path, plots: Path) -> Iterator[Path]:
    """Draw one chart for every result file that exists. Yields the written files."""
    plots.mkdir(parents=True, exist_ok=True)
    for name, draw in CHARTS.items():
        source = results / f"{name}.json"
        if source.exists():
            yield _save(json.loads(source.read_text()), draw, plots / f"{name}.svg")


def _save(result: dict[str, Any], draw: Callable[[Rows], Figure], path: Path) -> Path:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {
        "svg.hashsalt": "kvkern",
        "svg.fonttype": "none",
    }  # the same bytes for the same numbers; text as text
    from matplotlib import pyplot as plt

    figure = draw(result["rows"])
    meta = result["meta"]
    if meta["dry_run"]:
        figure.text(
            0.5, 0.5, "DRY RUN ON A CPU\nNO MEASUREMENT", ha="center", va="center", fontsize=36, color="red", alpha=0.5
        )
    where = "dry run, no GPU" if meta["dry_run"] else f"{meta['device']['name']}, {meta['commit']}"
    figure.supxlabel(f"{where}; medians; payload counted once", fontsize=8, color="gray")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def copies(rows: Rows) -> Figure:
    """Draw four panels: over HBM and over the link, by thread blocks and by run length."""
    from matplotlib import pyplot as plt

    limits = {row["where"]: row["gb_s"] for row in rows if row["op"] == "ceiling"}
    rows = [row for row in rows if row["op"] != "ceiling"]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for line, where in enumerate(("hbm", "host")):
        mine = [row for row in rows if row["where"] == where]
        usual = _most_common(row["ctas"] for row in mine)
        runs = sorted({row["run_nbytes"] for row in mine if row["ctas"] != usual}) or [mine[0]["run_nbytes"]]
        one_run = [row for row in mine if row["run_nbytes"] == runs[-1]]
        title = "HBM to HBM" if where == "hbm" else "pinned host memory"
        _lines(axes[line][0], one_run, "ctas", f"{title}, runs of {_size(runs[-1])}", "thread blocks")
        by_run = [row for row in mine if row["ctas"] == usual]
        _lines(axes[line][1], by_run, "run_nbytes", f"{title}, {usual} thread blocks", "bytes of a run")
        axes[line][1].set_xscale("log", base=2)
        for ax in axes[line]:
            for name in ("hbm",) if where == "hbm" else ("d2h", "h2d"):
                ax.axhline(limits[name], color="gray", linestyle=":", linewidth=1, label=f"plain copy, {name}")
            ax.legend(fontsize=6)
    return figure


def _lines(ax: Axes, rows: Rows, x: str, title: str, label: str) -> None:
    for op, stages in sorted({(row["op"], row["stages"]) for row in rows}):
        line = sorted((row[x], row["gb_s"]) for row in rows if (row["op"], row["stages"]) == (op, stages))
        name = f"{op}, wide tiles" if stages == 1 else f"{op}, ring of {stages}"
        ax.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
    ax.set(title=title, xlabel=label, ylabel="GB/s", ylim=(0, None))


def paths(rows: Rows) -> Figure:
    """Draw a panel for each direction and for the smallest and the largest batch."""
    from matplotlib import pyplot as plt

    limits = {row["method"]: row["gb_s"] for row in rows if row["op"] == "ceiling"}
    rows = [row for row in rows if row["op"] != "ceiling"]
    batches = sorted({row["chunks"] for row in rows})
    shown = list(dict.fromkeys((batches[0], batches[-1])))
    figure, axes = plt.subplots(2, len(shown), figsize=(5.5 * len(shown), 8), layout="constrained", squeeze=False)
    for line, (op, link) in enumerate((("store", "d2h"), ("load", "h2d"))):
        for ax, chunks in zip(axes[line], shown, strict=True):
            for method, label in LABELS.items():
                points = sorted(
                    (row["run_nbytes"], row["gb_s"])
                    for row in rows
                    if (row["op"], row["method"], row["chunks"]) == (op, method, chunks)
                )
                if points:
                    ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
            ax.axhline(limits[link], color="gray", linestyle=":", linewidth=1, label="plain pinned copy")
            ax.set_xscale("log", base=2)
            ax.set(title=f"{op}, {chunks} chunks of 2 MiB", xlabel="bytes of a run", ylabel="GB/s", ylim=(0, None))
            ax.legend(fontsize=7)
    return figure


def interference(rows: Rows) -> Figure:
    """Draw bars of step times with transfers over step times without: 1 is undisturbed, higher is slower."""
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    names = [f"{row['case']}\n{row['op']}, {row['background_gb_s']:.0f} GB/s" for row in rows]
    for shift, q in ((-0.2, "p50"), (0.2, "p99")):
        ax.bar([i + shift for i in range(len(rows))], [1 / row[f"ratio_{q}"] for row in rows], 0.38, label=q)
    ax.axhline(1, color="gray", linestyle=":", linewidth=1)
    ax.set_xticks(range(len(rows)), names, fontsize=7)
    ax.set(title="decode steps beside transfers", ylabel="times a step without transfers", ylim=(0, None))
    ax.legend()
    return figure


def _most_common(values: Iterable[int]) -> int:
    found = list(values)
    return max(set(found), key=lambda value: (found.count(value), value))


def _size(nbytes: int) -> str:
    return f"{nbytes >> 10} KiB" if nbytes >= 1 << 10 else f"{nbytes} B"


CHARTS: dict[str, Callable[[Rows], Figure]] = {
    "gpu_copy": copies,
    "gpu_paths": paths,
    "gpu_interference": interference,
}
