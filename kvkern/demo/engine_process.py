"""Runs one engine process and yields its events. Knows pipes and process groups; knows nothing of vLLM's API.

The child leads a process group of its own, so that a Ctrl-C in the terminal reaches only the parent. The parent then
closes the child's stdin, and the child stops its engine: cut off in the middle, vLLM leaves shared memory behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from . import messages

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
STOP_LIMIT_S = 10.0
LOG_TAIL_LINES = 25


class EngineFailed(RuntimeError):
    """The engine process ended before its phase was complete. The message has the end of its log."""


@dataclass(frozen=True)
class Logs:
    """Where vLLM's own output goes."""

    folder: Path
    verbose: bool  # to the terminal instead, with vLLM at level INFO

    def path(self, phase: str) -> Path:
        return self.folder / f"engine-{phase.replace('_', '-')}.log"


def run(job: messages.Job, logs: Logs) -> Generator[messages.Event, None, None]:
    """Start the job's process and yield its events up to Done. Ends the process group however this is left."""
    read_fd, write_fd = os.pipe()
    with _log(job, logs) as log, os.fdopen(read_fd, "rb") as events:
        process = _start(write_fd, log, verbose=logs.verbose)
        os.close(write_fd)  # the child has its own: events ends when the child does
        try:
            _send(process, job)
            for line in events:
                event = messages.decode_event(line)
                yield event
                if isinstance(event, messages.Done):
                    return
            raise EngineFailed(_failure(process.wait(), job, logs))
        finally:
            _stop(process)


@contextmanager
def _log(job: messages.Job, logs: Logs) -> Iterator[IO[bytes] | None]:
    if logs.verbose:
        yield None
        return
    with logs.path(job.phase).open("wb") as log:
        yield log


def _start(write_fd: int, log: IO[bytes] | None, *, verbose: bool) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvkern.demo.engine_child", str(write_fd)],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        pass_fds=(write_fd,),
        env=environment(verbose=verbose),
        start_new_session=True,
    )


def environment(*, verbose: bool) -> dict[str, str]:
    """Return this process's environment with what a quiet, offline vLLM needs."""
    paths = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_LOGGING_LEVEL": "INFO" if verbose else "WARNING",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # as patient as its parent by default, which then kills them both
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": str(reserved_cpus(len(os.sched_getaffinity(0)))),
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",  # vLLM's block hashes start from it: engines that share a cache need the same
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked engine core would hold our pipe open after a crash
    }


def leave_on_signals(*numbers: int) -> None:
    """From now on these raise SystemExit in the main thread, wherever it waits: what it has started is ended with it.

    A signal that is ignored, as under nohup, stays so.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once: what follows is the cleaning up
        sys.exit(128 + number)

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def reserved_cpus(
    num_cpus: int,  # that this process may use
) -> int:
    """Return how many CPUs vLLM's CPU backend keeps free of compute threads, the same for every engine.

    Left alone it keeps one, and two with any KV connector, unless that leaves none, and then zero: on two CPUs an
    engine with a connector would compute on both, one without on a single one, and no comparison would be fair.
    """
    return 0 if num_cpus <= 2 else 1


def _send(process: subprocess.Popen[bytes], job: messages.Job) -> None:
    """Write the job. stdin stays open: its end tells the child to stop, also when this process is killed."""
    assert process.stdin is not None  # a pipe was asked for
    with suppress(BrokenPipeError):  # a child that is gone already is reported with its log
        process.stdin.write(messages.encode(job))
        process.stdin.flush()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the child to end with its engine, then kill what is left of its group."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):  # everyone has left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _failure(exit_code: int, job: messages.Job, logs: Logs) -> str:
    message = f"the {job.phase} engine ended with exit code {exit_code} before its phase was complete"
    if logs.verbose:
        return message
    path = logs.path(job.phase)
    tail = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"{message}; the end of {path}:", *tail])
