"""The command line: `kvkern COMMAND` and `python -m kvkern COMMAND`. It parses the options; other modules do the work.

Each command imports its modules when it runs, so `kvkern version` loads neither torch nor vLLM.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import typer

from ..version import VERSION
from . import configuration, daemon, kubernetes, measure, operators

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A cache for the KV cache of LLM engines.")


@app.callback()
def _keep_subcommands() -> None:
    """Make typer expect a command's name, even if there is only one command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path need not be text in the terminal's encoding


def version() -> None:
    """Print kvkern's version."""
    typer.echo(VERSION)


COMMANDS: dict[str, Callable[..., None]] = {  # in the order of `kvkern --help`
    "version": version,
    "demo": measure.demo,
    "serve": daemon.serve,
    "config": configuration.configuration,
    "stat": operators.stat,
    "top": operators.top,
    "ls": operators.list_chunks,
    "get": operators.get,
    "evict": operators.evict,
    "clear": operators.clear,
    "record": operators.record,
    "doctor": measure.doctor,
    "replay": measure.replay,
}
for _name, _command in COMMANDS.items():
    app.command(name=_name)(_command)
app.add_typer(kubernetes.operator, name="operator")


def main() -> None:
    """Run the command line and exit with its status."""
    app()
