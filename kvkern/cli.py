"""The command line: `kvkern COMMAND` and `python -m kvkern COMMAND`. Parses; every command's work is elsewhere.

Commands import what they need when they run: `kvkern version` costs neither torch nor vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A cache for the KV cache of LLM engines.")


@app.callback()
def _root() -> None:
    """Keep subcommands even where there is only one."""


@app.command()
def version() -> None:
    """Print kvkern's version."""
    typer.echo(__version__)


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A model folder to use instead of the built one."),
    ] = None,
    workdir: Annotated[
        Path | None,
        typer.Option(help="Holds the built model, the engines' logs and the chart. Default: in the temp dir."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results there as JSON.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Write the chart there. Default: demo.png in the workdir.")] = None,
    capacity: Annotated[
        str | None, typer.Option(help="Memory that kvkern may use. Default: for all documents, 2GiB at least.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show vLLM's own log.")] = False,
) -> None:
    """Measure a real vLLM engine with and without kvkern: time to first token, and equal tokens. Takes about 5 minutes."""
    from .demo import run

    options = run.Options(
        model=model,
        workdir=workdir or run.default_workdir(),
        json_path=json,
        chart_path=chart,
        capacity=capacity,
        verbose=verbose,
    )
    raise typer.Exit(run.demo(options))


def main() -> None:
    """Run the command line and exit with its code."""
    app()
