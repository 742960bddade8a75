"""`kvkern top`: the daemon's overview in a terminal. Draws what it is given, and asks nothing.

Names of models and engines are other people's text: control characters are shown as escapes, and nothing is read as markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ...config import format_nbytes
from ...observability.logs import one_line

BARS = "▁▂▃▄▅▆▇█"
WIDE = 100  # columns from which tables stand side by side
MAX_ROWS = 8  # of each table
NAME_CHARS = 40

Overview = dict[str, Any]


def screen(
    overview: Overview,  # see node.daemon.overview
    width: int,  # of the terminal, in columns
) -> RenderableType:
    """Return what the terminal shows."""
    tables = [_tenants(overview), _hot(overview), _engines(overview)]
    parts: list[RenderableType] = [_head(overview), *_advice(overview), _figures(overview, width)]
    if width >= WIDE:
        side = Table.grid(expand=True, padding=(0, 1))
        for _ in range(2):
            side.add_column(ratio=1)
        side.add_row(tables[0], tables[1])
        parts += [side, tables[2]]
    else:
        parts += tables
    return Group(*parts)


def _head(overview: Overview) -> Text:
    daemon = overview["daemon"]
    state = Text("ready", "green") if daemon["ready"] else Text("not ready", "yellow")
    return Text.assemble(
        ("kvkern ", "bold"), (_name(daemon["name"]), "bold"), "  ", state,
        f"  version {_name(daemon['version'])}, pid {daemon['pid']}, up {_duration(daemon['uptime_s'])}", overflow="fold",
    )  # fmt: skip


def _advice(overview: Overview) -> list[Text]:
    lines = []
    for found in overview["advice"]:
        colour = "red" if found["level"] == "error" else "yellow"
        lines.append(
            Text.assemble(
                (f"{found['level']}: ", f"bold {colour}"), f"{one_line(found['what'])}. {one_line(found['remedy'])}."
            )
        )
    return lines


def _figures(overview: Overview, width: int) -> Table:
    stat, hour, grown = overview["stat"], overview["hour"], overview["grown"]
    slots, bars = stat.get("slots", 0), max(10, min(60, width - 52))
    lookups, hits = grown["lookup_chunks"], grown["hit_chunks"]
    used = slots - stat.get("free_slots", 0)
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "hits",
        _percent(hits / lookups if lookups else None),
        sparkline(hour["hit_ratio"], bars, 1.0),
        f"{hits:,} of {lookups:,} chunks",
    )
    for name, key in (("given", "given"), ("stored", "stored")):
        last = hour[key][-1] if hour[key] else 0
        table.add_row(name, f"{_rate(last)}", sparkline(hour[key], bars), f"at most {_rate(max(hour[key], default=0))}")
    capacity = format_nbytes(stat["capacity_nbytes"])
    table.add_row(
        "memory", _percent(used / slots if slots else None), sparkline(hour["used"], bars, 1.0),
        f"{format_nbytes(used * stat['slot_nbytes'])} of {capacity}" if slots else f"{capacity}, no engine yet",
    )  # fmt: skip
    if stat.get("remote"):
        works = "works" if stat["remote_works"] else "fails"
        table.add_row(
            "remote", works, sparkline(hour["remote_read"], bars),
            f"{grown['remote_hit_chunks']:,} of {grown['remote_lookup_chunks']:,} chunks found, "
            f"{stat['remote_queue_chunks']:,} wait to be written",
        )  # fmt: skip
    return table


def _tenants(overview: Overview) -> Panel:
    rows = [
        (
            _name(row["fields"].get("model", "not described")), _name(row["fields"].get("salt", ""))[:8],
            f"{row['chunks']:,}", format_nbytes(row["nbytes"]),
        )
        for row in overview["tenants"]
    ]  # fmt: skip
    return _table("models and tenants", ["model", "tenant", "chunks>", "memory>"], rows, "no chunks are cached")


def _hot(overview: Overview) -> Panel:
    rows = [
        (
            row["key"][:16],
            f"{row['hits']:,}",
            f"{row['chunks']:,}",
            format_nbytes(row["chunks"] * overview["chunk_nbytes"]),
        )
        for row in overview["hot"]
    ]
    return _table("hot prefixes", ["first key", "hits>", "chunks>", "given>"], rows, "no prefix was hit")


def _engines(overview: Overview) -> Panel:
    rows = [
        (
            _name(row["engine"]) or "without a name", str(row["pid"]), str(row["uid"]), f"{row['leases']:,}",
            f"{row['granted_slots']:,}", "stores" if row["stores"] else "copies",
        )
        for row in overview["engines"]
    ]  # fmt: skip
    return _table("engines", ["engine", "pid>", "uid>", "leases>", "slots>", ""], rows, "no engine is connected")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> Panel:
    """Return a table in a frame. A column whose name ends with > stands at the right."""
    table = Table(box=None, expand=True, pad_edge=False, show_header=bool(rows))
    for column in columns:
        right = column.endswith(">")
        table.add_column(
            column.rstrip(">"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="ellipsis",
            ratio=None if right else 1,
        )
    for row in rows[:MAX_ROWS]:
        table.add_row(*map(Text, row))
    if not rows:
        table.add_row(Text(empty, "dim"))
    more = len(rows) - MAX_ROWS
    return Panel(table, title=title, title_align="left", subtitle=f"and {more} more" if more > 0 else None)


def sparkline(values: Sequence[float | None], width: int, top: float | None = None) -> str:
    """Draw a list of numbers as blocks, the newest at the right. A space: there was nothing to measure."""
    if not values:
        return ""
    groups = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    if len(values) < width:
        groups = [[value] for value in values]
    means = [_mean(group) for group in groups]
    most = top or max((mean for mean in means if mean is not None), default=0.0)
    return "".join(
        " " if mean is None else BARS[min(len(BARS) - 1, int(mean / most * len(BARS)))] if most else BARS[0]
        for mean in means
    )


def _mean(group: Sequence[float | None]) -> float | None:
    known = [value for value in group if value is not None]
    return sum(known) / len(known) if known else None


def _name(text: str) -> str:
    """Return other people's text on one line, cut to a length that fits a column."""
    line = one_line(text)
    return line if len(line) <= NAME_CHARS else f"{line[: NAME_CHARS - 1]}…"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * min(1.0, share):.0f} %"


def _rate(nbytes_s: float) -> str:
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if nbytes_s >= size:
            return f"{nbytes_s / size:.3g} {unit}"
    return f"{nbytes_s:.0f} B/s"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
