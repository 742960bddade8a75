"""Shared by all benches: command line options, how a row is printed, how the JSON is written. Measures nothing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvkern.measurement_json import meta
from kvkern.measurement_json import write_json as _write_json

__all__ = ["meta", "option_parser", "print_row", "write_json"]

VALUE_WIDTH = 10


def option_parser(
    doc: str | None,  # the bench's docstring, shown by --help
    quick: str,  # what --quick does
) -> argparse.ArgumentParser:
    """Return a parser with the options that every bench has: --json and --quick."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def write_json(path: str | Path | None, rows: Sequence[Mapping[str, object]], **extra: object) -> None:
    """Write `{"meta", "rows", **extra}`. Makes the folder, replaces the file. Does nothing if `path` is None."""
    if path is not None:
        _write_json(Path(path), [dict(row) for row in rows], **extra)


def print_row(row: Mapping[str, object]) -> None:
    """Print one line. Rows with the same names align. Names carry the unit. None is left out."""
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
