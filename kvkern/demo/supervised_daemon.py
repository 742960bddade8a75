"""The demo's daemon, started again whenever it dies, as systemd or Kubernetes would do.

Also asks a running daemon for its counters and keys, and clears or kills it.
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

from ..arena.folder import arena_folder, remove_if_empty, sweep_stale
from ..errors import ConfigError
from ..node.client.admin_client import AdminClient
from ..node.protocol import MAX_ROWS, Clear, List, Stat
from .engine_process import EngineFailed, environment
from .process_group import end_with_parent

SHM = Path("/dev/shm")
START_LIMIT_S = 120.0
RESTART_S = 0.5  # pause between the daemon's end and its next start


class Daemon:
    """Runs `kvkern serve` over an arena of its own for the duration of a `with` block."""

    def __init__(
        self,
        capacity: str,
        log: Path,
        name: str = "node",  # must differ from every other running daemon's
        options: Sequence[str] = (),  # further options of `kvkern serve`
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
        self._starting = threading.Lock()  # makes sure that no process is started after `_end` has begun
        self._thread = threading.Thread(target=self._supervise, name="daemon", daemon=True)

    def __enter__(self) -> Daemon:
        sweep_stale(arena_folder(SHM), f"kvkern-node-{os.getuid()}-demo-")  # of demos that were killed with -9
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
        """End the process and delete its arena and its folder."""
        with self._starting:
            self._ending.set()
            if self._process is not None:
                self._process.terminate()
        self._thread.join()
        folder = arena_folder(SHM)
        for path in folder.glob(f"*kvkern-node-{os.getuid()}-{self._name}*"):
            path.unlink(missing_ok=True)
        remove_if_empty(folder)
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
                preexec_fn=end_with_parent,  # the thread that forks here lives as long as the demo
                start_new_session=True,  # Ctrl-C must not reach the daemon: the demo ends it when no engine needs it
            )
            return self._process


def stat(socket: Path) -> dict[str, Any]:
    """Return the daemon's counters. Raises ConfigError while the daemon is not running."""
    with AdminClient(socket) as daemon:
        return daemon.ask(Stat(1))[0]


def clear(socket: Path) -> None:
    """Let the daemon forget every chunk in its memory. Raises ConfigError while the daemon is not running."""
    with AdminClient(socket) as daemon:
        daemon.ask(Clear(1, None))


def keys(socket: Path) -> list[bytes]:
    """Return the keys of the chunks in the daemon's memory; none while the daemon is not running."""
    try:
        with AdminClient(socket) as daemon:
            return [bytes.fromhex(row["key"]) for row in daemon.ask(List(1, b"", MAX_ROWS))]
    except ConfigError:
        return []


def wait_for(socket: Path, condition: Callable[[dict[str, Any]], object], limit_s: float = 60.0) -> dict[str, Any]:
    """Wait until `condition(counters)` holds and return the counters. Raises EngineFailed after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            row = stat(socket)
            if condition(row):
                return row
        except ConfigError:
            row = {}
        if time.monotonic() > deadline:
            raise EngineFailed(
                f"The daemon did not reach the expected state within {limit_s:.0f} s. Its counters: {row or 'no answer'}. "
                f"See its log in the demo's workdir (--workdir)."
            )
        time.sleep(0.05)


def kill(socket: Path) -> int:
    """Kill the daemon with SIGKILL. Return how many sessions it had."""
    row = stat(socket)
    os.kill(row["pid"], signal.SIGKILL)
    return int(row.get("sessions", 0))
