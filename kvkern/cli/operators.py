"""What operators ask of a running daemon: stat, top, ls, get, evict, clear, record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .arguments import DEFAULT_SOCKET, AsJson, DaemonUid, Socket, exit_on_bad_input, key_bytes, path_option
from .output import print_forgotten, print_json, print_table

MAX_SECONDS = 1e9
MIN_EVERY_S = 0.2


def stat(socket: Socket = DEFAULT_SOCKET, daemon_uid: DaemonUid = -1, json: AsJson = False) -> None:
    """Print a daemon's counters, and the slots that its clients hold."""
    from ..node import protocol

    (row,) = ask_daemon(socket, daemon_uid, protocol.Stat(1))
    print_json(row) if json else print_table([{"what": name, "value": value} for name, value in row.items()])


def top(
    socket: Socket = DEFAULT_SOCKET,
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it once as JSON.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 2.0,
    daemon_uid: DaemonUid = -1,
) -> None:
    """Show a daemon at a glance until Ctrl-C: hits, throughput, memory, tenants, hot prefixes, engines, and what is wrong."""
    from rich.console import Console

    from ..node.client import top as daemon_top
    from ..node.client.top_screen import screen
    from ..option_values import checked_number

    console = Console()
    with exit_on_bad_input():
        checked_number(every, "every", MIN_EVERY_S, MAX_SECONDS)
        if json or once:
            text, found = daemon_top.overview(socket, daemon_uid)
            typer.echo(text) if json else console.print(screen(found, console.width))
            return
        try:
            daemon_top.watch(socket, daemon_uid, console, every)
        except KeyboardInterrupt:
            return


def list_chunks(
    socket: Socket = DEFAULT_SOCKET,
    prefix: Annotated[str, typer.Option(help="First hex digits of the keys, an even number.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Print at most this many chunks.")] = 100,
    daemon_uid: DaemonUid = -1,
    json: AsJson = False,
) -> None:
    """List cached chunks."""
    from ..node import protocol

    rows = ask_daemon(socket, daemon_uid, protocol.List(1, key_bytes("prefix", prefix, least=0), limit))
    print_json(rows) if json else print_table(rows)


def get(key: str, socket: Socket = DEFAULT_SOCKET, daemon_uid: DaemonUid = -1, json: AsJson = False) -> None:
    """Show the header of one chunk. Exit status 1 if the chunk is not cached."""
    from ..node import protocol

    rows = ask_daemon(socket, daemon_uid, protocol.List(1, key_bytes("key", key), 1))
    if not rows:
        typer.echo(f"kvkern: no cached chunk has a key that starts with {key}; `kvkern ls` lists the keys", err=True)
        raise typer.Exit(1)
    print_json(rows[0]) if json else print_table([{"what": name, "value": value} for name, value in rows[0].items()])


def evict(prefix: str, socket: Socket = DEFAULT_SOCKET, daemon_uid: DaemonUid = -1, json: AsJson = False) -> None:
    """Forget the chunks whose key starts with these hex digits."""
    from ..node import protocol

    print_forgotten(ask_daemon(socket, daemon_uid, protocol.Evict(1, key_bytes("prefix", prefix))), json)


def clear(
    socket: Socket = DEFAULT_SOCKET,
    namespace: Annotated[
        str | None, typer.Option(help="64 hex digits of a namespace. Default: all namespaces.")
    ] = None,
    daemon_uid: DaemonUid = -1,
    json: AsJson = False,
) -> None:
    """Forget all chunks, or those of one namespace. Chunks that wait to be written to the remote store go too.

    Chunks in the remote store stay there, because other nodes use them. A later request loads them again.
    """
    from ..keys import KEY_NBYTES
    from ..node import protocol

    root = None if namespace is None else key_bytes("namespace", namespace, least=KEY_NBYTES)
    print_forgotten(ask_daemon(socket, daemon_uid, protocol.Clear(1, root)), json)


def record(
    out: Annotated[
        Path,
        typer.Argument(parser=path_option, help="The trace to write, .jsonl or .jsonl.gz. The file must not exist."),
    ],
    socket: Socket = DEFAULT_SOCKET,
    requests: Annotated[
        int | None, typer.Option(min=1, help="End after this many requests. Default: on Ctrl-C.")
    ] = None,
    daemon_uid: DaemonUid = -1,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="End after this many seconds. Default: on Ctrl-C.")
    ] = None,
) -> None:
    """Record the requests of a daemon's engines as a trace for `kvkern replay`. The trace holds no keys and no tokens."""
    from ..node.client import trace_recorder
    from ..option_values import checked_number, checked_output_file

    with exit_on_bad_input():
        checked_output_file(out, "OUT")
        if seconds is not None:
            checked_number(seconds, "seconds", 0, MAX_SECONDS)
        typer.echo(f"kvkern: recording into {out}", err=True)
        writer, why = trace_recorder.record(socket, out, requests, seconds, daemon_uid)
        typer.echo(f"{writer.requests:,} requests, {writer.chunks:,} distinct chunks in {out}: {why}")


def ask_daemon(socket: Path, daemon_uid: int, request: Any) -> list[dict[str, Any]]:
    from ..node.client.admin_client import AdminClient

    with exit_on_bad_input(), AdminClient(socket, daemon_uid) as daemon:
        return daemon.ask(request)
    raise AssertionError("exit_on_bad_input ends with typer.Exit")
