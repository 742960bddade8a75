"""Hundreds of odd command lines: each ends with a message and a status, at once, and leaves pipes alone."""

from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, get_args, get_type_hints

import pytest
from typer.models import ArgumentInfo
from typer.testing import CliRunner

from kvkern.cli import app
from kvkern.demo import engine_process, model, preconditions, sizing
from kvkern.node.client.admin_client import AdminClient
from kvkern.node.daemon import server
from kvkern.node.daemon.node_config import NodeConfig
from tests.node.conftest import served

LIMIT_S = 60  # of one call; a call that waits for something waits for ever
COMMANDS: dict[str, Callable[..., Any]] = {
    info.name or info.callback.__name__: info.callback for info in app.registered_commands if info.callback
}
TEXTS = ["", "a\0b", "\n", "-", "[bold]x[/bold", "\udcff", "x" * 5000]
NUMBERS = ["-1", "0", "1.5", "nan", "inf", "1e400", "9" * 30, "9" * 5000, "٣"]
SIZES = ["1e9GiB", "-1GiB", "8GiBB", "1.5.5MiB", "0.1B", "99999TiB", "101%", "1,2,,3", "nan%", "²GiB"]
URLS = [
    "file:///a%00b", "file://", "file:///", "file:///dev/null", f"file:///{'x' * 300}/a", f"file:///{'y/' * 3000}", "redis://",
    "redis://h:99999", "redis://h:x", "redis://[::1", "s3://", "s3:///", "http://", "://", "memory://\0", "nobody://x",
    "file:///tmp/x?capacity=nan", "redis://u:p%00@127.0.0.1:1", "s3://b%00/k",
]  # fmt: skip
FURTHER = ["a=b", "=1GiB", "m=nan", "zz", "0" * 63, "lru,,", "lru,lru", "fifo"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a command."""

    name: str
    kind: type  # of one value
    option: str  # empty: an argument


@dataclass(frozen=True)
class Place:
    """A folder with everything that a path may lead to by mistake."""

    folder: Path
    pipe: Path
    trace: Path
    model: Path
    daemon: Path  # socket of a daemon that serves

    def odd_paths(self) -> list[str]:
        """Return paths that are no file, no folder, no name, or too long."""
        folder = str(self.folder)
        return [
            "/", ".", "//", "/dev/null", "/proc/self/mem", folder, f"{folder}/none/none", f"{folder}/file", f"{folder}/file/x",
            f"{folder}/{'x' * 256}", f"{folder}/{'ä' * 200}", f"/{'x/' * 3000}y", f"{folder}/pipe", f"{folder}/pipe/x",
            f"{folder}/to_pipe", f"{folder}/socket", f"{folder}/loop", f"{folder}/dangling", f"{folder}/\udcff",
        ]  # fmt: skip


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Make the place. The pipe holds one byte, which must be there at the end."""
    with tempfile.TemporaryDirectory(prefix="kvkern-", dir="/tmp") as name:
        folder = Path(name)
        os.mkfifo(folder / "pipe")
        (folder / "to_pipe").symlink_to(folder / "pipe")
        (folder / "loop").symlink_to(folder / "loop")
        (folder / "dangling").symlink_to("/nowhere/x")
        (folder / "file").write_text("a file\n")
        socket.socket(socket.AF_UNIX).bind(str(folder / "socket"))
        trace = folder / "trace.jsonl"
        trace.write_text(
            json.dumps({"timestamp": 0, "input_length": 16, "output_length": 1, "hash_ids": [1, 2]}) + "\n"
        )
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(model.SMALL.hf_config()))
        (folder / "model" / "model.safetensors").touch()
        (folder / "arena").mkdir(0o700)
        with served(NodeConfig(folder / "s", 1 << 20, arena_dir=folder / "arena")):
            yield Place(folder, folder / "pipe", trace, folder / "model", folder / "s")


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    """A daemon ends when it serves, and a demo when it has read its model. Numbers of processes are not obeyed."""
    real = server.Server.run

    async def run(self: server.Server, ready: Callable[[], None] = lambda: None) -> None:
        await real(self, self.stop)

    def stop() -> None:
        raise preconditions.NotReadyError("enough")

    monkeypatch.setattr(server.Server, "run", run)
    monkeypatch.setattr(sizing, "measure", stop)
    monkeypatch.setattr(AdminClient, "recorded_requests", lambda self: iter(()))
    monkeypatch.setattr(engine_process, "exit_on_signals", lambda *numbers: None)
    monkeypatch.chdir(place.folder)


