"""The demo's processes: engines that die or are stopped early, and a daemon that is started again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="the demo's packages are not installed: pip install kvkern[demo]")

from kvkern.demo import engine_process, messages, supervised_daemon
from kvkern.demo.messages import Done, EngineSpec, Job, Plan, Progress


def _child(monkeypatch: pytest.MonkeyPatch, source: str) -> list[subprocess.Popen[bytes]]:
    """Let `engine_process.run` start this source instead of an engine. The returned list gets the process."""
    children: list[subprocess.Popen[bytes]] = []

    def start(write_fd: int, log: Any, *, verbose: bool) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", f"import os, sys, time\njob = sys.stdin.readline()\nfd = {write_fd}\n{source}"]
        children.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(write_fd,), start_new_session=True
            )
        )
        return children[-1]

    monkeypatch.setattr(engine_process, "_start", start)
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


def test_an_engine_that_is_no_longer_wanted_is_told_by_the_end_of_its_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = messages.encode(Progress("up"))
    children = _child(monkeypatch, f"os.write(fd, {line!r}); sys.stdin.read(); sys.exit(5)")
    events = engine_process.run(JOB, engine_process.Logs(tmp_path, verbose=False))
    assert next(events) == Progress("up")
    events.close()
    assert children[0].returncode == 5  # by itself, not killed


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
    assert not list(Path("/dev/shm").glob(f"*kvkern-node-{os.getuid()}-demo-{os.getpid()}*"))
