"""The command line: `kvkern COMMAND` and `python -m kvkern COMMAND`. It parses the options; other modules do the work.

Each command imports its modules when it runs, so `kvkern version` loads neither torch nor vLLM.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .config import DEFAULT_POLICY
from .policy import POLICIES


def _path(text: str) -> Path:
    """Parse a path, for typer. Whether a file or a folder is expected there is checked by the command."""
    from .errors import ConfigError
    from .option_values import checked_path

    try:
        return checked_path(text, "the path")
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


app = typer.Typer(no_args_is_help=True, add_completion=False, help="A cache for the KV cache of LLM engines.")


@app.callback()
def _keep_subcommands() -> None:
    """Make typer expect a command's name, even if there is only one command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path need not be text in the terminal's encoding


@app.command()
def version() -> None:
    """Print kvkern's version."""
    typer.echo(__version__)


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(parser=_path, help="A model folder to use instead of SmolLM2-135M-Instruct."),
    ] = None,
    workdir: Annotated[
        Path | None,
        typer.Option(
            parser=_path, help="Folder for the built model, the engines' logs and the chart. Default: in the temp dir."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(parser=_path, help="Write the results to this file as JSON.")] = None,
    chart: Annotated[
        Path | None, typer.Option(parser=_path, help="Write the chart to this file. Default: in the workdir.")
    ] = None,
    capacity: Annotated[
        str | None,
        typer.Option(help="Memory that kvkern may use. Default: enough for all documents."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show vLLM's own log.")] = False,
    remote: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A store such as redis://host:6379. Then the demo measures only the store, in about 3 minutes: one node "
            "computes prompts and another node loads them from the store. It compares that with vLLM alone and with vLLM's "
            "own prefix cache.",
        ),
    ] = None,
) -> None:
    """Measure a real vLLM engine with and without kvkern: time to first token and equal tokens.

    It first measures this machine and asks as much as fits into 8 minutes.
    """
    import signal

    from .demo import engine_process, run

    engine_process.exit_on_signals(signal.SIGTERM, signal.SIGHUP)
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


