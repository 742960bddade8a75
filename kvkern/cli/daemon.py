"""`kvkern serve`: the node's daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import DEFAULT_POLICY
from ..observability import logs
from ..observability.logs import LogFormat
from ..policy import POLICIES
from .arguments import DEFAULT_SOCKET, Socket, exit_on_bad_input, path_option


def serve(
    capacity: Annotated[str, typer.Option(help="Memory for the cache, such as 8GiB.")],
    socket: Socket = DEFAULT_SOCKET,
    name: Annotated[str, typer.Option(help="Name of the trust domain; each domain has its own arena.")] = "default",
    arena_dir: Annotated[Path, typer.Option(parser=path_option, help="Folder of the arena, a tmpfs mount.")] = Path(
        "/dev/shm"
    ),
    prefault: Annotated[bool, typer.Option(help="Touch all pages at start; they are reserved in any case.")] = True,
    dump_arena: Annotated[
        bool, typer.Option("--dump-arena", help="Keep the arena in core dumps of the daemon: it holds all prompts.")
    ] = False,
    allow_uid: Annotated[
        list[int] | None, typer.Option(help="Another user whose engines may read the whole cache.")
    ] = None,
    allow_gid: Annotated[
        list[int] | None, typer.Option(help="A group whose members' engines may read the whole cache.")
    ] = None,
    operator_uid: Annotated[
        list[int] | None, typer.Option(help="Another user that may clear, evict and record.")
    ] = None,
    operator_gid: Annotated[
        list[int] | None, typer.Option(help="A group whose members may clear, evict and record.")
    ] = None,
    quota: Annotated[
        list[str] | None, typer.Option(help="MODEL=SIZE: the most memory that a model may hold; * matches any text.")
    ] = None,
    tenant_quota: Annotated[
        str | None, typer.Option(help="The most memory that each cache salt may hold, such as 1GiB.")
    ] = None,
    fair: Annotated[
        bool, typer.Option("--fair", help="When the cache is full, evict from the largest namespace first.")
    ] = False,
    policy: Annotated[str, typer.Option(help=f"Eviction policy: {', '.join(POLICIES)}.")] = DEFAULT_POLICY,
    policy_state: Annotated[
        Path | None,
        typer.Option(parser=path_option, help="File for what the policy learns; read at start, written every minute."),
    ] = None,
    remote: Annotated[
        str | None, typer.Option(help="URL of a store shared with other nodes: redis, mooncake, file, s3 and more.")
    ] = None,
    persist: Annotated[
        str, typer.Option(help="Which chunks to write to the remote store: all, hot, evicted, predicted.")
    ] = "",
    remote_queue: Annotated[
        str, typer.Option(help="The most memory of chunks that wait to be written to the remote store.")
    ] = "256MiB",
    remote_timeout: Annotated[float, typer.Option(help="Seconds that one call to the remote store may take.")] = 10.0,
    drain: Annotated[float, typer.Option(help="Seconds for open transfers and writes after SIGTERM.")] = 5.0,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log clients that connect and disconnect.")] = False,
    log_format: Annotated[
        LogFormat, typer.Option(help="How the log is written: text, or one JSON object per line.")
    ] = "text",
) -> None:
    """Run the node's cache: one daemon for all engines of the node. Ends on SIGTERM; keeps its arena for the next start."""
    from ..config import parse_nbytes
    from ..node.daemon import server
    from ..node.daemon.node_config import NodeConfig
    from ..node.daemon.quotas import Quotas

    logs.set_up(log_format, verbose)
    with exit_on_bad_input():
        config = NodeConfig(
            socket=socket.absolute(),
            capacity_nbytes=parse_nbytes(capacity),
            name=name,
            arena_dir=arena_dir,
            prefault=prefault,
            dump_arena=dump_arena,
            uids=frozenset(allow_uid or ()),
            gids=frozenset(allow_gid or ()),
            operator_uids=frozenset(operator_uid or ()),
            operator_gids=frozenset(operator_gid or ()),
            quotas=Quotas(
                models=dict(_parse_quota(text) for text in quota or ()),
                tenant=None if tenant_quota is None else parse_nbytes(tenant_quota, "tenant-quota"),
                fair=fair,
            ),
            policy=policy,
            policy_state=None if policy_state is None else policy_state.absolute(),
            remote=_remote_config(remote, persist, remote_queue, remote_timeout),
            drain_s=drain,
        )
        server.serve(config, ready=lambda: typer.echo(f"kvkern: serving on {config.socket}"))


def _remote_config(url: str | None, persist: str, queue: str, timeout_s: float) -> Any:
    from ..config import RemoteConfig, parse_nbytes
    from ..errors import ConfigError

    if url is None:
        if persist:
            raise ConfigError(
                f"persist is {persist!r}, but there is no --remote to write to; give --remote, or leave --persist out"
            )
        return None
    return RemoteConfig(url, persist, parse_nbytes(queue, "remote-queue"), timeout_s)


def _parse_quota(text: str) -> tuple[str, int]:
    from ..config import parse_nbytes
    from ..errors import ConfigError

    model, equals, size = text.rpartition("=")
    if not model or not equals:
        raise ConfigError(f"quota is {text!r}; expected MODEL=SIZE, for example 'llama-*=8GiB'")
    return model, parse_nbytes(size, f"quota of {model}")
