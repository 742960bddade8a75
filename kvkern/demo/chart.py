"""Draws the rows as one picture. Knows rows and matplotlib; measures nothing."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import CASES, POLICY_CASES, Row

# case -> (legend, colour). Cases with the same legend share its colour.
STYLES = {
    "recompute": ("vLLM, computed", "#9aa5b1"),
    "overcommit_native": ("vLLM, computed", "#9aa5b1"),
    "native_hit": ("vLLM, still in its own pool", "#4c78a8"),
    "kvkern_hit": ("loaded by kvkern", "#e4572e"),
    "overcommit_kvkern": ("loaded by kvkern", "#e4572e"),
    "second_engine": ("by another engine", "#f2a65a"),
    "remote": ("loaded from a remote store, another node has computed it", "#3a9679"),
    "overcommit_lru": ("what LRU keeps", "#b8a9c9"),
    "overcommit_grit": ("what GRIT keeps", "#7b4ea3"),
}
HIT_CASES = ("recompute", "native_hit", "kvkern_hit", "second_engine", "remote")  # one group of bars per prompt length
BAR_WIDTH = 0.8
SUBTITLE_CHARS = 100  # of a line
GROUP_GAP = 0.9


def draw(rows: Sequence[Row], path: Path, subtitle: str) -> None:
    """Write a PNG of the TTFT medians, one group of bars per prompt length. Replaces the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _bars(axes, _groups(rows))
    axes.set_yscale("log")
    axes.set_ylim(_decade_below(min(row.ttft_s for row in rows)), max(row.ttft_s for row in rows) * 3.5)
    axes.set_ylabel("time to first token [s], log scale")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", which="major", color="#e6e8eb")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.suptitle("A prompt seen before is loaded, not computed again", fontsize=14, fontweight="bold")
    axes.set_title(textwrap.fill(subtitle, SUBTITLE_CHARS), fontsize=9, color="#52606d")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _decade_below(value_s: float) -> float:
    """Return the power of ten that leaves the shortest bar some height."""
    decade_s: float = 10.0 ** math.floor(math.log10(value_s / 1.2))
    return decade_s


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    hits = [row for row in rows if row.case in HIT_CASES]
    beyond = [row for row in rows if row.case in ("overcommit_native", "overcommit_kvkern")]
    chosen = [row for row in rows if row.case in POLICY_CASES]
    lengths = sorted({row.prompt_tokens for row in hits})
    groups = [(f"{length:,} tokens", [row for row in hits if row.prompt_tokens == length]) for length in lengths]
    if beyond:
        count, length = beyond[0].runs, beyond[0].prompt_tokens
        groups.append((f"{count} x {length:,} tokens,\nabove vLLM's pool", beyond))
    if chosen:
        groups.append((f"{chosen[0].runs} turns, working set\n4x kvkern's arena", chosen))
    return groups


def _bars(axes: Any, groups: Sequence[tuple[str, list[Row]]]) -> None:
    left, centres, named = 0.0, [], set()
    for _, group in groups:
        for index, row in enumerate(group):
            legend, colour = STYLES[row.case]
            label = "_" if legend in named else legend  # a leading underscore keeps it out of the legend
            named.add(legend)
            bar = axes.bar(left + index, row.ttft_s, BAR_WIDTH, color=colour, label=label)
            axes.bar_label(bar, [_label(row, group)], padding=3, fontsize=9)
        centres.append(left + (len(group) - 1) / 2)
        left += len(group) + GROUP_GAP
    axes.set_xticks(centres, [title for title, _ in groups])
    axes.tick_params(which="both", length=0)
    axes.legend(frameon=False, loc="upper left", ncols=4, fontsize=9)


def _label(row: Row, group: Sequence[Row]) -> str:
    time = f"{row.ttft_s:.2f} s" if row.ttft_s < 10 else f"{row.ttft_s:.1f} s"
    base = next((other for other in group if other.case == CASES[row.case]), None)
    if base is None:
        return time
    ratio = base.ttft_s / row.ttft_s
    return f"{time}\n{ratio:.0f}x" if ratio >= 10 else f"{time}\n{ratio:.1f}x"
