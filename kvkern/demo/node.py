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
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..errors import ConfigError
from ..node.operator import Operator
from ..node.protocol import Stat
from .process import PACKAGE_PARENT, EngineFailed

START_LIMIT_S = 120.0
RESTART_S = 0.5  # how long it stays away


class Daemon:
    """`kvkern serve` over an arena of its own, as long as the `with` block lasts."""

    def __init__(self, capacity: str, log: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvkern-demo-")
        self.socket = Path(self._folder.name) / "kvkern.sock"
        self._name = f"demo-{os.getpid()}"
        self._command = [
            sys.executable, "-m", "kvkern", "serve", "--socket", str(self.socket), "--capacity", capacity,
            "--name", self._name,
        ]  # fmt: skip
        self._log_path = log
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="daemon", daemon=True)

    def __enter__(self) -> Daemon:
        self._thread.start()
        wait_for(self.socket, lambda row: True, START_LIMIT_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._ending.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        self._thread.join()
        for path in Path("/dev/shm").glob(f"*kvkern-node-{os.getuid()}-{self._name}*"):
            path.unlink()
        self._folder.cleanup()

    def _supervise(self) -> None:
        with self._log_path.open("wb") as log:
            while not self._ending.is_set():
                self._process = self._start(log)
                self._process.wait()
                self._ending.wait(RESTART_S)

    def _start(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        paths = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        return subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def stat(socket: Path) -> dict[str, Any]:
    """The daemon's counters. Raises ConfigError while it is away."""
    with Operator(socket) as daemon:
        return daemon.ask(Stat(1))[0]


def wait_for(socket: Path, condition: Any, limit_s: float = 60.0) -> dict[str, Any]:
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
