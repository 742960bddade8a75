"""The demo's processes: engines that die or are stopped early, and a daemon that is started again."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("tokenizers", reason="the demo's packages are not installed: pip install kvkern[demo]")

from kvkern.arena.file import ArenaSpec, create_or_attach
from kvkern.arena.folder import arena_folder, remove_if_empty
from kvkern.arena.slots import SlotGeometry
from kvkern.demo import clock, engine_process, messages, process_group, supervised_daemon
from kvkern.demo.messages import Done, EngineSpec, Job, Plan, Progress


def _child(monkeypatch: pytest.MonkeyPatch, source: str) -> list[subprocess.Popen[bytes]]:
    """Let `engine_process.run` start this source instead of an engine. The returned list gets the process."""
    children: list[subprocess.Popen[bytes]] = []
    start = engine_process._start

    def noted(*arguments: Any) -> subprocess.Popen[bytes]:
        children.append(start(*arguments))
        return children[-1]

    reads_job = "import os, sys, time\njob = sys.stdin.readline()\nfd = int(sys.argv[1])\n"
    monkeypatch.setattr(engine_process, "CHILD", ("-c", reads_job + source))
    monkeypatch.setattr(engine_process, "_start", noted)
    return children


JOB = Job("vllm", EngineSpec(model="none", kv_pool_nbytes=1), Plan())


def test_a_dead_engine_is_reported_with_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _child(monkeypatch, "print('out of memory', flush=True); sys.exit(7)")
    with pytest.raises(engine_process.EngineFailed, match=r"exit code 7[\s\S]*out of memory"):
        list(engine_process.run(JOB, engine_process.Logs(tmp_path, verbose=False)))


def test_a_finished_engine_does_not_outlive_its_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = messages.encode(Done(start_s=2.5))
    monkeypatch.setattr(engine_process, "STOP_LIMIT_S", 0.2)
    children = _child(monkeypatch, f"os.write(fd, {done!r}); time.sleep(600)")
    assert list(engine_process.run(JOB, engine_process.Logs(tmp_path, verbose=False))) == [Done(start_s=2.5)]
    assert children[0].poll() is not None


def test_what_an_engine_leaves_in_its_temporary_folder_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = messages.encode(Progress("FOLDER")).decode()
    _child(
        monkeypatch,
        "import socket, tempfile\n"
        "socket.socket(socket.AF_UNIX).bind(os.path.join(tempfile.gettempdir(), 'left'))\n"
        f"os.write(fd, {said!r}.replace('FOLDER', tempfile.gettempdir()).encode()); sys.exit(5)",
    )
    events = engine_process.run(JOB, engine_process.Logs(tmp_path, verbose=False))
    event = next(events)
    assert isinstance(event, Progress)
    assert event.text != tempfile.gettempdir()
    with pytest.raises(engine_process.EngineFailed):
        next(events)
    assert not Path(event.text).exists()


def test_an_engine_that_is_no_longer_wanted_is_told_by_the_end_of_its_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = messages.encode(Progress("up"))
    children = _child(monkeypatch, f"os.write(fd, {line!r}); sys.stdin.read(); sys.exit(5)")
    events = engine_process.run(JOB, engine_process.Logs(tmp_path, verbose=False))
    assert next(events) == Progress("up")
    events.close()
    assert children[0].returncode == 5  # by itself, not killed


MAKES_SHARED_MEMORY = """
import subprocess
from multiprocessing import shared_memory
made = shared_memory.SharedMemory(create=True, size=1 << 20)
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
os.write(fd, message % (made.name, other.pid))
while True:  # an engine that does not notice the end of its stdin
    time.sleep(600)