@contextmanager
def in_time(call: object) -> Iterator[None]:
    """Fail the test if the block does not end in LIMIT_S."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"{call} has not ended after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def base(command: str, place: Place) -> dict[str, str]:
    """Return the parameters that a good call of this command has. Keys are the names of the parameters."""
    there = {"socket": str(place.daemon)}
    return {
        "demo": {"model": str(place.model), "workdir": str(place.folder / "work")},
        "serve": {"capacity": "1MiB", "socket": str(place.folder / "t"), "arena_dir": str(place.folder / "arena"), "name": "t"},
        "get": {"key": "ab", **there}, "evict": {"prefix": "ab", **there}, "ls": there, "stat": there, "clear": there,
        "top": {"socket": str(place.folder / "nowhere")},  # with a daemon it would go on until Ctrl-C
        "record": {"out": str(place.folder / "out.jsonl"), "seconds": "0", **there},
        "replay": {"traces": str(place.trace), "workers": "1", "policy": "lru", "capacity": "1"},
    }.get(command, {})  # fmt: skip


def parameters(command: str) -> list[Parameter]:
    """Return the parameters of a command, from its function's signature. Switches are left out: they take no value."""
    function = COMMANDS[command]
    hints, found = get_type_hints(function, include_extras=True), []
    for name in inspect.signature(function).parameters:
        kind, *about = split(hints[name])
        if kind is bool:
            continue
        info = about[0] if about else None
        argument = info is None or isinstance(info, ArgumentInfo)
        declared = [text for text in getattr(info, "param_decls", None) or () if text.startswith("--")]
        found.append(Parameter(name, kind, "" if argument else (declared or [f"--{name.replace('_', '-')}"])[0]))
    return found


def split(hint: Any) -> tuple[Any, ...]:
    """Return (type of one value, what typer is told)."""
    base, about = (hint.__origin__, hint.__metadata__) if hasattr(hint, "__metadata__") else (hint, ())
    while parts := [part for part in get_args(base) if part is not type(None)]:
        base = parts[0]
    return base, *about


def odd_values(parameter: Parameter, place: Place) -> list[str]:
    """Return odd values for a parameter of this type."""
    if parameter.kind in (int, float):
        return [*NUMBERS, *TEXTS]
    if parameter.kind is Path:
        return [*place.odd_paths(), *TEXTS]
    return [*TEXTS, *(URLS if parameter.name == "remote" else [*NUMBERS, *SIZES, *FURTHER])]


def line(command: str, values: dict[str, str]) -> list[str]:
    """Return the command line. `--` protects arguments that begin with a dash."""
    options, arguments = [], []
    for parameter in parameters(command):
        if parameter.name in values:
            value = values[parameter.name]
            options += [parameter.option, value] if parameter.option else []
            arguments += [] if parameter.option else [value]
    return [command, *options, *(["--", *arguments] if arguments else [])]


def odd_calls(command: str, place: Place) -> Iterator[list[str]]:
    for parameter in parameters(command):
        for value in odd_values(parameter, place):
            yield line(command, {**base(command, place), parameter.name: value})


def faulty(call: list[str]) -> str | None:
    """Make a call. Returns what is wrong with its end, or None."""
    result = CliRunner().invoke(app, call)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{call} ends with {result.exception!r}"
    if "Traceback" in result.output or result.exit_code not in (0, 1, 2):
        return f"{call} ends with {result.exit_code}: {result.output[-300:]}"
    if result.exit_code and not (result.stderr or result.output).strip():
        return f"{call} fails without a word"
    return None


@pytest.mark.parametrize("command", list(COMMANDS))
def test_odd_calls(place: Place, command: str) -> None:
    guard = os.open(place.pipe, os.O_RDWR | os.O_NONBLOCK)  # holds the byte, and keeps writers from SIGPIPE
    os.write(guard, b"x")
    faults, count = [], 0
    try:
        for call in odd_calls(command, place):
            (place.folder / "out.jsonl").unlink(missing_ok=True)
            with in_time(call):
                count += 1
                if (fault := faulty(call)) is not None:
                    faults.append(fault)
        assert os.read(guard, 100) == b"x", "a call has read from the pipe or written into it"
    finally:
        os.close(guard)
    assert not faults, "\n".join(faults)
    assert count >= 16 * len(parameters(command))


def test_good_calls(place: Place) -> None:
    """The calls that are varied are good ones, so each odd value is what is tested."""
    ends: dict[str, Any] = {}
    for command in COMMANDS:
        result = CliRunner().invoke(app, line(command, base(command, place)))
        ends[command] = result.exit_code
        (place.folder / "out.jsonl").unlink(missing_ok=True)
    assert ends == dict.fromkeys(COMMANDS, 0) | {"demo": 2, "get": 1, "top": 2}
