"""What measures and needs no daemon: demo, doctor, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import AsJson, exit_on_bad_input, path_option

MAX_PREFILL_TOKENS_S = 1e9


def demo(
    model: Annotated[
        Path | None,
        typer.Option(parser=path_option, help="A model folder to use instead of SmolLM2-135M-Instruct."),
    ] = None,
    workdir: Annotated[
        Path | None,
        typer.Option(
            parser=path_option,
            help="Folder for the built model, the engines' logs and the chart. Default: in the temp dir.",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(parser=path_option, help="Write the results to this file as JSON.")
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(parser=path_option, help="Write the chart to this file. Default: in the workdir.")
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

    from ..demo import engine_process, run

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


def doctor(
    capacity: Annotated[str, typer.Option(help="Check whether an arena of this size fits, such as 8GiB.")] = "",
    arena_dir: Annotated[Path, typer.Option(parser=path_option, help="Folder of the arena.")] = Path("/dev/shm"),
    json: AsJson = False,
) -> None:
    """Check this host: what makes kvkern slow here, why, and the remedy. Exit status 1 if kvkern cannot work here."""
    from ..config import parse_nbytes
    from ..doctor import facts, findings, report

    with exit_on_bad_input():
        found = facts.gather(parse_nbytes(capacity) if capacity else 0, arena_dir)
    judged = findings.findings(found)
    if json:
        typer.echo(report.as_json(found, judged))
    else:
        report.print_report(found, judged)
    raise typer.Exit(any(finding.severity is findings.Severity.BROKEN for finding in judged))


def replay(
    traces: Annotated[
        list[Path],
        typer.Argument(parser=path_option, help="Request traces in the Mooncake format, .jsonl or .jsonl.gz."),
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
    json: Annotated[
        Path | None, typer.Option(parser=path_option, help="Write the results to this file as JSON.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(parser=path_option, help="Plot hit ratio against capacity into this file, with LRU and MIN."),
    ] = None,
) -> None:
    """Replay request traces through eviction policies and print the hit ratio at each capacity."""
    from rich.console import Console

    from ..config import parse_nbytes
    from ..option_values import checked_number
    from ..policy.persist_modes import Costs
    from ..replay import run

    with exit_on_bad_input():
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
