"""Runs one engine process and yields its events. Knows pipes and process groups; knows nothing of vLLM's API.

The child leads a process group of its own, so a Ctrl-C in the terminal reaches only the parent. The parent then closes
the child's stdin, and the child stops its engine. An engine that does not stop in time is killed. A killed vLLM leaves its
shared memory to Python's resource tracker, a process of the same group, so the tracker is left to do its work.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from . import messages, process_group

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
STOP_LIMIT_S = 10.0
CHILD = ("-m", "kvkern.demo.engine_child")
LOG_TAIL_LINES = 25
EXCEPTION = re.compile(
    r"^(?:\(\S+ pid=\d+\) )?(?:ERROR [\d-]+ [\d:]+ \[\S+\] )?"  # vLLM's prefix of its processes and its log
    r"(?P<name>(?:\w+\.)*\w*(?:Error|Exception|OutOfText)): (?P<text>.+)$"
)
NO_CAUSE = ("Engine core initialization failed", "cancelled")  # what the other processes say when one has failed
REASON_CHARS = 300
PYDANTIC_END = " [type="


class EngineFailed(RuntimeError):
    """The engine process ended before its phase was complete. The message contains the end of its log."""


@dataclass(frozen=True)
class Logs:
    """Where vLLM's own output goes: to a file per phase, or to the terminal."""

    folder: Path
    verbose: bool  # to the terminal, with vLLM at level INFO

    def path(self, phase: str) -> Path:
        return self.folder / f"engine-{phase.replace('_', '-')}.log"


def run(job: messages.Job, logs: Logs) -> Generator[messages.Event, None, None]:
    """Start the job's process and yield its events up to Done. Ends the process group in every case, errors included."""
    read_fd, write_fd = os.pipe()
    # vLLM leaves sockets among its temporary files
    scratch = tempfile.TemporaryDirectory(prefix="kvkern-demo-", ignore_cleanup_errors=True)
    with scratch as folder, _log(job, logs) as log, os.fdopen(read_fd, "rb") as events:
        process = _start(write_fd, log, environment(verbose=logs.verbose) | _temporary(Path(folder), logs))
        os.close(write_fd)  # the child has its own copy, so `events` ends when the child ends
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


def _start(write_fd: int, log: IO[bytes] | None, env: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *CHILD, str(write_fd)],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        pass_fds=(write_fd,),
        env=env,
        start_new_session=True,
    )


def _temporary(folder: Path, logs: Logs) -> dict[str, str]:
    """Return variables that send temporary files to `folder`. What one engine has compiled, the next one uses."""
    return {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(logs.folder.resolve() / "torchinductor")}


def environment(*, verbose: bool) -> dict[str, str]:
    """Return this process's environment with the variables of a quiet, offline vLLM."""
    paths = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_LOGGING_LEVEL": "INFO" if verbose else "WARNING",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # its default is its parent's limit, so the parent would kill both
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": str(reserved_cpus(len(os.sched_getaffinity(0)))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked engine core would hold our pipe open after a crash
    }


def exit_on_signals(*numbers: int) -> None:
    """Let these signals raise SystemExit in the main thread, so that its child processes are ended too.

    A signal that is ignored already, as under nohup, stays ignored.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
        sys.exit(128 + number)

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def reserved_cpus(
    num_cpus: int,  # CPUs that this process may use
) -> int:
    """Return how many CPUs vLLM's CPU backend keeps free of compute threads, the same for every engine.

    By default vLLM keeps one CPU free, or two with any KV connector, or none if that would leave no CPU. On two CPUs an
    engine with a connector would therefore compute on both and an engine without one on a single CPU: an unfair comparison.
    """
    return 0 if num_cpus <= 2 else 1


def _send(process: subprocess.Popen[bytes], job: messages.Job) -> None:
    """Write the job. stdin stays open, because its end tells the child to stop. That also works if this process is killed."""
    assert process.stdin is not None  # Popen was given a pipe
    with suppress(BrokenPipeError):  # the child has ended already: `run` reports that with the log
        process.stdin.write(messages.encode(job))
        process.stdin.flush()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the child to end with its engine, then end the processes that are left of its group."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also when a second Ctrl-C ends the wait
        process_group.end(process.pid)
        process.wait()


def _failure(exit_code: int, job: messages.Job, logs: Logs) -> str:
    message = f"The {job.phase} engine ended with exit code {exit_code} before its phase was complete"
    if exit_code == -signal.SIGKILL:
        message += ". It was killed, perhaps by the kernel because memory was short"
    elif exit_code == 128 + signal.SIGTERM:
        message += ". Another program told it to end (SIGTERM)"
    if logs.verbose:
        return f"{message}. Its output is above."
    path = logs.path(job.phase)
    lines = path.read_text(errors="replace").splitlines()
    if reason := failure_reason(lines):
        return f"{message}: {reason} Its whole output: {path}"
    return "\n".join([f"{message}. The end of {path}:", *lines[-LOG_TAIL_LINES:]])


def failure_reason(lines: Sequence[str]) -> str | None:
    """Return the exception that ended an engine as one line, from the output of its processes; None if there is none.

    The last exception counts, but not those of processes that end because another one has failed.
    """
    found = None
    for index, line in enumerate(lines):
        match = EXCEPTION.search(line)
        if match is None or match["text"].startswith(NO_CAUSE):
            continue
        name, text = match["name"].rpartition(".")[2], match["text"]
        if name == "ValidationError" and index + 2 < len(
            lines
        ):  # pydantic: the text is two lines below, behind the field
            inner = next((below for below in lines[index + 1 : index + 3] if PYDANTIC_END in below), text)
            text = inner.partition(PYDANTIC_END)[0].strip()
        found = textwrap.shorten(f"{name}: {text}", REASON_CHARS, placeholder=" ...")
    return found
