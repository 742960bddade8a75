"""The demo's daemon: started, and started again whenever it dies, as systemd or Kubernetes would. And what engines ask it.

Knows the daemon's command and socket; knows nothing of vLLM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..errors import ConfigError
from ..node.client.admin_client import AdminClient
from ..node.protocol import MAX_ROWS, Clear, List, Stat
from .engine_process import EngineFailed, environment

START_LIMIT_S = 120.0
RESTART_S = 0.5  # how long it stays away


class Daemon:
    """`kvkern serve` over an arena of its own, as long as the `with` block lasts."""

    def __init__(
        self,
        capacity: str,
        log: Path,
        name: str = "node",  # no two at a time have the same
        options: Sequence[str] = (),  # more of `kvkern serve`
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvkern-demo-")
        self.socket = Path(self._folder.name) / "kvkern.sock"
        self._name = f"demo-{os.getpid()}-{name}"
        self._command = [
            sys.executable, "-m", "kvkern", "serve", "--socket", str(self.socket), "--capacity", capacity,
            "--name", self._name, *options,
        ]  # fmt: skip
        self._log_path = log
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()
        self._starting = threading.Lock()  # a process is either started before the end, and ended, or not at all
        self._thread = threading.Thread(target=self._supervise, name="daemon", daemon=True)

    def __enter__(self) -> Daemon:
        self._thread.start()
        try:
            wait_for(self.socket, lambda row: True, START_LIMIT_S)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        """No process is left, and nothing that it kept."""
        with self._starting:
            self._ending.set()
            if self._process is not None:
                self._process.terminate()
        self._thread.join()
        for path in Path("/dev/shm").glob(f"*kvkern-node-{os.getuid()}-{self._name}*"):
            path.unlink()
        self._folder.cleanup()

    def _supervise(self) -> None:
        with self._log_path.open("wb") as log:
            while (process := self._start(log)) is not None:
                process.wait()
                self._ending.wait(RESTART_S)

    def _start(self, log: IO[bytes]) -> subprocess.Popen[bytes] | None:
        with self._starting:
            if self._ending.is_set():
                return None
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(verbose=False),
                start_new_session=True,  # Ctrl-C is for the demo, which ends it when nobody needs it any more
            )
            return self._process


def stat(socket: Path) -> dict[str, Any]:
    """The daemon's counters. Raises ConfigError while it is away."""
    with AdminClient(socket) as daemon:
        return daemon.ask(Stat(1))[0]


def clear(socket: Path) -> None:
    """The daemon forgets every chunk in its memory. Raises ConfigError while it is away."""
    with AdminClient(socket) as daemon:
        daemon.ask(Clear(1, None))


def keys(socket: Path) -> list[bytes]:
    """Of the chunks in its memory; none while it is away."""
    try:
        with AdminClient(socket) as daemon:
            return [bytes.fromhex(row["key"]) for row in daemon.ask(List(1, b"", MAX_ROWS))]
    except ConfigError:
        return []


def wait_for(socket: Path, condition: Callable[[dict[str, Any]], object], limit_s: float = 60.0) -> dict[str, Any]:
    """Counters of the daemon once `condition(counters)`. Raises EngineFailed after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            row = stat(socket)
            if condition(row):
                return row
        except ConfigError:
            row = {}
        if time.monotonic() > deadline:
            raise EngineFailed(f"the daemon did not get there in {limit_s:.0f} s; its counters: {row or 'no answer'}")
        time.sleep(0.05)


def kill(socket: Path) -> int:
    """kill -9. Returns how many sessions it had."""
    row = stat(socket)
    os.kill(row["pid"], signal.SIGKILL)
    return int(row.get("sessions", 0))