Socket = Annotated[Path, typer.Option(parser=_path, help="The daemon's Unix socket.")]
DaemonUid = Annotated[
    int, typer.Option(help="A user whose daemon is trusted, beside your own and root's. Default: none.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_SOCKET = Path("/run/kvkern.sock")
MAX_SECONDS = 1e9  # of a recording
MAX_PREFILL_TOKENS_S = 1e9


@app.command()
def serve(
    capacity: Annotated[str, typer.Option(help="Memory for the cache, such as 8GiB.")],
    socket: Socket = DEFAULT_SOCKET,
    name: Annotated[str, typer.Option(help="Name of the trust domain; each domain has its own arena.")] = "default",
    arena_dir: Annotated[Path, typer.Option(parser=_path, help="Folder of the arena, a tmpfs mount.")] = Path(
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
        typer.Option(parser=_path, help="File for what the policy learns; read at start, written every minute."),
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
) -> None:
    """Run the node's cache: one daemon for all engines of the node. Ends on SIGTERM; keeps its arena for the next start."""
    import logging

    from .config import parse_nbytes
    from .node.daemon import server
    from .node.daemon.quotas import Quotas

    logging.basicConfig(format="%(message)s", level=logging.INFO if verbose else logging.WARNING)
    with _exit_on_bad_input():
        config = server.NodeConfig(
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


@app.command()
def stat(socket: Socket = DEFAULT_SOCKET, daemon_uid: DaemonUid = -1, json: AsJson = False) -> None:
    """Print a daemon's counters, and the slots that its clients hold."""
    from .node import protocol

    (row,) = _ask_daemon(socket, daemon_uid, protocol.Stat(1))
    _print_json(row) if json else _print_table([{"what": name, "value": value} for name, value in row.items()])


@app.command(name="ls")
def list_chunks(
    socket: Socket = DEFAULT_SOCKET,
    prefix: Annotated[str, typer.Option(help="First hex digits of the keys, an even number.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Print at most this many chunks.")] = 100,
    daemon_uid: DaemonUid = -1,
    json: AsJson = False,
) -> None:
    """List cached chunks."""
    from .node import protocol

    rows = _ask_daemon(socket, daemon_uid, protocol.List(1, _key_bytes("prefix", prefix, least=0), limit))
    _print_json(rows) if json else _print_table(rows)


@app.command()
def get(key: str, socket: Socket = DEFAULT_SOCKET, daemon_uid: DaemonUid = -1, json: AsJson = False) -> None:
    """Show the header of one chunk. Exit status 1 if the chunk is not cached."""
    from .node import protocol

    rows = _ask_daemon(socket, daemon_uid, protocol.List(1, _key_bytes("key", key), 1))
    if not rows:
        typer.echo(f"kvkern: no cached chunk has a key that starts with {key}; `kvkern ls` lists the keys", err=True)
        raise typer.Exit(1)
    _print_json(rows[0]) if json else _print_table([{"what": name, "value": value} for name, value in rows[0].items()])


@app.command()
def evict(prefix: str, socket: Socket = DEFAULT_SOCKET, daemon_uid: DaemonUid = -1, json: AsJson = False) -> None:
    """Forget the chunks whose key starts with these hex digits."""
    from .node import protocol

    _print_forgotten(_ask_daemon(socket, daemon_uid, protocol.Evict(1, _key_bytes("prefix", prefix))), json)


@app.command()
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
    from .keys import KEY_NBYTES
    from .node import protocol

    root = None if namespace is None else _key_bytes("namespace", namespace, least=KEY_NBYTES)
    _print_forgotten(_ask_daemon(socket, daemon_uid, protocol.Clear(1, root)), json)


@app.command()
def record(
    out: Annotated[
        Path, typer.Argument(parser=_path, help="The trace to write, .jsonl or .jsonl.gz. The file must not exist.")
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
    from .node.client import trace_recorder
    from .option_values import checked_number, checked_output_file

    with _exit_on_bad_input():
        checked_output_file(out, "OUT")
        if seconds is not None:
            checked_number(seconds, "seconds", 0, MAX_SECONDS)
        typer.echo(f"kvkern: recording into {out}", err=True)
        writer, why = trace_recorder.record(socket, out, requests, seconds, daemon_uid)
        typer.echo(f"{writer.requests:,} requests, {writer.chunks:,} distinct chunks in {out}: {why}")


def _remote_config(url: str | None, persist: str, queue: str, timeout_s: float) -> Any:
    from .config import RemoteConfig, parse_nbytes
    from .errors import ConfigError

    if url is None:
        if persist:
            raise ConfigError(
                f"persist is {persist!r}, but there is no --remote to write to; give --remote, or leave --persist out"
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
    capacity: Annotated[str, typer.Option(help="Check whether an arena of this size fits, such as 8GiB.")] = "",
    arena_dir: Annotated[Path, typer.Option(parser=_path, help="Folder of the arena.")] = Path("/dev/shm"),
    json: AsJson = False,
) -> None:
    """Check this host: what makes kvkern slow here, why, and the remedy. Exit status 1 if kvkern cannot work here."""
    from .config import parse_nbytes
    from .doctor import facts, findings, report

    with _exit_on_bad_input():
        found = facts.gather(parse_nbytes(capacity) if capacity else 0, arena_dir)
    judged = findings.findings(found)
    if json:
        typer.echo(report.as_json(found, judged))
    else:
        report.print_report(found, judged)
    raise typer.Exit(any(finding.severity is findings.Severity.BROKEN for finding in judged))


@app.command()
def replay(
    traces: Annotated[
        list[Path], typer.Argument(parser=_path, help="Request traces in the Mooncake format, .jsonl or .jsonl.gz.")
    ],
    policy: Annotated[
        str, typer.Option(help="Comma-separated policies: lru, s3fifo, arc, lirs, grit; min is the offline optimum.")
    ] = "lru,grit,min",
    capacity: Annotated[
        str,
        typer.Option(
            help="Comma-separated capacities: a share of the unique chunks (3%), chunks (5000) or bytes (8GiB)."
        ),
    ] = "1%,3%,10%,30%",
    chunk_size: Annotated[str, typer.Option(help="Bytes of a chunk, for capacities in bytes.")] = "2MiB",
    hints: Annotated[
        bool, typer.Option(help="Give the policy the sessions and stop reasons that the trace has.")
    ] = True,
    remote_capacity: Annotated[str, typer.Option(help="Replay two tiers, with a remote store of this capacity.")] = "",
    persist: Annotated[
        str,
        typer.Option(
            help="Comma-separated modes, which say what chunks go to the remote store: all, hot, evicted, predicted, "
            "oracle. Default: all modes of the policy."
        ),
    ] = "",
    prefill: Annotated[float, typer.Option(min=1, help="Tokens/s that the engine prefills, for predicted.")] = 15_000,
    bandwidth: Annotated[str, typer.Option(help="Bytes/s of the remote store, both ways, for predicted.")] = "10GB",
    kv_size: Annotated[str, typer.Option(help="Bytes of KV per token, for predicted.")] = "128KiB",
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes. Default: one per core.")] = None,
    json: Annotated[Path | None, typer.Option(parser=_path, help="Write the results to this file as JSON.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(parser=_path, help="Plot hit ratio against capacity into this file, with LRU and MIN."),
    ] = None,
) -> None:
    """Replay request traces through eviction policies and print the hit ratio at each capacity."""
    from rich.console import Console

    from .config import parse_nbytes
    from .option_values import checked_number
    from .policy.persist_modes import Costs
    from .replay import run

    with _exit_on_bad_input():
        chunk_nbytes = parse_nbytes(chunk_size, "chunk-size")
        checked_number(prefill, "prefill", 1, MAX_PREFILL_TOKENS_S)
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


def _ask_daemon(socket: Path, daemon_uid: int, request: Any) -> list[dict[str, Any]]:
    from .node.client.admin_client import AdminClient

    with _exit_on_bad_input(), AdminClient(socket, daemon_uid) as daemon:
        return daemon.ask(request)
    raise AssertionError("_exit_on_bad_input ends with typer.Exit")


def _key_bytes(name: str, digits: str, least: int = 1) -> bytes:
    """Parse hex digits into a key or its first bytes: from `least` to 32 bytes. Exits with status 2 for anything else."""
    from .errors import ConfigError

    even = re.fullmatch("(?:[0-9a-fA-F]{2})*", digits) is not None
    with _exit_on_bad_input():
        if not even or not 2 * least <= len(digits) <= 64:
            expected = "64" if least == 32 else f"{2 * least} to 64, an even number"
            raise ConfigError(f"{name} is {digits!r}; expected hex digits, {expected}: `kvkern ls` shows them")
    return bytes.fromhex(digits)


@contextmanager
def _exit_on_bad_input() -> Iterator[None]:
    """Turn a KvkernError into one line on stderr and exit status 2, without a traceback."""
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
    """Print aligned columns. Keys are never cut, even on a narrow terminal, because users copy them."""
    if not rows:
        typer.echo("nothing is cached")
        return
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    """Run the command line and exit with its status."""
    app()
