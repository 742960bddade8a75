"""What every bench shares: where it ran, how a row is printed, how the JSON is written. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvkern.demo.report import meta
from kvkern.demo.report import write_json as _write_json

__all__ = ["meta", "print_row", "write_json"]

VALUE_WIDTH = 10


def write_json(path: str | Path, rows: Sequence[Mapping[str, object]], **extra: object) -> None:
    """Write `{"meta", "rows", **extra}`; makes the folder, replaces the file."""
    _write_json(Path(path), [dict(row) for row in rows], **extra)


def print_row(row: Mapping[str, object]) -> None:
    """Print one line; rows with the same names align. Names carry the unit; None is left out."""
    cells = (_cell(name, value) for name, value in row.items() if value is not None)
    print("  ".join(cells).rstrip(), flush=True)


def _cell(name: str, value: object) -> str:
    if isinstance(value, str):
        return f"{value:<{VALUE_WIDTH + 8}}"
    return f"{name} {_number(value):<{VALUE_WIDTH}}"


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
