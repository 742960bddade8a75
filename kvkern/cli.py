"""The command line: `kvkern COMMAND` and `python -m kvkern COMMAND`. Parses; every command's work is elsewhere.

Commands import what they need when they run: `kvkern version` costs neither torch nor vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .config import DEFAULT_POLICY
from .policy import POLICIES

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A cache for the KV cache of LLM engines.")


@app.callback()
def _keep_subcommands() -> None:
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
    chart: Annotated[Path | None, typer.Option(help="Write the chart there. Default: in the workdir.")] = None,
    capacity: Annotated[
        str | None, typer.Option(help="Memory that kvkern may use. Default: for all documents, 2GiB at least.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show vLLM's own log.")] = False,
    remote: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A store such as redis://host:6379. Then only this is measured, in about 3 minutes: what one node has "
            "computed, another loads from the store; beside it vLLM alone, and its native hit.",
        ),
    ] = None,
) -> None:
    """Measure a real vLLM engine with and without kvkern: time to first token, and equal tokens. Takes about 6 minutes."""
    import signal

    from .demo import engine_process, run

    engine_process.leave_on_signals(signal.SIGTERM, signal.SIGHUP)
    options = run.Options(
        model=model,
        workdir=workdir or run.default_workdir(),
        json_path=json,
        chart_path=chart,
        capacity=capacity,
        verbose=verbose,
        remote=remote,
    )
    raise typer.Exit(run.demo(options))


Socket = Annotated[Path, typer.Option(help="The daemon's Unix socket.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_SOCKET = Path("/run/kvkern.sock")


@app.command()
def serve(
    capacity: Annotated[str, typer.Option(help="Memory for the cache, such as 8GiB.")],
    socket: Socket = DEFAULT_SOCKET,
    name: Annotated[str, typer.Option(help="Of the trust domain; each has an arena of its own.")] = "default",
    arena_dir: Annotated[Path, typer.Option(help="A tmpfs mount.")] = Path("/dev/shm"),
    prefault: Annotated[bool, typer.Option(help="Touch all pages at start instead of on first use.")] = True,
    allow_uid: Annotated[list[int] | None, typer.Option(help="Another user whose engines may read all of it.")] = None,
    allow_gid: Annotated[list[int] | None, typer.Option(help="A group whose members' engines may.")] = None,
    quota: Annotated[list[str] | None, typer.Option(help="MODEL=SIZE: the most a model may hold; * matches.")] = None,
    tenant_quota: Annotated[str | None, typer.Option(help="The most that each cache salt may hold.")] = None,
    fair: Annotated[bool, typer.Option("--fair", help="When full, the largest namespace gives way.")] = False,
    policy: Annotated[str, typer.Option(help=f"Of eviction: {', '.join(POLICIES)}.")] = DEFAULT_POLICY,
    policy_state: Annotated[
        Path | None, typer.Option(help="File for what the policy learns; read at start, written every minute.")
    ] = None,
    remote: Annotated[
        str | None, typer.Option(help="URL of a store shared with other nodes: redis, mooncake, file, s3 and more.")
    ] = None,
    persist: Annotated[str, typer.Option(help="What goes there: all, hot, evicted, predicted.")] = "",
    remote_queue: Annotated[str, typer.Option(help="The most that may wait to be written there.")] = "256MiB",
    remote_timeout: Annotated[float, typer.Option(help="Seconds that a call to it may take.")] = 10.0,
    drain: Annotated[float, typer.Option(help="Seconds for transfers and writes after SIGTERM.")] = 5.0,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log clients that come and go.")] = False,
) -> None:
    """Run the node's cache: one daemon that colocated engines share. Ends on SIGTERM; keeps its arena for the next start."""
    import logging

    from .config import parse_nbytes
    from .node.daemon import server
    from .node.daemon.sessions import Quotas

    logging.basicConfig(format="%(message)s", level=logging.INFO if verbose else logging.WARNING)
    with _exit_on_bad_input():
        config = server.NodeConfig(
            socket=socket.absolute(),
            capacity_nbytes=parse_nbytes(capacity),
            name=name,
            arena_dir=arena_dir,
            prefault=prefault,
            uids=frozenset(allow_uid or ()),
            gids=frozenset(allow_gid or ()),
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


@app.command()
def stat(socket: Socket = DEFAULT_SOCKET, json: AsJson = False) -> None:
    """Print a daemon's counters and what its clients hold."""
    from .node import protocol

    (row,) = _ask_daemon(socket, protocol.Stat(1))
    _print_json(row) if json else _print_table([{"what": name, "value": value} for name, value in row.items()])


@app.command(name="ls")
def list_chunks(
    socket: Socket = DEFAULT_SOCKET,
    prefix: Annotated[str, typer.Option(help="First hex digits of the keys, an even number.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Print no more than that.")] = 100,
    json: AsJson = False,
) -> None:
    """List cached chunks."""
    from .node import protocol

    rows = _ask_daemon(socket, protocol.List(1, _key_bytes("prefix", prefix, least=0), limit))
    _print_json(rows) if json else _print_table(rows)


@app.command()
def get(key: str, socket: Socket = DEFAULT_SOCKET, json: AsJson = False) -> None:
    """Show one chunk's header. Exit status 1 if it is not cached."""
    from .node import protocol

    rows = _ask_daemon(socket, protocol.List(1, _key_bytes("key", key), 1))
    if not rows:
        typer.echo(f"kvkern: no cached chunk's key starts with {key}", err=True)
        raise typer.Exit(1)
    _print_json(rows[0]) if json else _print_table([{"what": name, "value": value} for name, value in rows[0].items()])


@app.command()
def evict(prefix: str, socket: Socket = DEFAULT_SOCKET, json: AsJson = False) -> None:
    """Forget the chunks whose key starts with these hex digits."""
    from .node import protocol

    _print_forgotten(_ask_daemon(socket, protocol.Evict(1, _key_bytes("prefix", prefix))), json)


@app.command()
def clear(
    socket: Socket = DEFAULT_SOCKET,
    namespace: Annotated[str | None, typer.Option(help="64 hex digits of a namespace; default: everything.")] = None,
    json: AsJson = False,
) -> None:
    """Forget everything, or a namespace, and what of it waits to be written to the remote store.

    What is in the store stays: other nodes use it, and what is asked for comes back from there.
    """
    from .keys import KEY_NBYTES
    from .node import protocol

    root = None if namespace is None else _key_bytes("namespace", namespace, least=KEY_NBYTES)
    _print_forgotten(_ask_daemon(socket, protocol.Clear(1, root)), json)


@app.command()
def record(
    out: Annotated[Path, typer.Argument(help="The trace to write, .jsonl or .jsonl.gz. Must not exist.")],
    socket: Socket = DEFAULT_SOCKET,
    requests: Annotated[int | None, typer.Option(min=1, help="End after so many. Default: on Ctrl-C.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="End after so long. Default: on Ctrl-C.")] = None,
) -> None:
    """Record the requests of a daemon's engines as a trace for `kvkern replay`. It holds no keys and no tokens."""
    from .node.client import trace_recorder

    with _exit_on_bad_input():
        typer.echo(f"kvkern: recording into {out}", err=True)
        writer, why = trace_recorder.record(socket, out, requests, seconds)
        typer.echo(f"{writer.requests:,} requests, {writer.chunks:,} distinct chunks in {out}: {why}")


def _remote_config(url: str | None, persist: str, queue: str, timeout_s: float) -> Any:
    from .config import RemoteConfig, parse_nbytes
    from .errors import ConfigError

    if url is None:
        if persist:
            raise ConfigError(
                f"persist is {persist!r}, but there is no --remote to write to; give one, or leave it out"
            )
        return None
    return RemoteConfig(url, persist, parse_nbytes(queue, "remote-queue"), timeout_s)


def _parse_quota(text: str) -> tuple[str, int]:
    from .config import parse_nbytes
    from .errors import ConfigError

    model, equals, size = text.rpartition("=")
    if not model or not equals:
        raise ConfigError(f"quota is {text!r}; expected MODEL=SIZE, for example 'llama-*=8GiB'")
    return model, parse_nbytes(size, f"quota of {model}")


@app.command()
def doctor(
    capacity: Annotated[str, typer.Option(help="Memory an arena is to have, such as 8GiB.")] = "",
    arena_dir: Annotated[Path, typer.Option(help="Where it is to lie.")] = Path("/dev/shm"),
    json: AsJson = False,
) -> None:
    """Look at this host: what kvkern will be slow on and why, and the remedy. Exit status 1 if it cannot work here."""
    from .config import parse_nbytes
    from .doctor import facts, findings, report

    with _exit_on_bad_input():
        found = facts.gather(parse_nbytes(capacity) if capacity else 0, arena_dir)
    judged = findings.findings(found)
    if json:
        typer.echo(report.as_json(found, judged))
    else:
        report.show(found, judged)
    raise typer.Exit(any(finding.severity is findings.Severity.BROKEN for finding in judged))


@app.command()
def replay(
    traces: Annotated[list[Path], typer.Argument(help="Request traces in the Mooncake format, .jsonl or .jsonl.gz.")],
    policy: Annotated[str, typer.Option(help="A list: lru, s3fifo, arc, lirs, grit; min is the offline optimum.")] = (
        "lru,grit,min"
    ),
    capacity: Annotated[
        str, typer.Option(help="A list: of the unique chunks (3%), chunks (5000) or bytes (8GiB).")
    ] = "1%,3%,10%,30%",
    chunk_size: Annotated[str, typer.Option(help="What a chunk takes, for capacities in bytes.")] = "2MiB",
    hints: Annotated[
        bool, typer.Option(help="Tell the policy sessions and stop reasons, where the trace has them.")
    ] = True,
    remote_capacity: Annotated[str, typer.Option(help="Replay two tiers, with a remote of that capacity.")] = "",
    persist: Annotated[
        str, typer.Option(help="What goes there, a list: all, hot, evicted, predicted, oracle. Default: all of these.")
    ] = "",
    prefill: Annotated[float, typer.Option(min=1, help="Tokens/s that the engine computes; for predicted.")] = 15_000,
    bandwidth: Annotated[str, typer.Option(help="Bytes/s of the remote, both ways; for predicted.")] = "10GB",
    kv_size: Annotated[str, typer.Option(help="Bytes of KV a token; for predicted.")] = "128KiB",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a core.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results there as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw hit ratio against capacity there, with LRU and MIN.")] = None,
) -> None:
    """Replay request traces through eviction policies: hit ratio at each capacity."""
    from rich.console import Console

    from .config import parse_nbytes
    from .policy.persist_modes import Costs
    from .replay import run

    with _exit_on_bad_input():
        chunk_nbytes = parse_nbytes(chunk_size, "chunk-size")
        speed = parse_nbytes(bandwidth, "bandwidth")
        costs = Costs(parse_nbytes(kv_size, "kv-size"), prefill, speed, speed)
        run.replay(
            traces,
            policy,
            capacity,
            chunk_nbytes,
            hints,
            workers,
            remote_capacity,
            persist,
            costs,
            json,
            plot,
            Console(),
        )


def _ask_daemon(socket: Path, request: Any) -> list[dict[str, Any]]:
    from .node.client.admin_client import AdminClient

    with _exit_on_bad_input(), AdminClient(socket) as daemon:
        return daemon.ask(request)
    raise AssertionError("_exit_on_bad_input leaves by typer.Exit")


def _key_bytes(name: str, digits: str, least: int = 1) -> bytes:
    """At least that many bytes of a key, at most a whole one."""
    from .errors import ConfigError

    even = re.fullmatch("(?:[0-9a-fA-F]{2})*", digits) is not None
    with _exit_on_bad_input():
        if not even or not 2 * least <= len(digits) <= 64:
            expected = "64" if least == 32 else f"{2 * least} to 64, an even number"
            raise ConfigError(f"{name} is {digits!r}; expected hex digits, {expected}: `kvkern ls` shows them")
    return bytes.fromhex(digits)


@contextmanager
def _exit_on_bad_input() -> Iterator[None]:
    """Bad input is a line on stderr and exit status 2, not a traceback."""
    from .errors import KvkernError

    try:
        yield
    except KvkernError as error:
        typer.echo(f"kvkern: {error}", err=True)
        raise typer.Exit(2) from error


def _print_json(value: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(value).decode())


def _print_forgotten(rows: list[dict[str, Any]], json: bool) -> None:
    _print_json(rows[0]) if json else typer.echo(f"{rows[0]['chunks']} chunks forgotten")


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Whole keys however narrow the terminal: somebody copies them."""
    if not rows:
        typer.echo("nothing is cached")
        return
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    """Run the command line and exit with its code."""
    app()
