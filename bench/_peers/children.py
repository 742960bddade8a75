"""Runs one child process: a job on its stdin, JSON lines from its stdout, a log for its stderr. Knows no system.

Every wait is bounded. A child leads a process group of its own, so a Ctrl-C in the terminal reaches only the parent. The end
of its stdin tells the child to stop, also if the parent was killed. Processes that are left in the group are then killed.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from kvkern.demo import process_group

STOP_LIMIT_S = 15.0
TAIL_LINES = 12


class PeerFailed(RuntimeError):
    """A system could not be installed, started or measured. The message says which one and why. The others still run."""


def log_tail(log: Path) -> str:
    """Return the last lines of a log, for a message."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join([f"The end of {log}:", *(f"  {line}" for line in lines)])


class Child:
    """Owns a process and its group for the duration of a `with` block."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self._command, self._env = command, env
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # b"": the child has closed its stdout

    def __enter__(self) -> Child:
        with self.log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=dict(self._env),
                    start_new_session=True,
                )
            except OSError as error:
                raise PeerFailed(
                    f"{self.name} could not be started: {error}. Check the command {self._command}."
                ) from error
        assert self._process.stdout is not None  # Popen was given a pipe
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process_group.end(self._process.pid)
            self._process.wait()

    def send(self, job: Mapping[str, Any]) -> None:
        """Write the job as one line. stdin stays open, because its end tells the child to stop."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the child has ended already: `rows` reports that with the log
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def rows(
        self,
        silence_s: float,  # longest wait for the next line
    ) -> Iterator[dict[str, Any]]:
        """Yield the child's lines up to `{"case": "done"}`. Raises PeerFailed if the child ends early or prints nothing."""
        while True:
            try:
                line = self._lines.get(timeout=silence_s)
            except queue.Empty:
                raise PeerFailed(f"{self.name} printed nothing for {silence_s:.0f} s. {log_tail(self.log)}") from None
            if not line:
                raise PeerFailed(f"{self.name} ended before it was done. {log_tail(self.log)}")
            row = self._parse(line)
            if row["case"] == "done":
                return
            yield row

    def alive(self) -> bool:
        return self._process.poll() is None

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PeerFailed(
                f"{self.name} printed {line[:200]!r}, which is not a JSON line. See {self.log}."
            ) from error
        if not isinstance(row, dict) or "case" not in row:
            raise PeerFailed(f"{self.name} printed {line[:200]!r}, which is not a row with a case. See {self.log}.")
        return row

    def _read(self, stdout: IO[bytes]) -> None:
        for line in stdout:
            self._lines.put(line)
        self._lines.put(b"")


def wait_until(ready: Callable[[], bool], child: Child, limit_s: float) -> None:
    """Poll `ready()` until it is true. Raises PeerFailed if the child ends or the time is up."""
    deadline_s = time.monotonic() + limit_s
    while not ready():
        if not child.alive():
            raise PeerFailed(f"{child.name} ended while starting. {log_tail(child.log)}")
        if time.monotonic() > deadline_s:
            raise PeerFailed(f"{child.name} was not ready after {limit_s:.0f} s. {log_tail(child.log)}")
        time.sleep(0.2)
