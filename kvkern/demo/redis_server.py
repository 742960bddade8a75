"""A Redis server for one run of the demo. It listens on 127.0.0.1 only, keeps nothing on disk, and ends with this process."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .preconditions import NotReadyError
from .process_group import end_with_parent

PROGRAMS = ("redis-server", "valkey-server")
MAX_MEMORY = "1gb"
START_LIMIT_S = 20.0
STOP_LIMIT_S = 10.0
READY = b"eady to accept connections"  # in the server's log; an answer on the port could come from another process


@contextmanager
def running() -> Iterator[str]:
    """Start a server, yield its URL, and stop it afterwards. Raises NotReadyError if no server can be started."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        raise NotReadyError(
            f"None of {', '.join(PROGRAMS)} is installed, and `make demo-remote` needs one. Install it; on Debian and Ubuntu: "
            f"apt-get install redis-server"
        )
    with tempfile.TemporaryDirectory(prefix="kvkern-demo-redis-") as folder:
        port, log = _free_port(), Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [
                    program, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "no",
                    "--maxmemory", MAX_MEMORY, "--maxmemory-policy", "allkeys-lru",
                ],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=end_with_parent,
                start_new_session=True,  # Ctrl-C must not end the server: the demo needs it to clean up
            )  # fmt: skip
        try:
            _wait(process, log)
            yield f"redis://127.0.0.1:{port}"
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while READY not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-2000:]
            raise NotReadyError(
                f"redis-server did not accept connections within {START_LIMIT_S:.0f} s. Its log ends with the cause:\n{said}"
            )
        time.sleep(0.02)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