"""


def test_an_engine_that_must_be_killed_leaves_no_process_and_no_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "STOP_LIMIT_S", 0.2)
    message = messages.encode(Progress("NAME PID")).replace(b"NAME PID", b"%s %d").decode()
    source = MAKES_SHARED_MEMORY.replace(
        "message % (made.name, other.pid)", f"({message!r} % (made.name, other.pid)).encode()"
    )
    children = _child(monkeypatch, source)
    events = engine_process.run(JOB, engine_process.Logs(tmp_path, verbose=False))
    event = next(events)
    assert isinstance(event, Progress)
    name, pid = event.text.split()
    shared = Path("/dev/shm") / name
    assert shared.exists()
    events.close()
    assert children[0].returncode == -9
    assert not shared.exists()
    assert not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text()


def test_a_tracker_that_does_not_end_is_killed_too() -> None:
    source = "import time; time.sleep(600)  # multiprocessing.resource_tracker"
    with subprocess.Popen([sys.executable, "-c", source], start_new_session=True) as stuck:
        while process_group.TRACKER not in Path(f"/proc/{stuck.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        process_group.end(stuck.pid, 0.2)
        assert stuck.wait(30) == -9


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["starting", "INFO: listening"], None),
        (
            [
                "(EngineCore pid=7) ERROR 11-29 22:30:26 [core:936] EngineCore failed to start.",
                "(EngineCore pid=7) ERROR 11-29 22:30:26 [core:936] kvkern.errors.ConfigError: capacity 'x' is no size",
                "Traceback (most recent call last):",
                "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
            ],
            "ConfigError: capacity 'x' is no size",
        ),
        (
            [
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "  Value error, User-specified max_model_len (12288) is too long. [type=value_error, input_value=ArgsKwargs]",
                "    For further information visit a page",
            ],
            "ValidationError: Value error, User-specified max_model_len (12288) is too long.",
        ),
    ],
)
def test_the_cause_of_a_dead_engine_is_one_line(lines: list[str], reason: str | None) -> None:
    assert engine_process.failure_reason(lines) == reason


def test_a_dead_engine_is_reported_in_one_line_where_an_exception_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _child(monkeypatch, "raise ValueError('no such attention')")
    with pytest.raises(engine_process.EngineFailed) as failed:
        list(engine_process.run(JOB, engine_process.Logs(tmp_path, verbose=False)))
    assert str(failed.value).count("\n") == 0
    assert "ValueError: no such attention Its whole output: " in str(failed.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("os.kill(os.getpid(), 9)", "exit code -9 before its phase was complete. It was killed, perhaps by the kernel"),
        ("sys.exit(143)", "Another program told it to end"),
    ],
)
def test_an_engine_that_another_program_ends_is_reported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, says: str
) -> None:
    _child(monkeypatch, source)
    with pytest.raises(engine_process.EngineFailed, match=says):
        list(engine_process.run(JOB, engine_process.Logs(tmp_path, verbose=False)))


def test_a_silence_is_broken_with_what_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SILENCE_S", 0.05)
    console = Console(file=io.StringIO(), width=110)
    assert isinstance(console.file, io.StringIO)
    with clock.PhaseClock(console) as phase_clock:
        phase_clock.now("still starting the engine")
        deadline = time.monotonic() + 30
        while console.file.getvalue().count("still starting the engine") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    printed = console.file.getvalue()
    time.sleep(0.2)
    assert console.file.getvalue() == printed


def test_every_engine_keeps_the_same_cpus_free() -> None:
    assert [engine_process.reserved_cpus(cpus) for cpus in (1, 2, 3, 64)] == [0, 0, 1, 1]
    settings = engine_process.environment(verbose=False)
    assert settings["VLLM_CPU_NUM_OF_RESERVED_CPU"] == str(engine_process.reserved_cpus(len(os.sched_getaffinity(0))))


def test_version_costs_neither_torch_nor_vllm() -> None:
    script = (
        "import runpy, sys\n"
        "sys.argv = ['kvkern', 'version']\n"
        "try:\n    runpy.run_module('kvkern', run_name='__main__')\n"
        "except SystemExit as done:\n    assert not done.code\n"
        "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    version, loaded = done.stdout.splitlines()
    assert version[0].isdigit()
    assert loaded == "[]"


def test_a_daemon_that_does_not_start_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised_daemon, "START_LIMIT_S", 0.0)
    daemon = supervised_daemon.Daemon("none", tmp_path / "log")
    with pytest.raises(engine_process.EngineFailed), daemon:
        pass
    assert not daemon._thread.is_alive()
    assert not daemon.socket.parent.exists()


def test_a_daemon_is_not_started_again_after_the_end(tmp_path: Path) -> None:
    """The supervisor may have been about to start it."""
    with supervised_daemon.Daemon("1MiB", tmp_path / "log") as daemon:
        pass
    with (tmp_path / "log").open("wb") as log:
        assert daemon._start(log) is None


def test_a_killed_daemon_is_started_again_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with supervised_daemon.Daemon("1MiB", tmp_path / "log") as daemon:
        first = supervised_daemon.stat(daemon.socket)["pid"]
        assert supervised_daemon.kill(daemon.socket) == 0
        second = supervised_daemon.wait_for(daemon.socket, lambda row: row["pid"] != first)["pid"]
        with pytest.raises(engine_process.EngineFailed, match="The daemon did not reach the expected state within 0 s"):
            supervised_daemon.wait_for(daemon.socket, lambda row: False, 0.0)
    assert not Path(f"/proc/{second}").exists()
    assert not daemon.socket.parent.exists()
    assert not list(arena_folder(supervised_daemon.SHM).glob(f"*kvkern-node-{os.getuid()}-demo-{os.getpid()}*"))


def test_arenas_of_demos_that_were_killed_are_removed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised_daemon, "START_LIMIT_S", 0.0)
    left = arena_folder(supervised_daemon.SHM) / f"kvkern-node-{os.getuid()}-demo-0-node"
    create_or_attach(ArenaSpec(SlotGeometry(256, 2), 1), left).close()
    try:
        with pytest.raises(engine_process.EngineFailed), supervised_daemon.Daemon("none", Path(os.devnull)):
            pass
        assert not left.exists()
    finally:
        left.unlink(missing_ok=True)
        remove_if_empty(left.parent)
