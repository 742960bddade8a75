"""The operator as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

END_S = 60.0


def start_operator(kubeconfig: Path | str, log: Path, *options: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start `kvkern operator run`, with variables beside this process's own."""
    command = [sys.executable, "-m", "kvkern", "operator", "run", *options]
    environment = os.environ | {"KUBECONFIG": str(kubeconfig)} | variables
    with log.open("wb") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out)


@contextmanager
def running_operator(kubeconfig: Path | str, log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run it in a context. It must end on SIGTERM with status 0, if the test has not killed it, and without a traceback."""
    process = start_operator(kubeconfig, log, *options)
    try:
        yield process
    finally:
        killed = process.returncode is not None
        process.terminate()
        try:
            status = process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    text = log.read_text()
    assert killed or status == 0, text[-3000:]
    assert "Traceback" not in text, text[-3000:]
