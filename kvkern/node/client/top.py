"""`kvkern top`: asks a daemon for its overview again and again, and shows it until the user ends it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ...errors import ConfigError, KvkernError
from .. import protocol as p
from .admin_client import AdminClient
from .top_screen import screen


def overview(socket: Path, daemon_uid: int) -> tuple[str, dict[str, Any]]:
    """Return the daemon's overview: as JSON, and decoded. Raises ConfigError if there is none."""
    with AdminClient(socket, daemon_uid) as daemon:
        rows = daemon.ask(p.List(1, p.OVERVIEW, 1))
    if not rows or "overview" not in rows[0]:
        raise ConfigError(
            f"the daemon on {socket} is older than this command and has no overview; restart it with this version, or use "
            f"`kvkern stat`"
        )
    text = str(rows[0]["overview"])
    return text, msgspec.json.decode(text, type=dict[str, Any])


def watch(
    socket: Path,
    daemon_uid: int,
    console: Console,
    every_s: float,  # seconds between two looks
) -> None:
    """Show the overview until Ctrl-C. When the daemon is away, say so and go on. Raises ConfigError if it is at the start."""
    shown = screen(overview(socket, daemon_uid)[1], console.width)
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            live.update(shown, refresh=True)
            time.sleep(every_s)
            try:
                shown = screen(overview(socket, daemon_uid)[1], console.width)
            except KvkernError as error:
                shown = Text(f"kvkern: {error}\nTrying again every {every_s:g} s.", "red")
