"""Options that several commands share, and how their text is parsed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..config.options import BY_NAME


def path_option(text: str) -> Path:
    """Parse a path, for typer. Whether a file or a folder is expected there is checked by the command."""
    from ..errors import ConfigError
    from ..option_values import checked_path

    try:
        return checked_path(text, "the path")
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


Socket = Annotated[
    Path, typer.Option(parser=path_option, envvar=BY_NAME["socket"].variable, help="The daemon's Unix socket.")
]
DaemonUid = Annotated[
    int,
    typer.Option(
        envvar=BY_NAME["daemon_uid"].variable,
        help="A user whose daemon is trusted, beside your own and root's. Default: none.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_SOCKET = Path("/run/kvkern.sock")


def key_bytes(name: str, digits: str, least: int = 1) -> bytes:
    """Parse hex digits into a key or its first bytes: from `least` to 32 bytes. Exits with status 2 for anything else."""
    from ..errors import ConfigError

    even = re.fullmatch("(?:[0-9a-fA-F]{2})*", digits) is not None
    with exit_on_bad_input():
        if not even or not 2 * least <= len(digits) <= 64:
            expected = "64" if least == 32 else f"{2 * least} to 64, an even number"
            raise ConfigError(f"{name} is {digits!r}; expected hex digits, {expected}: `kvkern ls` shows them")
    return bytes.fromhex(digits)


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Turn a KvkernError into one line on stderr and exit status 2, without a traceback."""
    from ..errors import KvkernError
    from ..observability.logs import one_line

    try:
        yield
    except KvkernError as error:
        typer.echo("\n".join(map(one_line, f"kvkern: {error}".splitlines())), err=True)
        raise typer.Exit(2) from error
