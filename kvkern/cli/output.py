"""What commands print: aligned columns or JSON."""

from __future__ import annotations

from typing import Any

import typer


def print_json(value: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(value).decode())


def print_forgotten(rows: list[dict[str, Any]], json: bool) -> None:
    print_json(rows[0]) if json else typer.echo(f"{rows[0]['chunks']} chunks forgotten")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print aligned columns. Keys are never cut, even on a narrow terminal, because users copy them.

    What engines have named cannot drive the terminal.
    """
    from ..observability.logs import one_line

    if not rows:
        typer.echo("nothing is cached")
        return
    lines = [list(rows[0]), *([one_line(str(value)) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
