"""Draws docs/dashboard.png: every panel of deploy/observability/dashboard.json, from a real Prometheus. About five minutes.

    python docs/draw_dashboard.py [OUT]

Starts a node as the tests do: a daemon with a remote store, two vLLM servers with a small model, and Prometheus over all three.
The load has four parts: both engines start cold, they go on, the daemon's DRAM is cleared, and few requests come. Needs
Debian's package prometheus, and matplotlib.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from kvkern.node import protocol as p  # noqa: E402
from tests.observability.monitored_node import Node, Prometheus, missing, monitored_node  # noqa: E402

DEPLOY = ROOT / "deploy" / "observability"
OUT = Path(__file__).with_name("dashboard.png")
WINDOW_S, STEP_S = 20, 2
PARTS = ((45.0, 0.0), (40.0, 0.3), (45.0, 0.0), (30.0, 1.5))  # seconds, rest between two requests of a client
PER_ROW, INCHES, DPI = 3, (15.0, 2.2), 110
COLOURS = ["#0d7d6c", "#d9822b", "#3b6fb6", "#b04a5a", "#7a5aa6", "#6b7d2a", "#8a6d3b", "#4a4a4a", "#c2185b", "#0097a7"]
GREY, LIGHT, INK = "#6b7280", "#e5e7eb", "#1f2937"
Series = list[tuple[str, list[float], list[float]]]  # legend, minutes, values


def load(node: Node) -> None:
    """Send the load."""
    for part, (seconds, rest_s) in enumerate(PARTS):
        if part == 2:
            node.daemon.ask(p.Clear(1, None))
        node.load(seconds, rest_s)


def series(prometheus: Prometheus, panel: dict[str, Any], began: float, ended: float) -> Series:
    """Return the lines of a panel."""
    lines: Series = []
    for target in panel["targets"]:
        query = target["expr"].replace("$model_name", ".*").replace("$__rate_interval", f"{WINDOW_S}s")
        found = prometheus.get("query_range", query=query, start=began, end=ended, step=STEP_S)["result"]
        for one in found:
            legend = target["legendFormat"]
            for label, value in one["metric"].items():
                legend = legend.replace(f"{{{{{label}}}}}", value)
            points = [(float(at), float(value)) for at, value in one["values"]]
            lines.append((legend, [(at - began) / 60 for at, _ in points], [value for _, value in points]))
    return lines


def formatted(unit: str, value: float) -> str:
    """Return a tick's label in Grafana's manner."""
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    if unit == "s":
        steps = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
        size, name = next((step for step in steps if abs(value) >= step[0]), (1e-6, "µs"))
        return f"{value / size:g} {name}" if value else "0"
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {name}{'B' if unit != 'short' else ''}{'/s' if unit == 'Bps' else ''}"
    return f"{value:g}"


def draw(axes: Axes, panel: dict[str, Any], lines: Series) -> None:
    """Draw one panel."""
    defaults = panel["fieldConfig"]["defaults"]
    unit, stacked = defaults["unit"], "stacking" in defaults["custom"]
    lines = [line for line in lines if any(value > 0 for value in line[2])] or lines[:1] if stacked else lines
    if stacked and lines:
        times = sorted({at for _, minutes, _ in lines for at in minutes})
        rows = [[dict(zip(minutes, values, strict=True)).get(at, 0.0) for at in times] for _, minutes, values in lines]
        axes.stackplot(times, rows, labels=[line[0] for line in lines], colors=COLOURS, alpha=0.75, linewidth=0)
    else:
        for (legend, minutes, values), colour in zip(lines, COLOURS, strict=False):
            axes.plot(minutes, values, color=colour, linewidth=1.5, label=legend)
    axes.set_title(panel["title"], loc="left", fontsize=9.5, fontweight="bold", color=INK, pad=5)
    axes.set_ylim(bottom=0, top=1.02 if defaults.get("max") == 1 else None)
    if axes.get_ylim()[1] <= 1e-9 or all(value == 0 for _, _, values in lines for value in values):
        axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(unit, value)))
    axes.yaxis.get_major_locator().set_params(nbins=4)  # type: ignore[attr-defined]
    axes.set_xlim(0, sum(seconds for seconds, _ in PARTS) / 60)
    axes.tick_params(labelsize=7.5, colors=GREY, length=0)
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT)
    axes.set_axisbelow(True)
    columns = 3 if len(lines) > 2 else 2
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.01, -0.12), ncols=columns, fontsize=7, frameon=False, labelcolor=INK,
        handlelength=1.2, columnspacing=1.0, borderaxespad=0.0, labelspacing=0.25,
    )  # fmt: skip


def rows(dashboard: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (title of a row, up to PER_ROW of its panels)."""
    title, panels = "", []
    for panel in [*dashboard["panels"], {"type": "row", "title": ""}]:
        if panel["type"] == "row":
            for first in range(0, len(panels), PER_ROW):
                yield (title if first == 0 else ""), panels[first : first + PER_ROW]
            title, panels = panel["title"], []
        else:
            panels.append(panel)


def picture(prometheus: Prometheus, began: float, ended: float, out: Path) -> None:
    """Draw the dashboard."""
    dashboard = json.loads((DEPLOY / "dashboard.json").read_text())
    grid = list(rows(dashboard))
    plt.rcParams["font.family"] = "DejaVu Sans"
    figure, axes = plt.subplots(
        len(grid), PER_ROW, figsize=(INCHES[0], INCHES[1] * len(grid)), dpi=DPI, facecolor="white", squeeze=False
    )
    figure.subplots_adjust(left=0.045, right=0.985, top=0.962, bottom=0.032, wspace=0.2, hspace=0.85)
    for (title, panels), row in zip(grid, axes, strict=True):
        for panel, one in zip(panels, row, strict=False):
            draw(one, panel, series(prometheus, panel, began, ended))
        for one in row[len(panels) :]:
            one.set_visible(False)
        if title:
            top = row[0].get_position().y1
            figure.text(0.045, top + 0.021, title, fontsize=11.5, color="#0d7d6c", fontweight="bold")
    figure.text(0.985, 0.006, "minutes", fontsize=8, color=GREY, ha="right")
    figure.savefig(out)


def main(out: Path) -> None:
    """Run the load and draw it."""
    if reason := missing():
        raise SystemExit(f"{reason}: apt-get install prometheus")
    with (
        tempfile.TemporaryDirectory(prefix="kvkern-dashboard-") as folder,
        monitored_node(Path(folder), DEPLOY / "alerts.yml") as node,
    ):
        time.sleep(WINDOW_S / 2)  # what exists from the start is scraped before the load
        began = time.time()
        load(node)
        picture(node.prometheus, began, time.time(), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
