"""`kvkern serve`: the node's daemon."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.options import BY_NAME, Reader
from ..observability.logs import LogFormat
from .arguments import exit_on_bad_input, path_option


def _option(name: str, *flags: str, **more: Any) -> Any:
    """Describe an option by its entry in kvkern.config.options. `flags` are its names, if it has two."""
    option = BY_NAME[name]
    default = option.default_of(Reader.DAEMON)
    shown = (
        "required"
        if name == "capacity"
        else "not set"
        if default is None
        else str(default).lower()
        if default in (True, False)
        else str(default)
    )
    return typer.Option(*flags, help=option.help, show_default=shown, **more)


def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            parser=path_option,
            help="TOML file with any of these options; see docs/configuration.md.",
            show_default="KVKERN_CONFIG",
        ),
    ] = None,
    capacity: Annotated[str | None, _option("capacity")] = None,
    socket: Annotated[Path | None, _option("socket", parser=path_option)] = None,
    name: Annotated[str | None, _option("name")] = None,
    arena_dir: Annotated[Path | None, _option("arena_dir", parser=path_option)] = None,
    prefault: Annotated[bool | None, _option("prefault", "--prefault/--no-prefault")] = None,
    dump_arena: Annotated[bool | None, _option("dump_arena", "--dump-arena/--no-dump-arena")] = None,
    allow_uid: Annotated[list[int] | None, _option("allow_uid")] = None,
    allow_gid: Annotated[list[int] | None, _option("allow_gid")] = None,
    operator_uid: Annotated[list[int] | None, _option("operator_uid")] = None,
    operator_gid: Annotated[list[int] | None, _option("operator_gid")] = None,
    quota: Annotated[list[str] | None, _option("quota")] = None,
    tenant_quota: Annotated[str | None, _option("tenant_quota")] = None,
    fair: Annotated[bool | None, _option("fair", "--fair/--no-fair")] = None,
    policy: Annotated[str | None, _option("policy")] = None,
    policy_state: Annotated[Path | None, _option("policy_state", parser=path_option)] = None,
    remote: Annotated[str | None, _option("remote")] = None,
    persist: Annotated[str | None, _option("persist")] = None,
    remote_queue: Annotated[str | None, _option("remote_queue")] = None,
    remote_timeout: Annotated[float | None, _option("remote_timeout")] = None,
    metrics: Annotated[str | None, _option("metrics")] = None,
    metrics_token_file: Annotated[Path | None, _option("metrics_token_file", parser=path_option)] = None,
    rpc: Annotated[str | None, _option("rpc")] = None,
    rpc_token_file: Annotated[Path | None, _option("rpc_token_file", parser=path_option)] = None,
    http_host: Annotated[list[str] | None, _option("http_host")] = None,
    resize_arena: Annotated[bool | None, _option("resize_arena", "--resize-arena/--no-resize-arena")] = None,
    drain: Annotated[float | None, _option("drain")] = None,
    verbose: Annotated[bool | None, _option("verbose", "--verbose/--no-verbose")] = None,
    log_format: Annotated[LogFormat | None, _option("log_format")] = None,
) -> None:
    """Run the node's cache: one daemon for all engines of the node. Ends on SIGTERM; keeps its arena for the next start.

    Every option may be given here, as a variable KVKERN_NAME or in a file; the first of these counts.
    """
    given = {
        key: str(value) if key == "socket" else value
        for key, value in locals().items()
        if key != "config" and value is not None and value != []
    }
    import logging

    from ..config.sources import gather
    from ..errors import KvkernError
    from ..node.daemon import server
    from ..node.daemon.node_config import NodeConfig
    from ..observability import logs

    with exit_on_bad_input():
        settings = NodeConfig.from_settings(gather(Reader.DAEMON, given, "the command line", config))
    handler = logs.set_up(settings.log_format, settings.verbose)
    if settings.log_format == "text":
        with exit_on_bad_input():
            server.serve(settings, ready=lambda: _say(f"kvkern: serving on {settings.socket}"))
        return
    try:  # whoever reads JSON gets nothing else
        server.serve(
            settings,
            ready=lambda: handler.announce(
                "kvkern: serving on %(socket)s", {"event": "ready", "socket": settings.socket}
            ),
        )
    except KvkernError as error:
        handler.announce("kvkern: %(error)s", {"event": "not_serving", "error": error}, logging.ERROR)
        raise typer.Exit(2) from error


def _say(line: str) -> None:
    """Print a line, unless nobody can read it any more: a full disk or a reader that is gone must not end the daemon."""
    try:
        typer.echo(line)
    except OSError:
        sys.stdout = None  # else Python would try to write the line again when it ends
